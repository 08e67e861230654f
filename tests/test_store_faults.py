"""Crashes, full disks, lost power, racing writers: what is committed stays, and nothing half-written is ever seen."""

from __future__ import annotations

import errno
import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dataflex.errors import ConflictError, DataflexError
from dataflex.rows import KEY_DTYPE
from dataflex.stores.files import LocalFiles
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.remote_files import RemoteFiles
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values
from tests.looked_at import faults

pytestmark = pytest.mark.usefixtures("unsynced")

LAYOUT = Layout({"norm": "float32"}, 16, "float16")
WRITES = ("_create", "_sync", "_link", "_replace", "_sync_folder")
OPERATIONS = (*WRITES, "_unlink", "open", "names")


def fragment(number: int, seed: int = 0) -> Values:
    rng = np.random.default_rng([number, seed])
    keys = np.array([bytes([number, i]) + b"x" * 14 for i in range(8)], "S16").view(KEY_DTYPE)
    norm, vectors = rng.random(8, np.float32), rng.standard_normal((8, 16), np.float32)
    return Values(keys, np.zeros(8, np.uint8), {"norm": norm}, vectors)


class Faulty(LocalFiles):
    """Local files whose n-th operation, counting half a write as one, calls `fault` instead."""

    def __init__(self, root: Path, n: int, fault: Callable[[], None], operations: tuple[str, ...] = OPERATIONS):
        super().__init__(root)
        self.left = n
        self.fault = fault
        self.operations = operations
        self.done: list[str] = []

    def step(self, operation: str, path: Any = "") -> None:
        self.done.append(f"{operation} {Path(path).name if operation != '_unlink' else ''}".strip())
        if operation in self.operations or operation == "write":
            self.left -= 1
            if self.left == 0:
                self.fault()

    def _create(self, path: Path) -> BinaryIO:
        self.step("_create", path.parent)
        return HalfWriter(super()._create(path), self)  # type: ignore[return-value]

    def _sync(self, file: BinaryIO) -> None:
        self.step("_sync")
        super()._sync(file)

    def _link(self, temporary: Path, path: Path) -> bool:
        self.step("_link", path.parent)
        return super()._link(temporary, path)

    def _replace(self, temporary: Path, path: Path) -> None:
        self.step("_replace", path.parent)
        super()._replace(temporary, path)

    def _sync_folder(self, folder: Path) -> None:
        self.step("_sync_folder", folder)
        super()._sync_folder(folder)

    def _unlink(self, path: Path) -> None:
        self.step("_unlink", path)
        super()._unlink(path)

    def open(self, path: str):
        self.step("open", path)
        return super().open(path)

    def names(self, folder: str) -> list[str]:
        self.step("names", folder)
        return super().names(folder)


class HalfWriter(io.BufferedIOBase):
    """A file that, where the fault strikes while writing, holds half of what was written."""

    def __init__(self, file: BinaryIO, files: Faulty):
        self.file = file
        self.files = files

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.file.write(view[: len(view) // 2])
        self.file.flush()
        self.files.step("write")
        self.file.write(view[len(view) // 2 :])
        return len(view)

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()
        super().close()


def opened(files: LocalFiles | Path) -> ParquetStore:
    return StoreRoot(files).open("gradient", {"r": 1}, LAYOUT)


def fork(job: Callable[[int], None]) -> tuple[int, int]:
    """Run `job(pipe)` in a child; return its pid and the pipe's reading end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            job(writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    return pid, reading


def reap(pid: int, reading: int) -> tuple[int, bytes]:
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told


def check_and_finish(folder: Path, fragments: int, told: bytes) -> None:
    """What was reported as committed is there, nothing is damaged, and a rerun completes the store."""
    store = opened(folder)
    committed = store.committed_fragments()
    assert {f"f{n}" for n in told} <= set(committed)
    assert len(committed) <= len(told) + 1  # the one in flight may have made it
    assert faults(store) == []
    for n in range(fragments):
        assert set(store.contains(fragment(n).keys)) == {f"f{n}" in committed}
        store.append(f"f{n}", fragment(n))
    for n in range(fragments):
        expected = fragment(n)
        found = store.read(expected.keys)
        np.testing.assert_array_equal(found.scalars["norm"], expected.scalars["norm"])
        assert found.vectors is not None
        assert expected.vectors is not None
        np.testing.assert_allclose(found.vectors, expected.vectors, atol=2e-3)
    assert store.rows == 8 * fragments


def test_a_crash_at_every_single_operation(tmp_path: Path) -> None:
    def write(files: LocalFiles, pipe: int) -> None:
        store = opened(files)
        for n in range(3):
            store.append(f"f{n}", fragment(n))
            os.write(pipe, bytes([n]))

    for n in range(1, 1000):
        folder = tmp_path / str(n)
        files = Faulty(folder, n, lambda: os._exit(137))
        code, told = reap(*fork(lambda pipe, files=files: write(files, pipe)))  # type: ignore[misc]
        assert code in (0, 137)
        check_and_finish(folder, 3, told)
        if code == 0:
            break
    assert 50 < n < 999


def test_no_space_at_every_single_write(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for n in range(1, 1000):
        folder = tmp_path / str(n)
        files = Faulty(folder, n, full, WRITES)
        told, refused = b"", ""
        try:
            store = opened(files)
            for number in range(2):
                store.append(f"f{number}", fragment(number))
                told += bytes([number])
        except DataflexError as error:
            refused = str(error)
        assert files.left > 0 or (f"no space for {folder}" in refused and "bytes free" in refused)
        left = list(folder.rglob("tmp/*")) if folder.exists() else []
        assert left == []
        check_and_finish(folder, 2, told)
        if files.left > 0:
            break
    assert 30 < n < 999


def test_a_real_file_size_limit_is_explained(tmp_path: Path) -> None:
    def write(pipe: int) -> None:
        import resource

        store = opened(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        try:
            store.append("f0", fragment(0))
        except DataflexError as error:
            os.write(pipe, str(error).encode())

    code, told = reap(*fork(write))
    assert (code, b"no space for" in told) == (0, True), told
    assert list(tmp_path.rglob("tmp/*")) == []
    check_and_finish(tmp_path, 1, b"")


def test_data_is_durable_before_the_log_names_it(tmp_path: Path) -> None:
    files = Faulty(tmp_path, 0, lambda: None)
    store = opened(files)
    files.done.clear()
    store.append("f0", fragment(0))
    done = [step for step in files.done if not step.startswith(("open", "names"))]
    put = ["_create tmp", "write", "_sync"]
    folder = Path(store.path).name
    assert done == [
        *[f"_sync_folder {folder}"],  # the new folder data/ itself
        *put,
        *["_replace data", "_sync_folder data", "_unlink"],
        *[f"_sync_folder {folder}"],  # the new folder log/
        *put,
        *["_link log", "_sync_folder log", "_unlink"],
    ]


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """Each writer dies within two commits of the zeroth to third that it reported, however slow the machine is."""
    rng = np.random.default_rng(int(time.time()))
    fragments, kills, commit = 24, 0, 1.0

    def write(folder: Path, pipe: int) -> None:
        store = opened(folder)
        for n in range(fragments):
            if not store.contains(fragment(n).keys).all():
                store.append(f"f{n}", fragment(n))
                os.write(pipe, bytes([n]))

    store = opened(tmp_path / "timed")
    for n in range(5):  # the first also imports what writing needs
        begun = time.monotonic()
        store.append(f"f{n}", fragment(n))
        commit = min(commit, time.monotonic() - begun)
    for number in range(6):
        folder, told = tmp_path / str(number), b""
        store = opened(folder)
        while len(store.committed_fragments()) < fragments:
            pid, reading = fork(lambda pipe, folder=folder: write(folder, pipe))  # type: ignore[misc]
            for _ in range(rng.integers(4)):
                told += os.read(reading, 1)
            time.sleep(rng.uniform(0, 2 * commit))
            os.kill(pid, signal.SIGKILL)
            code, more = reap(pid, reading)
            told += more
            kills += code == -signal.SIGKILL
            store = opened(folder)
            assert {f"f{n}" for n in told} <= set(store.committed_fragments())
            assert faults(store) == []
        assert store.rows == 8 * fragments
    assert kills > 10


@pytest.mark.parametrize("writers", [2, 4])
def test_writers_of_the_same_fragments_all_succeed(tmp_path: Path, writers: int) -> None:
    def write(pipe: int, seed: int) -> None:
        store = opened(tmp_path)
        for n in range(10):
            os.write(pipe, bytes([store.append(f"f{n}", fragment(n, seed))]))

    children = [fork(lambda pipe, seed=seed: write(pipe, seed)) for seed in range(writers)]  # type: ignore[misc]
    told = [reap(*child) for child in children]
    assert [code for code, _ in told] == [0] * writers
    won = np.array([list(kept) for _, kept in told])
    assert won.sum(axis=0).tolist() == [1] * 10
    store = opened(tmp_path)
    for n in range(10):
        expected = fragment(n, int(won[:, n].argmax()))
        np.testing.assert_array_equal(store.read(expected.keys).scalars["norm"], expected.scalars["norm"])
    assert (store.rows, faults(store)) == (80, [])


class Late(LocalFiles):
    """Files on which another writer commits the fragment between our look and our commit."""

    def _link(self, temporary: Path, path: Path) -> bool:
        if path.parent.name == "log":
            opened(Path(self.url)).append("f0", OTHER)
        return super()._link(temporary, path)


OTHER = fragment(1)


def test_a_lost_race_with_other_rows_is_a_conflict(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(ConflictError, match="fragment f0 was committed with other rows"):
        opened(Late(tmp_path)).append("f0", fragment(0))
    assert opened(tmp_path).contains(OTHER.keys).all()


class LostAnswer(MemoryFileSystem):  # type: ignore[misc]
    """An object store that creates the file, and whose answer gets lost: the client's own retry finds it taken."""

    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value, mode=mode)
        if mode == "create" and "/tmp/" not in path:
            super().pipe_file(path, value, mode=mode)


class NotAtomic(MemoryFileSystem):  # type: ignore[misc]
    """An object store that does not know conditional writes."""

    cachable = False

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value)


class LooksFirst(MemoryFileSystem):  # type: ignore[misc]
    """A file system that inherits fsspec's look-then-write."""

    cachable = False
    pipe_file = fsspec.AbstractFileSystem.pipe_file


def remote(fs: fsspec.AbstractFileSystem, name: str) -> RemoteFiles:
    files = RemoteFiles("memory://" + name)
    files.fs = fs
    return files


def test_a_lost_answer_is_told_from_another_writer() -> None:
    store = StoreRoot(remote(LostAnswer(), "lost")).open("gradient", {"r": 1}, LAYOUT)
    assert store.append("f0", fragment(0))
    assert store.rows == 8


@pytest.mark.parametrize("fs", [NotAtomic(), LooksFirst()])
def test_a_backend_without_atomic_creation_is_refused(fs: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(DataflexError, match="only if it is not there yet"):
        StoreRoot(remote(fs, "unsafe")).open("gradient", {"r": 1}, LAYOUT)
