"""The warnings of a training, kept in its folder: who looks at the run later has not seen its terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

FILE = "dataflex_warnings.jsonl"
_OURS = "dataflex"


@contextlib.contextmanager
def kept(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Write our own warnings inside the block to `dataflex_warnings.jsonl`, in place of those of an earlier launch.

    Args:
        folder: of the run.
    """
    path = Path(folder) / FILE
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    handler, logger = _Writer(path), logging.getLogger(_OURS)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Writer(logging.Handler):
    def __init__(self, path: Path):
        super().__init__(logging.WARNING)
        self._path = path
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Append a warning that was not given before."""
        text = record.getMessage()
        if text in self._said:
            return
        self._said.add(text)
        # A run does not end because what it warns of cannot be kept.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps({"logger": record.name, "level": record.levelname, "text": text}) + "\n")
