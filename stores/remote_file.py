"""One file on an object store, read at random places."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

BUFFER = 4 << 20
"""Bytes of the least request: who reads on in small pieces should not wait for each."""


class RemoteFile(io.RawIOBase):
    """A file whose bytes are asked for as they are read.

    Args:
        size: of the file in bytes.
        read: returns the bytes from the first number to before the second.
    """

    def __init__(self, size: int, read: Callable[[int, int], bytes]):
        super().__init__()
        self.size = size
        self._read = read
        self._at = 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, and return the new position."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill as much of the buffer as there is left of the file."""
        stop = min(self._at + len(buffer), self.size)
        data = self._read(self._at, stop) if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
