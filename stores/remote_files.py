"""Files on an object store, through fsspec."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa

from dataflex.errors import ConfigError, DataflexError, UnavailableError
from dataflex.faults import is_unreachable
from dataflex.stores.files import Files, Stored

_LONGEST = 300  # characters of a library's text

_MODIFIED = ("LastModified", "last_modified", "mtime")
"""What object stores call the time of writing in their listings: S3, Azure, Google Cloud."""


class RemoteFiles(Files):
    """Files on an object store or anything else that fsspec knows, where a file written is there at once and whole."""

    together = 32 << 20  # many requests are answered in the time of one

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        with self._told():
            self.fs, self._root = fsspec.core.url_to_fs(self.url)
        self._is_probed = False

    def create(self, path: str, data: bytes) -> bool:
        """Write a file if there is none of that name; say whether it was written."""
        if not self._is_probed:
            self._probe(f"{path.partition('/')[0]}/tmp/{uuid.uuid4().hex}")
            self._is_probed = True
        return self._create(path, data)

    @contextmanager
    def output(self, path: str) -> Iterator[BinaryIO]:
        """Give a binary file that is put at `path` when the block ends well."""
        with tempfile.NamedTemporaryFile() as file:  # on this machine: an exception in the block leaves nothing remote
            yield file  # type: ignore[misc]
            file.flush()
            with self._told(writes=True):
                self.fs.put_file(file.name, f"{self._root}/{path}")

    def exists(self) -> bool:
        """Say whether anything lies below the URL, or whether it is a bucket."""
        with self._told():
            self.fs.invalidate_cache()  # fsspec keeps listings, in which other writers' files would be missing
            return bool(self.fs.exists(self._root))

    def open(self, path: str) -> pa.NativeFile:
        """Open a file for random access."""
        with self._told():
            # A listing that was kept does not know what others have written since.
            self.fs.invalidate_cache(f"{self._root}/{path}")
            return pa.PythonFile(self.fs.open(f"{self._root}/{path}", "rb"), mode="r")

    def names(self, folder: str) -> list[str]:
        """List the names in a folder, sorted."""
        try:
            with self._told():
                self.fs.invalidate_cache(f"{self._root}/{folder}")
                found = self.fs.ls(f"{self._root}/{folder}", detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)

    def stored(self, folder: str) -> list[Stored]:
        """List every file below a folder, sorted by path."""
        with self._told():
            self.fs.invalidate_cache()
            found = dict(self.fs.find(f"{self._root}/{folder}".rstrip("/"), detail=True))
        listed = [(path.removeprefix(f"{self._root}/"), about) for path, about in found.items()]
        return sorted(
            (Stored(path, int(about["size"]), self._modified(path, about)) for path, about in listed),
            key=lambda file: file.path,
        )

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError), self._told():
            self.fs.rm_file(f"{self._root}/{path}")

    def prune(self, folder: str) -> None:
        """Do nothing: an object store has no folders that outlive their files."""

    def _modified(self, path: str, about: dict[str, Any]) -> float:
        found = next((about[name] for name in _MODIFIED if name in about), None)
        try:
            found = self.fs.modified(f"{self._root}/{path}") if found is None else found
        except NotImplementedError as error:
            raise DataflexError(
                f"{self.url} ({type(self.fs).__name__}) does not say when a file was written, so what a live writer "
                "is about to commit cannot be told from a leftover; remove files there by hand"
            ) from error
        return found.timestamp() if isinstance(found, datetime) else float(found)

    def _create(self, path: str, data: bytes) -> bool:
        try:
            with self._told(writes=True):
                self.fs.pipe_file(f"{self._root}/{path}", data, mode="create")
        except FileExistsError:
            return False
        return True

    def _probe(self, path: str) -> None:
        """Refuse a backend on which two writers could both create one file."""
        # The inherited one looks first and writes then: it passes the probe, and lets two writers win.
        inherited = getattr(self.fs.pipe_file, "__func__", None) is fsspec.AbstractFileSystem.pipe_file
        first, second = self._create(path, b"1"), self._create(path, b"2")
        self.remove(path)
        if inherited or not first or second:
            raise DataflexError(
                f"{self.url} ({type(self.fs).__name__}) cannot create a file only if it is not there yet, which "
                "commits need; use a local or shared folder, or an object store with conditional writes (S3, GCS)"
            )

    @contextmanager
    def _told(self, writes: bool = False) -> Iterator[None]:
        """Say in words what the server or its client library refuses; that a file is there or not is for the caller.

        Raises:
            ConfigError: the URL, what is there, or the right to use it is wrong.
            UnavailableError: the server does not answer.
        """
        try:
            yield
        except (DataflexError, MemoryError, FileExistsError, NotADirectoryError):
            raise
        # Each backend has its own client library, whose errors have no class in common.
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not writes:
                raise
            said = " ".join(str(error).split())[:_LONGEST] or "no reason given"
            where = f"{self.url}: {type(error).__name__}: {said}"
            if is_unreachable(error):
                raise UnavailableError(
                    f"{where}\n  see that the server runs and that the address is right; what was committed stays"
                ) from error
            raise ConfigError(
                f"{where}\n  expected a bucket or folder that can be {'written to' if writes else 'read'}; check the "
                "URL (dataflex.store), its options and your credentials"
            ) from error
