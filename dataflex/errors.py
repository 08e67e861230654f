"""The exceptions that people see, each with the exit code of the command that meets it."""

from __future__ import annotations


class DataflexError(Exception):
    """An error whose text says what was found, what was expected, where, and what to do."""

    exit_code = 1
    everywhere = False
    """Whether every process of the run raises it, so that one of them is enough to print it."""


class ConfigError(DataflexError):
    """The run file or the command line is wrong; lists every problem found, not only the first."""

    exit_code = 2


class MismatchError(DataflexError):
    """A store, checkpoint or journal belongs to something else than what this run needs."""

    exit_code = 3


class CorruptionError(DataflexError):
    """Bytes on disk differ from what was committed."""

    exit_code = 4


class ConflictError(DataflexError):
    """Another writer committed something different under the same name."""

    exit_code = 5


class CoverageError(DataflexError):
    """Features or selectable rows are missing and may not, or cannot, be computed."""

    exit_code = 6


class UnavailableError(DataflexError):
    """A server that the run needs does not answer. What is committed stays; the same command goes on from there."""

    exit_code = 75


class Interrupted(BaseException):
    """A scheduler asked the process to stop. What is committed stays; the same command goes on from there.

    Not an `Exception`, so that a library's handler of errors does not swallow it. `is_together` is true if every
    process of the run has left at the same place, so that none waits for another.
    """

    exit_code = 75

    def __init__(self, message: str, is_together: bool = False):
        super().__init__(message)
        self.is_together = is_together


class Cancelled(Interrupted):
    """Ctrl-C; the text says what was left."""

    exit_code = 130
