"""Storage as a store sees it: whole files under one root, written so that they appear entirely or not at all.

Every byte that a store writes or reads passes here, so a test that fails the n-th operation meets every fault.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa

from dataflex.errors import CorruptionError, DataflexError
from dataflex.stores.part_cache import PartCache


@dataclass(frozen=True)
class Stored:
    """A file in storage.

    Attributes:
        path: relative to the root.
        bytes: its size.
        modified: when it was written, in seconds since 1970, by the storage's clock.
    """

    path: str
    bytes: int
    modified: float


Extent = tuple[str, int, int | None]
"""Part of a file: its path, and the bytes from the first number to before the second; None: to the end."""


class Files(ABC):
    """Files under `url`. Paths are relative to it, with `/`; the first part of each is a store's folder."""

    url: str
    cache: PartCache | None = None
    """Keeps what was read of files that never change; None where they are near."""
    together: int = 1 << 20
    """Bytes to ask `fetch` for at a time: all are in memory at once."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a file if there is none of that name, atomically, durable on return; say whether these bytes are there.

        The answer to a write that went well can get lost on the way, and the next try then finds the file taken. So
        what must be told from another writer's holds a value that no other writer has.
        """
        if self._put_new(path, data):
            return True
        try:
            return self.read(path, len(data) + 1) == data
        except (FileNotFoundError, CorruptionError):
            return False

    @abstractmethod
    def _put_new(self, path: str, data: bytes) -> bool:
        """Write a file if there is none of that name; say whether this very call is known to have written it."""

    @abstractmethod
    def output(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Give a binary file to write to; when the `with` block ends well it replaces what is at `path`, durably."""

    @abstractmethod
    def exists(self) -> bool:
        """Say whether the root is there: a folder or, on an object store, anything below its URL."""

    @abstractmethod
    def open(self, path: str) -> pa.NativeFile:
        """Open a file for random access. Raises FileNotFoundError, or CorruptionError if something else lies there."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """List the names in a folder, sorted; none if there is no such. Raises CorruptionError if it is no folder."""

    @abstractmethod
    def stored(self, folder: str) -> list[Stored]:
        """List every file at any depth below a folder (`""`: the root), sorted by path; none if there is no folder.

        A folder with the name of a document is listed as if it were that document, so that a check sees the fault.
        """

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file; one that is not there is no error, and a folder in its place is put aside."""

    @abstractmethod
    def prune(self, folder: str) -> None:
        """Remove a folder if there is no file below it, where storage has folders at all."""

    def misplaced(self, path: str, expected: Literal["file", "folder"]) -> str | None:
        """Say what lies at a path instead of the expected file or folder; None if that, or nothing, is there."""
        return None  # an object store has no folders: a name can be both

    def put_aside(self, path: str) -> None:
        """Give what lies at a path, whatever it is, another name beside it: `<path>.aside`."""
        raise NotImplementedError  # where nothing can be misplaced

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Return a file's first `limit` bytes. Raises FileNotFoundError."""
        with self.open(path) as file:
            return bytes(file.read(limit))

    def fetch(self, wanted: Sequence[Extent]) -> list[bytes | None]:
        """Read parts of files, many at a time where that is faster; None where there is no such file.

        A part that reaches beyond the end of its file comes back shorter.
        """
        found: list[bytes | None] = []
        for path, some in itertools.groupby(wanted, key=lambda extent: extent[0]):
            extents = list(some)
            try:
                with self.open(path) as file:
                    size = file.size()
                    for _, start, stop in extents:
                        file.seek(min(start, size))
                        # What the caller wants may be more than memory, if it believed a crafted log.
                        found.append(bytes(file.read(max(0, (size if stop is None else min(stop, size)) - start))))
            except FileNotFoundError:
                found += [None] * len(extents)
        return found

    def sha256(self, path: str) -> str:
        """Return a file's SHA-256, in hexadecimal. Raises FileNotFoundError."""
        with self.open(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def size(self, path: str) -> int | None:
        """Return a file's bytes where to know them costs no request; None elsewhere, and where there is none."""
        return None

    def name(self, path: str) -> str:
        """Name a file for people."""
        return f"{self.url}/{path}"


class HashingWriter:
    """Passes on what is written to a file and takes its SHA-256 on the way, so that the file need not be read again."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write to the file."""
        self.sha256.update(data)
        return self.file.write(data)


class LocalFiles(Files):
    """Files on a POSIX file system, shared between nodes or not.

    A file is written under `tmp/`, synced, and then linked (fails if the name is taken) or renamed to its name; the
    folder is synced last. A crash leaves at most a file under `tmp/`, which nothing reads.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)
        self._synced: set[Path] = set()

    def _put_new(self, path: str, data: bytes) -> bool:
        with self._writing(path) as (temporary, file):
            file.write(data)
            self._sync(file)
            created = self._link(temporary, self.root / path)
            # Also where another writer was first: what we rely on must outlive a power cut, whoever wrote it.
            self._sync_folder((self.root / path).parent)
            return created

    @contextmanager
    def output(self, path: str) -> Iterator[BinaryIO]:
        """Give a binary file that is put at `path` when the block ends well."""
        with self._writing(path) as (temporary, file):
            yield file
            self._sync(file)
            self._replace(temporary, self.root / path)
            self._sync_folder((self.root / path).parent)

    def exists(self) -> bool:
        """Say whether the root is a folder."""
        return self.root.is_dir()

    def open(self, path: str) -> pa.NativeFile:
        """Open a file for random access."""
        if what := self.misplaced(path, "file"):  # asked first: opening a FIFO waits for ever
            raise CorruptionError(what)
        try:
            return pa.OSFile(str(self.root / path))
        except NotADirectoryError as error:  # a file lies where a folder above belongs: to the caller, nothing is there
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root / path)) from error

    def size(self, path: str) -> int | None:
        """Return a file's bytes, or None."""
        try:
            return os.stat(self.root / path).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str) -> list[str]:
        """List the names in a folder, sorted."""
        try:
            return sorted(os.listdir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError) as error:
            if what := self.misplaced(folder, "folder"):
                raise CorruptionError(what) from error
            return []

    def misplaced(self, path: str, expected: Literal["file", "folder"]) -> str | None:
        """Say what lies where a file or folder belongs."""
        try:
            mode = os.stat(self.root / path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            # Asked again, because another process may have made it meanwhile.
            if not os.path.islink(self.root / path) or os.path.exists(self.root / path):
                return None
            found = "a link to nothing"
        else:
            if stat.S_ISDIR(mode) if expected == "folder" else stat.S_ISREG(mode):
                return None
            found = next((kind for test, kind in _KINDS.items() if test(mode)), "a device")
        return (
            f"{self.name(path)} is {found}; expected a {expected}. `dataflex store repair` takes it out of the way, "
            "what it holds kept as *.aside"
        )

    def put_aside(self, path: str) -> None:
        """Give what lies at a path another name beside it."""
        names = (f"{path}.aside{number or ''}" for number in itertools.count())
        os.rename(self.root / path, self.root / next(name for name in names if not os.path.lexists(self.root / name)))

    def stored(self, folder: str) -> list[Stored]:
        """List every file below a folder, sorted by path."""
        found, top = [], len(str(self.root)) + 1
        for parent, folders, names in os.walk(self.root / folder, onerror=_raise_unless_gone):
            # Documents lie three names deep at most; below that a kept state may have folders of any name.
            depth = parent.count(os.sep, top) + 1 if len(parent) >= top else 0
            misplaced = [name for name in folders if name.endswith(".json") and 0 < depth < 3]
            folders[:] = [name for name in folders if name not in misplaced]
            for path in (os.path.join(parent, name) for name in (*names, *misplaced)):
                with suppress(FileNotFoundError):  # removed between the listing and now
                    about = os.lstat(path)
                    found.append(Stored(path[top:].replace(os.sep, "/"), about.st_size, about.st_mtime))
        return sorted(found, key=lambda file: file.path)

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        try:
            if (self.root / path).is_dir() and not (self.root / path).is_symlink():
                self.put_aside(path)  # what a folder in a file's place holds is not ours, so it is not deleted
            else:
                self._unlink(self.root / path)
        except OSError as error:
            explained = _explained(error, self.root / path, 0)
            if explained is None:
                raise
            raise explained from error

    def prune(self, folder: str) -> None:
        """Remove a folder and those in it, from the deepest on, as far as they are empty."""
        for parent, _, _ in os.walk(self.root / folder, topdown=False):
            with suppress(OSError):  # not empty, or gone
                os.rmdir(parent)
        self._synced = {made for made in self._synced if not made.is_relative_to(self.root / folder)}

    @contextmanager
    def _writing(self, path: str) -> Iterator[tuple[Path, BinaryIO]]:
        # In the store's own folder, not in /tmp: neither a link nor a rename crosses file systems, and a store may be
        # a link to another disk.
        temporary = self.root / Path(path).parts[0] / "tmp" / uuid.uuid4().hex
        size = 0
        try:
            self._make_folder((self.root / path).parent)
            self._make_folder(temporary.parent)
            with self._create(temporary) as file:
                try:
                    yield temporary, file
                finally:
                    size = file.tell()
        except OSError as error:
            explained = _explained(error, self.root / path, size)
            if explained is None:
                raise
            raise explained from error
        finally:
            with suppress(OSError):  # a file under tmp/ is never read; the error worth telling is the write's
                self._unlink(temporary)

    def _make_folder(self, folder: Path) -> None:
        # Not `mkdir(parents=True)` alone: each new folder's name must outlive a power cut too, so its parent is synced.
        if folder in self._synced:
            return
        if folder != self.root:
            self._make_folder(folder.parent)
        folder.mkdir(parents=folder == self.root, exist_ok=True)
        self._sync_folder(folder.parent)
        self._synced.add(folder)

    def _create(self, path: Path) -> BinaryIO:
        return open(path, "xb")

    def _sync(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())

    def _link(self, temporary: Path, path: Path) -> bool:
        try:
            os.link(temporary, path)  # not a rename, which silently replaces what another writer committed
        except FileExistsError:
            return False
        return True

    def _replace(self, temporary: Path, path: Path) -> None:
        os.replace(temporary, path)

    def _sync_folder(self, folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


_KINDS = {stat.S_ISDIR: "a folder", stat.S_ISREG: "a file", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
_NO_FOLDER = (
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.EMLINK, errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY,
    errno.EOPNOTSUPP, errno.EPERM, errno.EROFS,
)  # fmt: skip
"""How file systems say that no store can be kept there; ENOENT is among them, as /proc answers with it."""


def _raise_unless_gone(error: OSError) -> None:
    """Keep `os.walk` from passing over a folder that it may not read, as if nothing were there."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _explained(error: OSError, path: Path, size: int) -> DataflexError | None:
    """Say in words what the usual refusals of a file system mean; None for another error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        existing = next((p for p in path.parents if p.exists()), path)
        free = shutil.disk_usage(existing).free
        return DataflexError(
            f"no space for {path}: {error.strerror} after {size} bytes, {free} bytes free on the file system; "
            "make room or raise the quota and run again: what is committed stays"
        )
    if error.errno in _NO_FOLDER:
        return DataflexError(
            f"cannot write {path}: {error.strerror}; a store needs a folder that can be written and a file system with "
            "hard links"
        )
    return None
