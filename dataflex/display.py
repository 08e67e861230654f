"""The one place of the terminal where progress is drawn: a line for each thing that goes on, on rank 0.

Where the output is no terminal, the same is said in the log, at most every `EVERY` seconds.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from dataflex import distributed

log = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two lines of the log about the same thing."""
_REDRAWN = 0.1


class Task:
    """Something that goes on.

    Attributes:
        what: what it is called; may change while it goes on.
        total: how much there is to do.
        done: how much of it is done.
        note: said beside, such as a speed.
    """

    def __init__(self, what: str, total: int, done: int = 0):
        self.what, self.total, self.done, self.note = what, total, done, ""
        self._begun, self._before, self._said = time.monotonic(), done, time.monotonic()
        self._drawn = 0.0
        self._number: TaskID | None = None

    def update(self, done: int | None = None, what: str | None = None, note: str | None = None) -> None:
        """Take what has changed, and show it."""
        self.done = self.done if done is None else min(done, self.total)
        self.note = self.note if note is None else note
        is_other = what is not None and what != self.what
        self.what = self.what if what is None else what
        _display.show(self, is_other)

    def skip(self, count: int) -> None:
        """Count what was done before, and took no time."""
        self._before += count
        self.update(self.done + count)

    @property
    def left(self) -> str:
        """How long the rest takes at the mean speed so far, as minutes and seconds; unknown before anything is done."""
        done, seconds = self.done - self._before, time.monotonic() - self._begun
        if done <= 0:
            return "-:--"
        return _clock(seconds / done * (self.total - self.done))

    def is_due(self) -> bool:
        """Say whether the log has heard nothing of it for long enough, and take note that it does now."""
        now = time.monotonic()
        if now - self._said < EVERY:
            return False
        self._said = now
        return True

    def is_stale(self) -> bool:
        """Say whether what is drawn may be drawn anew."""
        now = time.monotonic()
        if now - self._drawn < _REDRAWN and self.done < self.total:
            return False
        self._drawn = now
        return True


class _Display:
    def __init__(self) -> None:
        self.console: Console | None = None
        self._bar: Progress | None = None
        self._open: list[Task] = []

    def begin(self, task: Task) -> None:
        if not distributed.is_main():
            return
        self._open.append(task)
        if self._bar is None:
            console = self.console or Console(stderr=True)
            if console.is_terminal and log.isEnabledFor(logging.INFO):
                columns = (
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[note]}", markup=False),
                    TextColumn("{task.fields[left]} left", markup=False),
                )
                self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
                self._bar.start()
        if self._bar is not None:
            task._number = self._bar.add_task(
                task.what, total=task.total, completed=task.done, note=task.note, left=task.left
            )

    def show(self, task: Task, is_other: bool) -> None:
        if task not in self._open:
            return
        if self._bar is not None and task._number is not None:
            if task.is_stale() or is_other:
                self._bar.update(
                    task._number, completed=task.done, total=task.total, description=task.what, note=task.note,
                    left=task.left,
                )  # fmt: skip
        elif task.is_due():
            note = f", {task.note}" if task.note else ""
            log.info("%s: %d of %d%s, %s left", task.what, task.done, task.total, note, task.left)

    def end(self, task: Task) -> None:
        if task not in self._open:
            return
        self._open.remove(task)
        if self._bar is not None and task._number is not None:
            self._bar.remove_task(task._number)
        if not self._open:
            self.close()

    def close(self) -> None:
        self._open.clear()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


_display = _Display()


def begin(what: str, total: int, done: int = 0) -> Task:
    """Show something that goes on, until `end`."""
    task = Task(what, total, done)
    _display.begin(task)
    return task


def end(task: Task) -> None:
    """Show it no longer."""
    _display.end(task)


@contextlib.contextmanager
def showing(what: str, total: int, done: int = 0) -> Iterator[Task]:
    """Show something that goes on, until the end of the block."""
    task = begin(what, total, done)
    try:
        yield task
    finally:
        end(task)


def close() -> None:
    """Show nothing any more, so that an error stands on a line of its own."""
    _display.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
