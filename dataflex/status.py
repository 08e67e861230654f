"""How a command ended, for people and schedulers: `status.json` of a training, `status_<verb>.json` of the others."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dataflex import distributed, stop
from dataflex.errors import ConfigError, DataflexError, Interrupted

log = logging.getLogger(__name__)

FILE = "status.json"


class Report:
    """The file of one command, written on rank 0 as its state changes.

    `status.json` belongs to the training of a folder. `train` over a finished one reports to `status_train.json` until
    it takes its first step, so that a refused start does not hide how the training ended.

    Args:
        verb: the command.
        folder: the run's output folder; None writes nothing.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, verb: str, folder: str | os.PathLike[str] | None):
        self._verb = verb
        self._folder = Path(folder) if folder is not None and distributed.is_main() else None
        is_owner = verb == "train" and not self._is_finished()
        self._name = FILE if is_owner else f"status_{verb}.json"
        try:
            self._put("running", None, None)
        except OSError as error:
            raise ConfigError(
                f"output_dir: found {folder}, which cannot be written to ({error.strerror}); expected a folder "
                "that you may write to, on a disk with room"
            ) from error

    def begins(self) -> None:
        """Note that the first step is about to be taken."""
        if self._verb == "train" and self._name != FILE and self._folder is not None:
            (self._folder / self._name).unlink(missing_ok=True)
            self._name = FILE
            self.write("running")

    def write(self, state: str, exit_code: int | None = None, message: str | None = None) -> None:
        """Write the state; what the command did counts more than a disk on which it can no longer be said."""
        try:
            self._put(state, exit_code, message)
        except OSError as error:
            log.warning("%s: not written: %s", self._name, error)

    def _is_finished(self) -> bool:
        try:
            return self._folder is not None and bool(
                json.loads((self._folder / FILE).read_text("utf-8"))["state"] == "finished"
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _put(self, state: str, exit_code: int | None, message: str | None) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{self._name}"
        about = {
            "command": self._verb,
            "state": state,
            "exit_code": exit_code,
            "message": message,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        temporary.write_text(json.dumps(about) + "\n", "utf-8")
        os.replace(temporary, self._folder / self._name)


_current: Report | None = None


@contextlib.contextmanager
def reported(verb: str, folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Write the command's status into a folder as it changes, and answer the signals that ask it to stop.

    torchrun hides its workers' exit codes, so the file has them: `state` is running, finished, interrupted or failed.

    Args:
        verb: the command.
        folder: the run's output folder; None writes nothing.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    global _current
    with stop.listening():
        report = _current = Report(verb, folder)
        try:
            yield
        except (Interrupted, KeyboardInterrupt) as error:
            report.write("interrupted", getattr(error, "exit_code", 130), str(error) or "Ctrl-C")
            raise
        except BaseException as error:
            code = error.exit_code if isinstance(error, DataflexError) else 1
            report.write("failed", code, f"{error}" if isinstance(error, DataflexError) else repr(error))
            raise
        else:
            report.write("finished", 0)
        finally:
            _current = None


def training_begins() -> None:
    """Note that the running command is about to take its first step."""
    if _current is not None:
        _current.begins()
