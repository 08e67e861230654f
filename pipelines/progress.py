"""One progress bar, on rank 0: rows, rows/s, tokens/s, time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dataflex import distributed


class Progress:
    """Shows the work of all ranks, judged by this rank's share: fragments are dealt evenly.

    Args:
        what: what is being computed.
        rows: rows of all ranks.
        tokens: tokens of all ranks.
    """

    def __init__(self, what: str, rows: int, tokens: int):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), disable=not distributed.is_main())
        self._task = self._bar.add_task(what, total=rows, rate="")
        self._rows, self._tokens, self._begun = 0, 0, time.monotonic()
        self._all = rows

    def __enter__(self) -> Progress:
        """Show the bar."""
        self._bar.start()
        return self

    def advance(self, rows: int, tokens: int) -> None:
        """Count this rank's rows; the other ranks are taken to be as far."""
        world = distributed.world()
        self._rows, self._tokens = self._rows + rows * world, self._tokens + tokens * world
        seconds = max(time.monotonic() - self._begun, 1e-9)
        rate = f"{self._rows / seconds:,.0f} rows/s  {self._tokens / seconds:,.0f} tokens/s"
        self._bar.update(self._task, completed=min(self._rows, self._all), rate=rate)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()
