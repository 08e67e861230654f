"""Runs of a comparison as processes of their own, several at a time, each with its share of the devices."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataflex import stop
from dataflex.errors import Cancelled, ConfigError, ConflictError
from dataflex.status import file_of

log = logging.getLogger(__name__)

_LOOK = 0.2
"""Seconds between two looks at what runs."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"


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
        needs: names of tasks without whose good end it is not begun.
        begin: called when it begins.
        done: called with the seconds that it took, when it has come to a good end.
    """

    name: str
    command: Sequence[str]
    log: Path
    folder: Path
    verb: str
    after: Sequence[str] = ()
    needs: Sequence[str] = ()
    begin: Callable[[], None] = lambda: None
    done: Callable[[float], None] = lambda seconds: None

    @property
    def status(self) -> Path:
        """Its status file."""
        return self.folder / file_of(self.verb)


@dataclass
class Outcome:
    """What became of the tasks: name -> exit code, and the reason of those that failed."""

    codes: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    task: Task
    slot: int
    process: subprocess.Popen[bytes]
    begun: float = field(default_factory=time.time)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold a folder until the end of the block, and give the file that does; who inherits it holds the folder too.

    So a comparison that was killed still holds it, as long as one of its runs goes on.

    Raises:
        ConflictError: another holds it.
        ConfigError: this is one of several processes.
    """
    if "LOCAL_RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise ConfigError(
            "compare: found one of several processes; expected to be called once: each run starts its own, as "
            "`dataflex train` does (FORCE_TORCHRUN, NPROC_PER_NODE)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConflictError(
                f"{folder}: found another comparison at work there, or a run of one; wait for it, or end it"
            ) from error
        yield lock.fileno()


def run_all(tasks: Sequence[Task], devices: Sequence[Mapping[str, str]], held: int) -> Outcome:
    """Run every task once, in order as far as they wait for nothing, one for each share of the devices at a time.

    One that fails does not keep the others from running.

    Args:
        tasks: what is run.
        devices: for each that runs at a time, the variables that give it its share (`shares`).
        held: the file that holds the comparison's folder.

    Raises:
        Interrupted: a signal asked for it; the tasks were asked too, and have ended. Cancelled: Ctrl-C.
    """
    outcome, waiting, free = Outcome(), list(tasks), list(range(len(devices)))
    running: list[_Running] = []
    known = {task.name for task in tasks}
    try:
        with stop.held():  # so that nothing is begun that is not known here
            while (waiting or running) and not stop.is_asked():
                for task in [t for t in waiting if any(outcome.codes.get(need) for need in t.needs)]:
                    waiting.remove(task)
                    _give_up(task, outcome)
                before = [(t, [a for a in (*t.after, *t.needs) if a in known]) for t in waiting]
                ready = [t for t, others in before if all(other in outcome.codes for other in others)]
                for task in ready[: len(free)]:
                    waiting.remove(task)
                    slot = free.pop(0)
                    log.info("%s: %s begins (log: %s)", task.name, task.verb, task.log)
                    running.append(_Running(task, slot, _begun(task, devices[slot], held)))
                time.sleep(_LOOK)
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    free.append(each.slot)
                    _settle(each, outcome, len(waiting) + len(running))
            if stop.is_asked():
                stop.leave()
    except KeyboardInterrupt as error:  # a terminal sends it to every process of the group
        raise Cancelled("Ctrl-C: finished runs stay, and the same command goes on from there") from error
    finally:
        for each in running:
            each.process.terminate()
        for each in running:  # as long as their checkpoints take: whoever cannot wait kills them all
            each.process.wait()
    return outcome


def shares(jobs: int) -> list[dict[str, str]]:
    """Return for each of so many runs at a time the variables that give it its share of the GPUs, or of the cores."""
    if jobs == 1:
        return [{}]
    own_port, visible = {"MASTER_PORT": ""}, _gpus()  # one port would be everyone's
    if not visible and not os.environ.get(_THREADS):  # every run would take as many threads as there are cores
        own_port[_THREADS] = str(max(1, (os.cpu_count() or 1) // jobs))
    share = max(1, len(visible) // jobs)
    parts = [(visible * jobs)[slot * share : (slot + 1) * share] for slot in range(jobs)]
    return [own_port | ({_VISIBLE: ",".join(part)} if part else {}) for part in parts]


def processes(devices: Mapping[str, str]) -> int:
    """Return by how many processes a run with this share of the devices is trained, on each node.

    Raises:
        ConfigError: a variable asks for more than there are devices in a share.
    """
    count = len(devices[_VISIBLE].split(",")) if _VISIBLE in devices else len(_gpus())
    asked = os.environ.get("NPROC_PER_NODE", "")
    if asked.isdecimal() and _VISIBLE in devices and int(asked) > count:
        raise ConfigError(
            f"NPROC_PER_NODE: found {asked}; expected at most {count}, the GPUs of each run where --jobs share them"
        )
    return int(asked) if asked.isdecimal() else max(1, count)


def _gpus() -> list[str]:
    import torch  # seconds

    if os.environ.get(_VISIBLE):
        return [each for each in os.environ[_VISIBLE].split(",") if each]
    return [str(number) for number in range(torch.cuda.device_count())]


def _begun(task: Task, devices: Mapping[str, str], held: int) -> subprocess.Popen[bytes]:
    task.begin()
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as out:
        return subprocess.Popen(
            task.command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **devices},
            pass_fds=(held,),
        )


def _give_up(task: Task, outcome: Outcome) -> None:
    """Note that a task is not begun, as what it needs has failed."""
    failed = next(need for need in task.needs if outcome.codes.get(need))
    outcome.codes[task.name] = outcome.codes[failed]
    outcome.reasons[task.name] = f"not begun, without the {failed}: {outcome.reasons[failed]}"


def _settle(each: _Running, outcome: Outcome, left: int) -> None:
    """Note how a task has ended."""
    name, code = each.task.name, each.process.returncode
    outcome.codes[name] = code
    if code:
        outcome.reasons[name] = _reason(each)
        log.warning("%s: %s failed: %s", name, each.task.verb, outcome.reasons[name])
    else:
        took = time.time() - each.begun
        log.info("%s: done in %.0f s, %d left", name, took, left)
        each.task.done(took)


def _reason(each: _Running) -> str:
    """Return what a run says of its end: its status file's message if that is of this launch, else its last line."""
    task, message = each.task, None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if task.status.stat().st_mtime >= each.begun - 1:
            message = json.loads(task.status.read_text("utf-8")).get("message")
    if not message:
        lines = task.log.read_text("utf-8", "replace").strip().splitlines()
        message = lines[-1] if lines else "it printed nothing"
    return f"{' '.join(str(message).split())[:300]} (exit code {each.process.returncode}; log: {task.log})"
