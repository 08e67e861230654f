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
from dataflex.faults import is_of_a_lost_process, told
from dataflex.whole import replacing

log = logging.getLogger(__name__)

FILE = "status.json"


def file_of(verb: str) -> str:
    """Return the name of the file that says how a command ended."""
    return FILE if verb == "train" else f"status_{verb}.json"


class Report:
    """The file of one command, written on rank 0 as its state changes.

    Another rank writes only why it fails, if it fails alone: the launcher then ends rank 0, which may wait for it and
    cannot say so, or would say that a signal ended it.

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
        self._folder = Path(folder) if folder is not None else None
        is_owner = verb == "train" and not self._is("finished", FILE)
        self._name = FILE if is_owner else f"status_{verb}.json"
        if not distributed.is_main():
            return
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
            before, self._name = self._name, FILE
            if distributed.is_main():
                (self._folder / before).unlink(missing_ok=True)
                self.write("running")

    def write(self, state: str, exit_code: int | None = None, message: str | None = None) -> None:
        """Write the state. A disk that is full by now is only logged: the command's own end counts more."""
        if (
            distributed.is_main() and distributed.world() > 1 and self._is("failed")
        ):  # asked on disk: the other rank's word is nowhere else
            return  # by another rank, and this one was ended for it
        try:
            self._put(state, exit_code, message)
        except OSError as error:
            log.warning("%s: not written: %s", self._name, error)

    def fail(self, error: BaseException) -> None:
        """Write the error that ends the command; another rank than 0 writes it only if rank 0 does not meet it too."""
        if not distributed.is_main() and isinstance(error, DataflexError) and error.everywhere:
            return
        if is_of_a_lost_process(error) and (self._is("failed") or self._is("interrupted")):
            return  # the one that is gone has said why
        if isinstance(error, DataflexError):
            self.write("failed", error.exit_code, str(error))
        else:
            text, exit_code = told(error) or (repr(error), 1)
            self.write("failed", exit_code, text)

    def interrupt(self, error: BaseException) -> None:
        """Write that the command was asked to stop."""
        if distributed.is_main():
            self.write("interrupted", getattr(error, "exit_code", 130), str(error) or "Ctrl-C")

    def finish(self) -> None:
        """Write that the command came to its end."""
        if distributed.is_main():
            self.write("finished", 0)

    def _is(self, state: str, name: str | None = None) -> bool:
        try:
            return self._folder is not None and bool(
                json.loads((self._folder / (name or self._name)).read_text("utf-8"))["state"] == state
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _put(self, state: str, exit_code: int | None, message: str | None) -> None:
        if self._folder is None:
            return
        about = {
            "command": self._verb,
            "state": state,
            "exit_code": exit_code,
            "message": message,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with replacing(self._folder / self._name) as temporary:
            temporary.write_text(json.dumps(about) + "\n", "utf-8")


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
            report.interrupt(error)
            raise
        except BaseException as error:
            report.fail(error)
            raise
        else:
            stop.over()
            report.finish()
        finally:
            _current = None


def training_begins() -> None:
    """Note that the running command is about to take its first step."""
    if _current is not None:
        _current.begins()
