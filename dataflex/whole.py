"""Files of a run's own folder that are written whole or not at all; stores have their own rules (`dataflex.stores`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside a file; what is written there is synced and replaces the file when the block ends.

    Folders that lead to it are made. An error leaves the old file; a kill at most a hidden one beside it.

    Args:
        path: the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # several processes may write the same
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
