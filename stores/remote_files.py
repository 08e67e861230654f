"""Files on an object store, through fsspec."""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import itertools
import logging
import operator
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, BinaryIO, TypeVar

import fsspec
import pyarrow as pa

from dataflex.errors import ConfigError, DataflexError, Interrupted, UnavailableError
from dataflex.stores.extents import LONGEST, merged
from dataflex.stores.files import Extent, Files, Stored
from dataflex.stores.remote_file import BUFFER, RemoteFile
from dataflex.stores.retries import SECONDS, is_of, is_passing, persistently
from dataflex.stores.urls import BUCKETS

T = TypeVar("T")

PARALLEL = 32
"""Requests under way at a time where many parts are read."""
_SAID = 300  # characters of a library's text

_S3: dict[str, Any] = {
    "retries": {"mode": "standard", "total_max_attempts": 2},
    "max_pool_connections": PARALLEL,
    "connect_timeout": 5,
    "read_timeout": 15,
}
"""Settings of botocore. It repeats a request once by itself, so that a page of a listing or a part of a large upload
that fails does not cost the whole; what fails twice is repeated here, where there is a bound in time."""

_MODIFIED = ("LastModified", "last_modified", "mtime")
"""What object stores call the time of writing in their listings: S3, Azure, Google Cloud."""


class RemoteFiles(Files):
    """Files on an object store or anything else that fsspec knows, where a file written is there at once and whole."""

    together = 32 << 20  # many requests are answered in the time of one

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.patience = SECONDS
        """Seconds for which a request is repeated."""
        self._gone_until = 0.0
        self._protocol = self.url.partition("://")[0]
        self._is_probed = False
        with self._told():
            self.fs, self._root = fsspec.core.url_to_fs(self.url, **_options(self._protocol))
        if self._protocol in _OF_S3:
            self.fs.retries = 1  # s3fs has a loop around botocore's, and another around that for reads: 125 requests
        if self._protocol in _OF_GOOGLE:
            # It logs a traceback of all that it raises, as for a read behind the end of a file; `_told` has the words.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

    @contextmanager
    def output(self, path: str) -> Iterator[BinaryIO]:
        """Give a binary file that is put at `path` when the block ends well."""
        with tempfile.NamedTemporaryFile() as file:  # on this machine: an exception in the block leaves nothing remote
            yield file  # type: ignore[misc]
            file.flush()
            self._ask(lambda: self.fs.put_file(file.name, f"{self._root}/{path}"), writes=True)

    def exists(self) -> bool:
        """Say whether anything lies below the URL, or whether it is a bucket.

        Raises:
            ConfigError: there is no such bucket, or it may not be listed.
            UnavailableError: the server does not answer.
        """
        bucket = self._root.partition("/")[0]
        try:
            self._list("")
        except FileNotFoundError as error:
            # s3fs takes every error for an absent bucket, and its listing has said by now what is absent.
            is_s3 = self._protocol in _OF_S3
            if is_of(error, "NoSuchBucket") if is_s3 else self._protocol in BUCKETS and not self._has(bucket):
                raise ConfigError(
                    f"{self.url}: found no bucket {bucket!r}; expected one that is there; make it, or check the URL "
                    f"(dataflex.store){' and the endpoint' if is_s3 else ''}"
                ) from error
            return False
        except NotADirectoryError:
            return False
        return True

    def open(self, path: str) -> pa.NativeFile:
        """Open a file for random access."""
        about = self._ask(lambda: self.fs.info(f"{self._root}/{path}"), f"{self._root}/{path}")
        if about["type"] != "file":
            raise _absent(path)
        file = RemoteFile(int(about["size"]), lambda start, stop: self._read(path, start, stop))
        return pa.PythonFile(io.BufferedReader(file, BUFFER), mode="r")

    def names(self, folder: str) -> list[str]:
        """List the names in a folder, sorted."""
        try:
            found = self._list(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)

    def stored(self, folder: str) -> list[Stored]:
        """List every file below a folder, sorted by path."""
        top = f"{self._root}/{folder}".rstrip("/")
        found = self._ask(lambda: dict(self.fs.find(top, detail=True)), "")
        listed = [(path.removeprefix(f"{self._root}/"), about) for path, about in found.items()]
        return sorted(
            (Stored(path, int(about["size"]), self._modified(path, about)) for path, about in listed),
            key=lambda file: file.path,
        )

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            # Who tidies up after the server was gone for a minute does not wait another for it.
            is_gone = time.monotonic() < self._gone_until
            self._ask(lambda: self.fs.rm_file(f"{self._root}/{path}"), patience=0 if is_gone else None)

    def prune(self, folder: str) -> None:
        """Do nothing: an object store has no folders that outlive their files."""

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Return a file's first `limit` bytes. One request."""
        return self._read(path, 0, limit)

    def fetch(self, wanted: Sequence[Extent]) -> list[bytes | None]:
        """Read parts of files: those that are near each other in one request, and many requests at a time."""
        found: list[bytes | None] = [None] * len(wanted)
        asked = merged(wanted)

        def ask() -> None:
            extents = list(asked)
            paths, starts, stops = ([*each] for each in zip(*extents, strict=True))
            paths = [f"{self._root}/{path}" for path in paths]
            answers = self.fs.cat_ranges(paths, starts, stops, batch_size=PARALLEL, on_error="return")
            faults = []
            for extent, answer in zip(extents, answers, strict=True):
                if isinstance(answer, BaseException) and is_of(answer, 416):
                    answer = b""  # the part begins beyond the end of the file
                if isinstance(answer, bytes):
                    for number in asked[extent]:
                        _, start, stop = wanted[number]
                        begin = start - extent[1]
                        found[number] = answer[begin : None if stop is None else begin + stop - start]
                elif is_passing(answer) or not isinstance(answer, FileNotFoundError):
                    faults.append(answer)
                    continue
                del asked[extent]
            if faults:  # one that does not pass is told at once
                raise min(faults, key=is_passing)

        if asked:
            self._ask(ask)
        return found

    def sha256(self, path: str) -> str:
        """Return a file's SHA-256, in hexadecimal. One request for a file of less than 16 MiB."""
        hashing = hashlib.sha256()
        for start in itertools.count(0, LONGEST):
            piece = self._read(path, start, start + LONGEST)
            hashing.update(piece)
            if len(piece) < LONGEST:
                break
        return hashing.hexdigest()

    def _read(self, path: str, start: int, stop: int | None) -> bytes:
        [data] = self.fetch([(path, start, stop)])
        if data is None:
            raise _absent(self.name(path))
        return data

    def _has(self, bucket: str) -> bool:
        return bool(self._ask(lambda: self.fs.exists(bucket)))

    def _list(self, folder: str) -> list[str]:
        top = f"{self._root}/{folder}".rstrip("/")
        return list(self._ask(lambda: self.fs.ls(top, detail=False), top))

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

    def _put_new(self, path: str, data: bytes) -> bool:
        if not self._is_probed:
            self._probe(f"{path.partition('/')[0]}/tmp/{uuid.uuid4().hex}")
            self._is_probed = True
        return self._pipe_new(path, data)

    def _pipe_new(self, path: str, data: bytes) -> bool:
        try:
            self._ask(lambda: self.fs.pipe_file(f"{self._root}/{path}", data, mode="create"), writes=True)
        except FileExistsError:
            return False
        return True

    def _probe(self, path: str) -> None:
        """Refuse a backend on which two writers could both create one file."""
        # The inherited one looks first and writes then: it passes the probe, and lets two writers win.
        inherited = getattr(self.fs.pipe_file, "__func__", None) is fsspec.AbstractFileSystem.pipe_file
        self._pipe_new(path, b"1")
        is_replaced = self._pipe_new(path, b"2")
        [found] = self.fetch([(path, 0, None)])
        self.remove(path)
        if inherited or is_replaced or found != b"1":
            raise DataflexError(
                f"{self.url} ({type(self.fs).__name__}) cannot create a file only if it is not there yet, which "
                "commits need; use a local or shared folder, or an object store with conditional writes (S3, GCS)"
            )

    def _ask(
        self, call: Callable[[], T], listing: str | None = None, writes: bool = False, patience: float | None = None
    ) -> T:
        """Call what can be repeated, again while an error passes, and say in words what is left.

        Args:
            call: asks the server.
            listing: what it may know from a listing that fsspec kept, in which other writers' files would be missing.
            writes: whether it writes.
            patience: seconds for which it is asked again; `self.patience` by default.
        """
        patience = self.patience if patience is None else patience
        if isinstance(sys.exc_info()[1], KeyboardInterrupt | Interrupted):
            patience = 0  # whoever was asked to stop tidies up at once or not at all
        with self._told(writes, patience):
            if listing is not None:
                self.fs.invalidate_cache(listing or None)
            return persistently(call, patience)

    @contextmanager
    def _told(self, writes: bool = False, patience: float = 0) -> Iterator[None]:
        """Say in words what the server or its client library refuses; that a file is there or not is for the caller.

        Raises:
            ConfigError: the URL, what is there, or the right to use it is wrong.
            UnavailableError: the server does not answer, or with errors that should pass and did not.
        """
        try:
            yield
        except (DataflexError, MemoryError, FileExistsError, NotADirectoryError):
            raise
        # Each backend has its own client library, whose errors have no class in common.
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not writes:
                raise
            said = " ".join(str(error).split())[:_SAID] or "no reason given"
            where = f"{self.url}: {type(error).__name__}: {said}"
            if is_passing(error):
                self._gone_until = time.monotonic() + self.patience
                advice = "see that the server runs and that the address is right; what was committed stays"
                again = f"asked again for up to {patience:.0f} s; " if patience else ""
                raise UnavailableError(f"{where}\n  {again}{advice}") from error
            raise ConfigError(
                f"{where}\n  expected a bucket or folder that can be {'written to' if writes else 'read'}; check the "
                "URL (dataflex.store), its options and your credentials"
            ) from error


_OF_S3 = ("s3", "s3a")
_OF_GOOGLE = ("gs", "gcs")


def _options(protocol: str) -> dict[str, Any]:
    """Return what the file system is made with, beside what fsspec's own configuration says."""
    if protocol in _OF_GOOGLE:
        if any("requests_timeout" in fsspec.config.conf.get(name, {}) for name in _OF_GOOGLE):
            return {}
        import aiohttp

        # Without these gcsfs waits for ever; one bound for a whole request would be too short for a large part.
        bounds = aiohttp.ClientTimeout(sock_connect=_S3["connect_timeout"], sock_read=_S3["read_timeout"])
        return {"requests_timeout": bounds}
    if protocol not in _OF_S3:
        return {}
    theirs = (fsspec.config.conf.get(name, {}).get("config_kwargs", {}) for name in _OF_S3)
    return {"config_kwargs": functools.reduce(operator.or_, theirs, _S3)}


def _absent(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
