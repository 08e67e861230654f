"""How far the features are: rows, rows/s, tokens/s, time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from dataflex import display, distributed


class Progress:
    """Shows the work of all ranks, judged by this rank's share: the others are taken to be as fast.

    Rows are counted once for each set of features that is asked for together; batch by batch, where a source tells.
    """

    def __init__(self) -> None:
        self._task: display.Task | None = None
        self._rows, self._tokens, self._ahead = 0, 0, 0
        self._begun = 0.0

    @contextlib.contextmanager
    def showing(self, rows: int) -> Iterator[None]:
        """Show one bar until the end of the block; inside another such block, that one's bar goes on.

        Args:
            rows: rows that the block will pass through `skip` and `advance`.
        """
        if self._task is not None:
            yield
            return
        self._rows, self._tokens, self._ahead, self._begun = 0, 0, 0, time.monotonic()
        with display.showing("features", rows) as self._task:
            try:
                yield
            finally:
                self._task = None

    def skip(self, rows: int) -> None:
        """Count rows that need no work."""
        if self._task is not None:
            self._task.skip(rows)

    def batch(self, rows: int, tokens: int) -> None:
        """Count a batch of this rank's, part of rows that `advance` counts when all of them are done."""
        self._ahead += rows
        self._count(rows, tokens)

    def advance(self, rows: int, tokens: int) -> None:
        """Count this rank's rows, as far as `batch` has not; the other ranks are taken to be as far."""
        ahead, self._ahead = self._ahead, 0
        self._count(max(0, rows - ahead), 0 if ahead else tokens)

    def _count(self, rows: int, tokens: int) -> None:
        if self._task is None:
            return
        world = distributed.world()
        self._rows, self._tokens = self._rows + rows * world, self._tokens + tokens * world
        seconds = max(time.monotonic() - self._begun, 1e-9)
        rate = self._rows / seconds
        speed = f"{rate:,.{0 if rate >= 10 else 1}f} rows/s, {self._tokens / seconds:,.0f} tokens/s"
        self._task.update(self._task.done + rows * world, note=speed)
