"""A kept model state is whole or not there, is checked when it is fetched, and never leaves its folder."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import BinaryIO

import pytest

from dataflex.errors import CorruptionError, DataflexError, MismatchError
from dataflex.stores.files import LocalFiles
from dataflex.stores.record import seal, unseal
from dataflex.stores.root import StoreRoot
from tests.mortal import Killed, Mortal

LINEAGE = "0123456789abcdef" * 2
CONTENT = {"adapter_model.safetensors": b"w" * 5000, "rng/rank 0.json": b"{}", "empty": b""}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-5"
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("url", ["{}/root 根", "memory://states"])
def test_put_find_fetch(tmp_path: Path, checkpoint: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    states = StoreRoot(url.format(tmp_path)).states
    assert states.find(LINEAGE) is None
    with pytest.raises(MismatchError, match="holds no kept state"):
        states.fetch(LINEAGE, tmp_path / "scratch")
    assert states.put(LINEAGE, checkpoint, {"step": 5})
    again = StoreRoot(url.format(tmp_path)).states
    assert again.find(LINEAGE) == {"step": 5}
    assert content(again.fetch(LINEAGE, tmp_path / "scratch")) == CONTENT


def test_a_kept_state_does_not_change_with_its_source(tmp_path: Path, checkpoint: Path) -> None:
    states = StoreRoot(tmp_path / "root").states
    states.put(LINEAGE, checkpoint, {})
    with open(checkpoint / "empty", "r+b") as file:
        file.write(b"the trainer writes here again")
    assert content(states.fetch(LINEAGE, tmp_path / "scratch")) == CONTENT


def test_the_first_of_two_is_kept_and_the_other_leaves_nothing(tmp_path: Path, checkpoint: Path) -> None:
    class Late(LocalFiles):
        def _link(self, temporary: Path, path: Path) -> bool:
            StoreRoot(tmp_path / "root").states.put(LINEAGE, checkpoint, {"by": "the other"})
            return super()._link(temporary, path)

    assert not StoreRoot(Late(tmp_path / "root")).states.put(LINEAGE, checkpoint, {"by": "us"})
    assert not StoreRoot(tmp_path / "root").states.put(LINEAGE, checkpoint, {"by": "a third"})
    states = StoreRoot(tmp_path / "root").states
    assert states.find(LINEAGE) == {"by": "the other"}
    files = [path for path in (tmp_path / "root").rglob("*") if path.is_file()]
    assert len(files) == len(CONTENT) + 1


def test_a_crash_leaves_nothing_visible(tmp_path: Path, checkpoint: Path) -> None:
    for n in range(1, 100):
        files = Mortal(tmp_path / str(n), n)
        states = StoreRoot(tmp_path / str(n)).states
        try:
            StoreRoot(files).states.put(LINEAGE, checkpoint, {"step": 5})
        except Killed:
            linked = (tmp_path / str(n) / "states" / LINEAGE / "manifest.json").exists()
            assert states.find(LINEAGE) == ({"step": 5} if linked else None)
        else:
            break
        assert states.put(LINEAGE, checkpoint, {"step": 5}) != linked
        assert content(states.fetch(LINEAGE, tmp_path / "scratch")) == CONTENT
    assert 14 < n < 99


def test_damage_names_the_file(tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = StoreRoot(tmp_path / "root").states
    states.put(LINEAGE, checkpoint, {})
    kept = states.fetch(LINEAGE, tmp_path / "scratch")
    (kept / "empty").write_bytes(b"x")
    with pytest.raises(CorruptionError, match=r"empty is damaged.*run again"):
        states.fetch(LINEAGE, tmp_path / "scratch")
    (kept / "empty").unlink()
    with pytest.raises(CorruptionError, match="empty is missing"):
        states.fetch(LINEAGE, tmp_path / "scratch")
    manifest = tmp_path / "root" / "states" / LINEAGE / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    assert states.find(LINEAGE) is None
    assert "manifest.json is damaged" in caplog.text
    assert states.put(LINEAGE, checkpoint, {})
    assert content(states.fetch(LINEAGE, tmp_path / "scratch")) == CONTENT


NAMES = [
    "../../secret",
    "/etc/passwd",
    "a/../../b",
    "..",
    ".",
    "",
    "a//b",
    "C:\\x",
    "\\\\host\\x",
    "a\0b",
    "a" * 300,
    "./a",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_cannot_name_files_outside(tmp_path: Path, checkpoint: Path, name: str) -> None:
    states = StoreRoot(tmp_path / "root").states
    states.put(LINEAGE, checkpoint, {})
    path = tmp_path / "root" / "states" / LINEAGE / "manifest.json"
    manifest = unseal(path.read_bytes(), "it")
    path.write_bytes(seal({**manifest, "files": {name: "0" * 64}}))
    with pytest.raises(CorruptionError, match="outside its folder"):
        states.fetch(LINEAGE, tmp_path / "scratch")
    path.write_bytes(seal({**manifest, "folder": name}))
    with pytest.raises(CorruptionError, match="outside its folder"):
        states.fetch(LINEAGE, tmp_path / "scratch")


def test_a_planted_file_is_found(tmp_path: Path, checkpoint: Path) -> None:
    states = StoreRoot(tmp_path / "root").states
    states.put(LINEAGE, checkpoint, {})
    (states.fetch(LINEAGE, tmp_path / "scratch") / "optimizer.pt").symlink_to(tmp_path / "bomb")
    with pytest.raises(MismatchError, match=r"optimizer\.pt was not kept with this state"):
        states.fetch(LINEAGE, tmp_path / "scratch")


def test_a_full_disk_leaves_no_copies(tmp_path: Path, checkpoint: Path) -> None:
    class Full(LocalFiles):
        def _create(self, path: Path) -> BinaryIO:
            if len([p for p in self.root.rglob("*") if p.is_file()]) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super()._create(path)

    with pytest.raises(DataflexError, match="no space for"):
        StoreRoot(Full(tmp_path / "root")).states.put(LINEAGE, checkpoint, {})
    assert [path for path in (tmp_path / "root").rglob("*") if path.is_file()] == []


def test_what_cannot_be_kept_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    states = StoreRoot(tmp_path / "root").states
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataflexError, match="holds no file"):
        states.put(LINEAGE, tmp_path / "nothing", {})
    with pytest.raises(DataflexError, match="a lineage cannot be called"):
        states.put("../x", checkpoint, {})
    (checkpoint / "bad\nname").write_bytes(b"")
    with pytest.raises(DataflexError, match="cannot be kept under that name"):
        states.put(LINEAGE, checkpoint, {})
    assert not (tmp_path / "root").exists()
