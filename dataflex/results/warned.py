"""The warnings of a training, kept in its folder: who looks at the run later has not seen its terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from dataflex.redaction import without_secrets
from dataflex.results import opening
from dataflex.results.names import WARNINGS

_OURS = "dataflex"


@contextlib.contextmanager
def kept(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Write our own warnings inside the block to `dataflex_warnings.jsonl`, in place of those of an earlier launch.

    They wait for the first step: of a start that is refused nothing is written.

    Args:
        folder: of the run.
    """
    handler, logger = _Writer(Path(folder) / WARNINGS), logging.getLogger(_OURS)
    opening.at_first_step(handler.begin)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Writer(logging.Handler):
    def __init__(self, path: Path):
        super().__init__(logging.WARNING)
        self._path = path
        self._has_begun = False
        self._said: dict[str, str] = {}

    def begin(self, before: int) -> None:
        """Write what was warned of so far; from here on each warning is written as it comes."""
        self._has_begun = True
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        for line in self._said.values():
            self._append(line)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a warning that was not given before."""
        text = without_secrets(record.getMessage())
        if text in self._said:
            return
        self._said[text] = json.dumps({"logger": record.name, "level": record.levelname, "text": text})
        if self._has_begun:
            self._append(self._said[text])

    def _append(self, line: str) -> None:
        # A run does not end because what it warns of cannot be kept.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
