"""What was read of an object store is not read again, and whatever lies in the cache, no value changes."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dataflex.errors import ConfigError, CorruptionError
from dataflex.rows import KEY_DTYPE
from dataflex.stores.files import Extent, LocalFiles
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.part_cache import PartCache, part_cache
from dataflex.stores.root import StoreRoot, open_files
from dataflex.stores.values import Layout, Values

pytestmark = pytest.mark.usefixtures("unsynced")

LAYOUT = Layout({"norm": "float32"}, 1024, "int8")
ROWS, FRAGMENTS = 100, 5


class Far(LocalFiles):
    """Files that count what is read of them, as those of an object store would cost."""

    def __init__(self, root: Path, cache: PartCache):
        super().__init__(root)
        self.cache = cache
        self.asked = 0

    def fetch(self, wanted: Sequence[Extent]) -> list[bytes | None]:
        found = super().fetch(wanted)
        self.asked += sum(
            len(part or b"") for (path, _, _), part in zip(wanted, found, strict=True) if "/data/" in path
        )
        return found


def fragment(number: int) -> Values:
    rng = np.random.default_rng(number)
    keys = np.frombuffer(rng.bytes(16 * ROWS), KEY_DTYPE)
    vectors = rng.standard_normal((ROWS, 1024), np.float32)
    return Values(keys, np.zeros(ROWS, np.uint8), {"norm": np.linalg.norm(vectors, axis=1)}, vectors)


KEYS = np.concatenate([fragment(number).keys for number in range(FRAGMENTS)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = StoreRoot(tmp_path / "root").open("gradient", {"r": 1}, LAYOUT)
    for number in range(FRAGMENTS):
        store.append(f"f{number}", fragment(number))
    return tmp_path / "root"


def opened(root: Path, limit: int = 1 << 30) -> tuple[ParquetStore, Far]:
    """Open the store as a new process would."""
    files = Far(root, PartCache(root.parent / "cache", limit))
    return StoreRoot(files).open("gradient", {"r": 1}, LAYOUT), files


def assert_right(store: ParquetStore, root: Path) -> None:
    found, expected = store.read(KEYS), StoreRoot(root).open("gradient", {"r": 1}, LAYOUT).read(KEYS)
    np.testing.assert_array_equal(found.vectors, expected.vectors)
    np.testing.assert_array_equal(found.scalars["norm"], expected.scalars["norm"])


def test_nothing_is_read_twice(root: Path) -> None:
    store, files = opened(root)
    assert_right(store, root)
    assert files.asked > len(KEYS) * 1024
    files.asked = 0
    assert_right(store, root)
    assert files.asked == 0
    again, files = opened(root)
    assert_right(again, root)
    assert files.asked == 0


def test_only_what_is_lacking_is_read(root: Path) -> None:
    store, files = opened(root)
    store.contains(KEYS)
    files.asked = 0
    store.read(KEYS[::50], columns=[])  # two rows of each fragment, so two of its seven parts
    some = files.asked
    files.asked = 0
    store.read(KEYS, columns=[])
    assert some + files.asked == len(KEYS) * (1024 + 4)
    assert_right(store, root)


def test_whatever_lies_in_the_cache_no_value_changes(root: Path) -> None:
    store, _ = opened(root)
    assert_right(store, root)
    rng = np.random.default_rng(0)
    for number in range(40):
        path = rng.choice(sorted((root.parent / "cache").iterdir()))
        data = bytearray(path.read_bytes())
        match number % 4:
            case 0:
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            case 1:
                del data[rng.integers(len(data)) :]
            case 2:
                data[:] = rng.bytes(len(data) + 50)
            case 3:
                data[:] = bytes(len(data))
        path.write_bytes(data)
        store, _ = opened(root)
        assert_right(store, root)


def test_damage_of_the_store_is_not_kept(root: Path) -> None:
    path = sorted((root / StoreRoot(root).stores()[0].folder / "data").iterdir())[0]
    intact = path.read_bytes()
    data = bytearray(intact)
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)
    store, _ = opened(root)
    with pytest.raises(CorruptionError, match=path.name):
        store.read(KEYS)
    path.write_bytes(intact)
    store, _ = opened(root)
    assert_right(store, root)


def test_the_oldest_files_make_room(root: Path) -> None:
    store, files = opened(root, limit=250_000)  # two files of five
    for number in range(FRAGMENTS):
        store.read(fragment(number).keys, columns=[])
        for path in (root.parent / "cache").iterdir():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))
    held = sum(512 * path.stat().st_blocks for path in (root.parent / "cache").iterdir())
    assert 0 < held <= 250_000 + 110_000
    files.asked = 0
    store.read(fragment(FRAGMENTS - 1).keys, columns=[])
    assert files.asked == 0  # the newest stayed
    assert_right(store, root)


def test_a_folder_that_cannot_be_written_to_ends_the_caching_alone(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root.parent / "cache").write_text("a file where the folder belongs")
    store, _ = opened(root)
    assert_right(store, root)
    assert_right(store, root)
    assert caplog.text.count("is not kept in") == 1


def test_the_compacted_log_is_read_once(root: Path) -> None:
    store = StoreRoot(root).open("gradient", {"r": 1}, LAYOUT)
    for number in range(FRAGMENTS, FRAGMENTS + 40):
        values = fragment(number)
        store.append(f"f{number}", values)
    assert store.compact()
    reads: list[str] = []

    class Noting(Far):
        def read(self, path: str, limit: int | None = None) -> bytes:
            reads.append(path)
            return super().read(path, limit)

    for expected in (1, 1):
        files = Noting(root, PartCache(root.parent / "cache", 1 << 30))
        assert StoreRoot(files).open("gradient", {"r": 1}, LAYOUT).contains(KEYS).all()
        assert sum("/derived/" in path for path in reads) == expected


def test_folder_and_limit_are_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAFLEX_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("DATAFLEX_CACHE_GB", "0.5")
    files = open_files("memory://dataflex-cached")
    assert files.cache is not None
    files.cache.keep("0" * 64, 3, b"abc")
    assert (tmp_path / "here" / ("0" * 64)).read_bytes() == b"\0\0\0abc"
    assert open_files(tmp_path).cache is None  # a folder is near already
    monkeypatch.setenv("DATAFLEX_CACHE_GB", "0")
    assert part_cache() is None
    for said in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("DATAFLEX_CACHE_GB", said)
        with pytest.raises(ConfigError, match="DATAFLEX_CACHE_GB"):
            open_files("memory://dataflex-cached")


@pytest.mark.parametrize("name", ["../../victim", "/etc/victim", "", "0" * 63, "0" * 64 + "\n", "0" * 63 + "G"])
def test_what_is_no_sha256_names_no_file(tmp_path: Path, name: str) -> None:
    cache = PartCache(tmp_path / "a" / "cache", 1 << 30)
    with pytest.raises(CorruptionError, match="no SHA-256"):
        cache.keep(name, 0, b"x")
    with pytest.raises(CorruptionError, match="no SHA-256"):
        cache.read(name)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ("0" * 64)).symlink_to(tmp_path / "victim")
    PartCache(tmp_path / "cache", 1 << 30).keep("0" * 64, 0, b"theirs")
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_what_is_no_file_of_its_own_is_left_alone(root: Path) -> None:
    """A pipe, whose other end nobody is at; a folder; a socket; a file that has another name as well."""
    cache = root.parent / "cache"
    store, far = opened(root)
    assert_right(store, root)
    (names := [path.name for path in cache.iterdir()]).sort()
    assert len(names) == FRAGMENTS
    for path in cache.iterdir():
        path.unlink()
    victim = root.parent / "victim"
    victim.write_bytes(b"mine")
    os.mkfifo(cache / names[0])
    (cache / names[1]).mkdir()
    os.link(victim, cache / names[2])
    with socket.socket(socket.AF_UNIX) as there, contextlib.chdir(cache):
        there.bind(names[3])
    for _ in range(2):
        store, far = opened(root)
        assert_right(store, root)
    assert far.asked > 0
    assert victim.read_bytes() == b"mine"
    assert (cache / names[4]).is_file()  # the others are kept all the same


def test_what_is_called_otherwise_is_not_removed(tmp_path: Path) -> None:
    others = tmp_path / "checkpoint.safetensors"
    others.write_bytes(bytes(500_000))
    os.utime(others, (0, 0))
    cache = PartCache(tmp_path, 100_000)
    for number in range(30):
        cache.keep(f"{number:064x}", 0, bytes(8192))
    assert others.stat().st_size == 500_000
    assert 2 <= len(list(tmp_path.iterdir())) <= 16


def test_another_process_that_makes_room_too_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(30):
        (tmp_path / f"{number:064x}").write_bytes(bytes(8192))
    unlink = os.unlink

    def twice(path: Path) -> None:
        unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", twice)
    cache = PartCache(tmp_path, 100_000)
    cache.keep("f" * 64, 0, b"abc")
    assert cache.read("f" * 64) == b"abc"
    assert not caplog.records


def test_a_limit_that_is_set_to_nothing_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAFLEX_CACHE_GB", "")
    assert part_cache() is not None
