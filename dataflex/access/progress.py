"""One progress bar, on rank 0: rows, rows/s, tokens/s, time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dataflex import distributed


class Progress:
    """Shows the work of all ranks, judged by this rank's share: the others are taken to be as fast.

    Rows are counted once for each set of features that is asked for together.
    """

    def __init__(self) -> None:
        self._bar: Bar | None = None

    @contextlib.contextmanager
    def showing(self, rows: int) -> Iterator[None]:
        """Show one bar until the end of the block; inside another such block, that one's bar goes on.

        Args:
            rows: rows that the block will pass through `skip` and `advance`.
        """
        if self._bar is not None:
            yield
            return
        columns = (
            TextColumn("features"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._rows, self._tokens, self._begun = 0, 0, time.monotonic()
        with Bar(*columns, console=Console(stderr=True), disable=not distributed.is_main()) as self._bar:
            self._task = self._bar.add_task("", total=rows, rate="")
            try:
                yield
            finally:
                self._bar = None

    def skip(self, rows: int) -> None:
        """Count rows that need no work."""
        if self._bar is not None:
            self._bar.advance(self._task, rows)

    def advance(self, rows: int, tokens: int) -> None:
        """Count this rank's rows; the other ranks are taken to be as far."""
        if self._bar is None:
            return
        world = distributed.world()
        self._rows, self._tokens = self._rows + rows * world, self._tokens + tokens * world
        seconds = max(time.monotonic() - self._begun, 1e-9)
        rate = f"{self._rows / seconds:,.0f} rows/s  {self._tokens / seconds:,.0f} tokens/s"
        task = self._bar.tasks[0]
        self._bar.update(self._task, advance=min(rows * world, (task.total or 0) - task.completed), rate=rate)
