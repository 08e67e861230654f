"""How a command ended, for people and for schedulers: `status.json`, and signals that ask it to stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from dataflex import distributed
from dataflex.errors import DataflexError, Interrupted

FILE = "status.json"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def reported(verb: str, folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Write the command's status into a folder as it changes, and turn SIGTERM and SIGUSR1 into `Interrupted`.

    The work stops where it is: a fragment or a training step in flight is done again by the next call. torchrun hides
    its workers' exit codes, so the file has them: `state` is running, finished, interrupted or failed.

    Args:
        verb: the command.
        folder: the run's output folder; None writes nothing.
    """
    path = Path(folder) / FILE if folder is not None and distributed.is_main() else None
    kept = {number: signal.signal(number, _stopper(os.getpid())) for number in _SIGNALS}
    _write(path, verb, "running", None)
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        _write(path, verb, "interrupted", getattr(error, "exit_code", 130))
        raise
    except BaseException as error:
        _write(path, verb, "failed", error.exit_code if isinstance(error, DataflexError) else 1)
        raise
    else:
        _write(path, verb, "finished", 0)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _stopper(owner: int) -> Any:
    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Interrupted(f"{signal.Signals(number).name}: interrupted; the same command goes on from here")
        signal.signal(number, signal.SIG_DFL)  # a forked worker inherits the handler and has nothing to say
        os.kill(os.getpid(), number)

    return stop


def _write(path: Path | None, verb: str, state: str, exit_code: int | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{FILE}")
    about = {"command": verb, "state": state, "exit_code": exit_code, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    temporary.write_text(json.dumps(about) + "\n", "utf-8")
    os.replace(temporary, path)
