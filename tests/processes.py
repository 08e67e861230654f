"""Runs in processes of their own, as a user starts them."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dataflex.environment import QUIET


def environment(**more: str) -> dict[str, str]:
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    # A command that ran within the tests' own process has set what makes the libraries quiet; a user's shell has not.
    outer = {name: value for name, value in os.environ.items() if name not in QUIET}
    return outer | {"PATH": path, "PYTHONPATH": python, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def dataflex(verb: str, path: Path, *overrides: str, **env: str) -> None:
    launch([sys.executable, "-m", "dataflex.cli", verb, str(path), *overrides], **env)


def launch(command: list[str], seconds: float = 400, /, **env: str) -> None:
    """Run a command that starts processes of its own; what it said is shown if it fails."""
    status, said = _watched(command, env, 0, None, seconds)
    assert status == 0, said[-4000:]


def ended(command: list[str], **env: str) -> tuple[int, str]:
    """Run a command that starts processes of its own; return its exit status and what it said."""
    return _watched(command, env, 0, None)


def signalled(command: list[str], number: int, is_time: Callable[[], bool], **env: str) -> tuple[int, str]:
    """Run a command, and send it a signal as soon as `is_time`, if it still runs; return what `ended` does."""
    return _watched(command, env, number, is_time)


def _watched(
    command: list[str], env: dict[str, str], number: int, is_time: Callable[[], bool] | None, seconds: float = 400
) -> tuple[int, str]:
    # A shell's background jobs ignore Ctrl-C, and their children inherit that.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with tempfile.TemporaryFile("w+") as log:
        # A session of its own, so that a launcher that hangs can be ended together with its workers.
        process = subprocess.Popen(
            command, env=environment(**env), stdout=log, stderr=log, start_new_session=True, preexec_fn=heeding
        )
        try:
            if is_time is not None:
                while process.poll() is None and not is_time():
                    time.sleep(0.01)
                process.send_signal(number)
            status = process.wait(seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        return status, log.read()


def sharding(workspace: Any, stage: int) -> str:
    """Write a DeepSpeed configuration of a ZeRO stage and return its path."""
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    path = workspace.folder / "ds.json"
    path.write_text(json.dumps(config))
    return str(path)


TWO = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
"""Two processes on whatever devices there are; `--cpu` would start one."""


SEVERAL = """
import sys
from pathlib import Path
from dataflex import distributed
from dataflex.config import load
from dataflex.features.adam import Moments
from dataflex.pipelines.featurize import featurize
from dataflex.pipelines.select import select
from dataflex.pipelines.train import train

def select_8(settings):
    select(settings, 8, Path(settings.llamafactory["output_dir"] + ".json"))

distributed.prepare()
for verb, path in zip(sys.argv[1::2], sys.argv[2::2]):
    {"featurize": featurize, "select": select_8, "train": train}[verb](load(path))
distributed.leave()
"""


def launch_several(folder: Path, files: Iterable[Path]) -> None:
    """Train run files one after the other on two processes, which are started once."""
    launch_verbs(folder, [("train", path) for path in files])


def launch_verbs(folder: Path, commands: Iterable[tuple[str, Path]]) -> None:
    """Run verbs of run files one after the other on two processes, which are started once.

    `select` chooses 8 rows, and writes them to the output folder's name with `.json`.
    """
    script = folder / "several.py"
    script.write_text(SEVERAL)
    launch([*TORCHRUN, str(script), *(str(part) for command in commands for part in command)])
