"""Pieces of data files, many at once, each held against its digests in the log, and kept in a cache if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dataflex.errors import CorruptionError
from dataflex.stores.contents import Chunk, Span
from dataflex.stores.files import Files
from dataflex.stores.part_cache import PartCache
from dataflex.stores.problem import CURE


@dataclass(frozen=True)
class Piece:
    """Some parts of a column in one data file.

    Attributes:
        file: SHA-256 of the data file, which names it.
        chunk: the column in one row group.
        span: the parts.
    """

    file: str
    chunk: Chunk
    span: Span

    @property
    def extent(self) -> tuple[int, int]:
        """Where they begin and end, in bytes from the beginning of the file."""
        return self.chunk.extent(self.span)


def read_pieces(files: Files, folder: str, pieces: Sequence[Piece]) -> list[bytes]:
    """Return the bytes of pieces.

    Args:
        files: the root's files.
        folder: where the data files lie.
        pieces: what is wanted.

    Raises:
        CorruptionError: a data file is missing or damaged.
    """
    if files.cache is None:
        return _stored(files, folder, pieces)
    return _cached(files.cache, files, folder, pieces)


def path_of(folder: str, file: str) -> str:
    """Return the path of a data file."""
    return f"{folder}/{file}.parquet"


def missing(name: str) -> CorruptionError:
    """Return the error that says that a data file is not there."""
    return CorruptionError(f"{name} is missing although it was committed; {CURE}")


def _cached(cache: PartCache, files: Files, folder: str, pieces: Sequence[Piece]) -> list[bytes]:
    """Return what the cache has, and of each piece the parts that it lacks, which it has from then on."""
    kept = [cache.read(piece.file, *piece.extent) for piece in pieces]
    lacking = [
        [replace(piece, span=span) for span in piece.chunk.wrong(piece.span, data)]
        for piece, data in zip(pieces, kept, strict=True)
    ]
    fresh = iter(_stored(files, folder, [part for parts in lacking for part in parts]))
    found = []
    for piece, data, parts in zip(pieces, kept, lacking, strict=True):
        begin, end = piece.extent
        whole = bytearray(data.ljust(end - begin, b"\0"))
        for part in parts:
            start, stop = part.extent
            read = next(fresh)
            cache.keep(piece.file, start, read)
            whole[start - begin : stop - begin] = read
        found.append(bytes(whole))
    return found


def _stored(files: Files, folder: str, pieces: Sequence[Piece]) -> list[bytes]:
    found = files.fetch([(path_of(folder, piece.file), *piece.extent) for piece in pieces])
    right = []
    for piece, data in zip(pieces, found, strict=True):
        name = files.name(path_of(folder, piece.file))
        if data is None:
            raise missing(name)
        if piece.chunk.wrong(piece.span, data):
            start, stop = piece.extent
            raise CorruptionError(f"{name} is damaged: bytes {start} to {stop} are not those committed; {CURE}")
        right.append(data)
    return right
