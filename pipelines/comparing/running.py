"""Runs of a comparison as processes of their own, several at a time, each with its share of the devices."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataflex.errors import Cancelled

log = logging.getLogger(__name__)

_LOOK = 0.2
_PATIENCE = 120.0
"""Seconds that runs have to write their checkpoints once they are asked to stop."""


@dataclass(frozen=True)
class Task:
    """A command that waits for others.

    Attributes:
        name: what it is called in messages.
        command: what is run.
        log: takes what it prints.
        folder: where its status file is.
        verb: the command of `dataflex` that it is.
        after: names of tasks that have to come to their end first, well or not.
    """

    name: str
    command: Sequence[str]
    log: Path
    folder: Path
    verb: str
    after: Sequence[str] = ()


@dataclass
class Outcome:
    """What became of the tasks: name -> exit code, and the reason of those that failed."""

    codes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def run_all(tasks: Sequence[Task], jobs: int) -> Outcome:
    """Run every task once, in order as far as they wait for nothing, at most so many at a time.

    One that fails does not keep the others from running.

    Raises:
        Interrupted: a signal asked for it; the tasks were asked too, and have ended. Cancelled: Ctrl-C.
    """
    outcome, waiting = Outcome(), list(tasks)
    running: dict[str, tuple[Task, int, float, subprocess.Popen[bytes]]] = {}
    free, known = list(range(jobs)), {task.name for task in tasks}
    devices = _shares(jobs)
    try:
        while waiting or running:
            ready = [t for t in waiting if all(a in outcome.codes or a not in known for a in t.after)]
            for task in ready[: len(free)]:
                waiting.remove(task)
                slot = free.pop(0)
                log.info("%s: %s begins (log: %s)", task.name, task.verb, task.log)
                running[task.name] = task, slot, time.monotonic(), _begun(task, devices[slot])
            time.sleep(_LOOK)
            for name, (task, slot, begun, process) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[name]
                free.append(slot)
                outcome.codes[name] = code
                if code:
                    outcome.reasons[name] = _reason(task, code)
                    log.warning("%s: %s failed: %s", name, task.verb, outcome.reasons[name])
                else:
                    log.info("%s: done in %.0f s, %d left", name, time.monotonic() - begun, len(waiting) + len(running))
    except KeyboardInterrupt as error:  # a terminal sends it to every process of the group
        raise Cancelled("Ctrl-C: finished runs stay, and the same command goes on from there") from error
    finally:
        _end([process for _, _, _, process in running.values()])
    return outcome


def _begun(task: Task, devices: Mapping[str, str]) -> subprocess.Popen[bytes]:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as out:
        return subprocess.Popen(
            task.command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **devices}
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to stop, and wait for them."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + _PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _shares(jobs: int) -> list[dict[str, str]]:
    """Return for each of so many runs at a time the variable that gives it its share of the GPUs, if there are any."""
    if jobs == 1:
        return [{}]
    import torch  # seconds, and only for those who run several at a time

    name = "CUDA_VISIBLE_DEVICES"
    visible = [each for each in os.environ.get(name, "").split(",") if each]
    visible = visible or [str(number) for number in range(torch.cuda.device_count())]
    if not visible:
        return [{}] * jobs
    share = max(1, len(visible) // jobs)
    return [{name: ",".join((visible * jobs)[slot * share : (slot + 1) * share])} for slot in range(jobs)]


def _reason(task: Task, code: int) -> str:
    """Return what a run says of its end: its status file's message, else the last line that it printed."""
    name = "status.json" if task.verb == "train" else f"status_{task.verb}.json"
    try:
        message = json.loads((task.folder / name).read_text("utf-8")).get("message")
    except (OSError, ValueError, AttributeError):
        message = None
    if not message:
        lines = task.log.read_text("utf-8", "replace").strip().splitlines()
        message = lines[-1] if lines else "it printed nothing"
    return f"{' '.join(str(message).split())[:300]} (exit code {code}; log: {task.log})"
