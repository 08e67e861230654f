"""What surrounds the work of a verb, called as a command or from Python: its status file, signals, and its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dataflex import distributed
from dataflex.config.outputs import refuse_misplaced
from dataflex.errors import Cancelled, DataflexError, Interrupted
from dataflex.faults import of_user_code
from dataflex.results import opening
from dataflex.results.warned import kept
from dataflex.status import reported

if TYPE_CHECKING:
    from dataflex.config import Settings


@contextlib.contextmanager
def running(verb: str, settings: Settings) -> Iterator[None]:
    """Surround the work of a verb on one process of its run.

    Args:
        verb: the command.
        settings: the checked run file.

    Raises:
        ConfigError: the output folder cannot be written to.
        DataflexError: code that the verb ran called `sys.exit`.
        Interrupted: a signal or Ctrl-C asked for it.
    """
    folder = settings.llamafactory.get("output_dir")
    try:
        with _leaving(), reported(verb, folder), _staying(verb):
            if distributed.local_rank() == 0 and folder:
                refuse_misplaced(folder)
            distributed.prepare()
            keeps = verb == "train" and distributed.is_main()
            with opening.beginning(), kept(folder) if keeps and folder else contextlib.nullcontext():
                yield
    except KeyboardInterrupt as interrupt:  # behind the pipelines' imports it says more: `trainers.stopping`
        rest = "the same command begins where this one would have"
        raise Cancelled(f"Ctrl-C: {verb} stopped; what is committed stays, and {rest}") from interrupt


@contextlib.contextmanager
def _staying(verb: str) -> Iterator[None]:
    """Refuse a `sys.exit` of code that a verb runs, such as a component: the verb would seem to be done."""
    try:
        yield
    except SystemExit as error:
        where = of_user_code(error) or f"SystemExit: {error.code}"
        raise DataflexError(f"{verb} was ended by code that it ran, before it was done: {where}") from error


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
    """End the process group of a run that went well, or that all processes have left at the same place."""
    try:
        yield
    except Interrupted as interrupted:
        if interrupted.is_together:
            interrupted.__traceback__ = None  # its frames hold the trainer, which must be gone first
            distributed.leave()
        raise
    distributed.leave()
