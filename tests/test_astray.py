"""What lies where a file or folder belongs and is of another kind is damage: told, mended, no reason to forget."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import CorruptionError
from dataflex.stores.files import LocalFiles
from dataflex.stores.record import unseal
from dataflex.stores.root import StoreRoot
from dataflex.stores.runs import read_runs
from dataflex.stores.upkeep.gc import Scope, plan
from dataflex.stores.upkeep.inspection import inspect, refuse, repair
from tests.command import run
from tests.roots import LAYOUT, LINEAGE, age, make_state, make_store, record, values

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One of everything, older than the grace period, all of it in use."""
    files = LocalFiles(tmp_path / "root")
    store = make_store(files, 1)
    make_state(files, tmp_path / "checkpoint")
    record(files, "saves/a", ("store", store.folder), ("state", LINEAGE))
    age(tmp_path / "root")
    return tmp_path / "root"


def folder(path: Path) -> None:
    path.mkdir()


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.json").write_text("mine")
    age(path)


def file(path: Path) -> None:
    path.write_text("mine")


def listener(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # its whole path would be too long
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def each(root: Path, *, folders: bool) -> list[Path]:
    (store,) = (path for path in root.iterdir() if path.name.startswith("gradient-"))
    (recorded,) = (path for path in (root / "runs").iterdir() if path.name != "tmp")
    found = [root / "runs", recorded, root / "runs" / "tmp"]
    found += [root / "states", root / "states" / LINEAGE, root / "states" / "tmp"]
    found += [store, store / "log", store / "data", store / "tmp"]
    return found if folders else [path for path in sorted(root.rglob("*")) if path.is_file()]


def put(make: Callable[[Path], None], path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def whole(root: Path) -> bool:
    return sum(path.read_bytes() == b"mine" for path in root.rglob("*") if path.is_file()) == 1


@pytest.mark.parametrize("make", [file, os.mkfifo, listener, dangling])
def test_what_is_no_folder_where_one_belongs(
    make: Callable[[Path], None], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root, tmp_path / "kept")
    for path in each(root, folders=True):
        put(make, path)
        name = path.relative_to(root).as_posix()
        code, out, err = run(capsys, "store", "verify", "--root", str(root))
        assert code == 4, name
        assert f"{path} is a" in err, name
        assert "Traceback" not in err
        for verb in (("ls",), ("ls", "--by-run")):
            assert run(capsys, "store", *verb, "--root", str(root))[0] == 0, name
        files = LocalFiles(root)
        if name.split("/")[0] in ("runs", "states"):
            with pytest.raises(CorruptionError, match="what runs refer to is not known"):
                plan(files, Scope(unreferenced=True, leftovers=True, grace_hours=0))
        else:
            assert not [i for i in plan(files, Scope(unreferenced=True, leftovers=True, grace_hours=0)) if i.goes], name
            with pytest.raises(Exception, match=r"is a |cannot write"):
                StoreRoot(files).open("gradient", {"r": 1}, LAYOUT).append("f9", values(3))
        code, out, err = run(capsys, "store", "repair", "--root", str(root))
        assert f"put aside: {path} is a" in out, name
        assert run(capsys, "store", "verify", "--root", str(root))[0] == 0, name
        if make is file:
            assert whole(root)  # nothing of the user's is lost
        store = StoreRoot(files).open("gradient", {"r": 1}, LAYOUT)
        assert store.contains(values(0).keys).all() or store.append("f0", values(0))
        record(files, "saves/b", ("store", store.folder))
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "kept", root)


@pytest.mark.parametrize("make", [folder, full_folder, os.mkfifo, listener])
def test_what_is_no_file_where_one_belongs(
    make: Callable[[Path], None], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root, tmp_path / "kept")
    used = read_runs(LocalFiles(root))[0].uses
    for path in each(root, folders=False):
        put(make, path)
        name = path.relative_to(root).as_posix()
        code, _, err = run(capsys, "store", "verify", "--root", str(root))
        assert code == 4, name
        assert (f"{path} is a" in err) or "missing although" in err, name
        for verb in (("ls",), ("ls", "--by-run"), ("gc", "--unreferenced", "--older-engine")):
            code, _, err = run(capsys, "store", *verb, "--root", str(root))
            assert code == 0, (name, err)
        files = LocalFiles(root)
        assert read_runs(files)[0].uses == used, name
        scope = Scope(unreferenced=True, leftovers=True, grace_hours=0)
        gone = {item_file.path for item in plan(files, scope) if item.goes for item_file in item.files}
        assert all("mine.json" in path for path in gone), name  # beside what is protected, and never opened
        run(capsys, "store", "repair", "--root", str(root))
        refuse(list(inspect(files)))
        assert read_runs(files)[0].uses == used, name
        if make is full_folder and name.count("/") < 3:
            assert whole(root), name
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "kept", root)


@pytest.mark.parametrize("text", ["[]", "[1]", "3", "null", '"x"', "{}", '{"format": 1}', '{"digest": 3}'])
def test_a_record_that_is_none_is_told_in_words(text: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CorruptionError, match="found no record; expected a JSON object with format and digest"):
        unseal(text.encode(), "it")
    for path in [path for path in root.rglob("*.json") if path.name.startswith(("recipe", "manifest", "f0"))]:
        path.write_text(text)
    code, out, err = run(capsys, "store", "verify", "--root", str(root), "--json")
    assert code == 4
    assert "WARNING" not in err
    for name, times in (("recipe.json", 2), ("manifest.json", 1), ("f0.json", 1)):
        assert err.count(name) <= times, name
    assert sum(bool(part["faults"]) for part in json.loads(out).values()) == 2
    assert [part.name for part in repair(LocalFiles(root)) if part.faults]


def test_what_another_process_makes_meanwhile_is_not_astray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that begin in one new store: one looks at a folder just before the other has made it."""
    files, real = LocalFiles(tmp_path), os.stat

    def slow(path: Path, **kwargs: Any) -> os.stat_result:
        try:
            return real(path, **kwargs)
        finally:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)

    monkeypatch.setattr(os, "stat", slow)
    assert files.misplaced("store", "folder") is None
