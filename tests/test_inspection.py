"""Everything under a root is looked at: each file of each kind, damaged in turn, is found, named and mended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dataflex.errors import CorruptionError, MismatchError
from dataflex.stores.files import Files, LocalFiles
from dataflex.stores.record import FORMAT, claim, seal, unseal
from dataflex.stores.root import StoreRoot, folder_name, open_store
from dataflex.stores.runs import read_runs
from dataflex.stores.upkeep.inspection import Inspected, inspect, refuse, repair
from tests.command import run
from tests.roots import LAYOUT, LINEAGE, empty_root, make_state, make_store, record, values

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture(params=["local", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """A root with one of everything, on disk and on an object store."""
    made = empty_root(request.param, tmp_path)
    store = make_store(made, 1)
    make_state(made, tmp_path / "checkpoint")
    record(made, "saves/a", ("store", store.folder), ("state", LINEAGE))
    write(made, "notes/mine.txt", b"not DataFlex's")
    return made


def write(files: Files, path: str, data: bytes) -> None:
    with files.output(path) as file:
        file.write(data)


def faults(files: Files) -> list[str]:
    return [problem.path for part in inspect(files) for problem in part.faults]


def parts(files: Files) -> dict[str, Inspected]:
    return {part.name: part for part in inspect(files)}


def test_it_says_what_it_looked_at(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    found = parts(files)
    assert [part.kind for part in found.values()] == ["store", "unknown", "run", "state"]
    assert sum(part.bytes for part in found.values()) == sum(file.bytes for file in files.stored(""))
    before = files.stored("")
    code, out, err = run(capsys, "store", "verify", "--root", files.url)
    assert (code, err) == (0, "")
    assert f"states/{LINEAGE}: intact, 0 unused files\n" in out
    assert "notes: not DataFlex's, 14 bytes, not looked into\n" in out
    assert "looked at 1 stores, 1 kept states and 1 records of runs" in out
    assert "0 faults; 1 unknown things left alone" in out
    assert run(capsys, "store", "repair", "--root", files.url)[0] == 0
    assert files.stored("") == before


def test_every_damaged_file_is_found_named_and_mended(files: Files, tmp_path: Path) -> None:
    whole = {file.path: files.read(file.path) for file in files.stored("")}
    used = read_runs(files)[0].uses
    for path, data in whole.items():
        write(files, path, bytes([data[0] ^ 1]) + data[1:])
        if path == "notes/mine.txt":
            assert faults(files) == []
            continue
        assert path in faults(files)
        with pytest.raises(CorruptionError, match=path.rsplit("/", 1)[-1].replace(".", r"\.")):
            refuse(list(inspect(files)))
        refuse(list(repair(files)), after_repair=True)
        assert faults(files) == [], path
        # A run's record protects what it did, and is known by its name where that could be written again.
        assert read_runs(files)[0].uses == used
        # What was removed is made again; the rest was kept.
        store = StoreRoot(files).open("gradient", {"r": 1}, LAYOUT)
        assert store.contains(values(0).keys).all() or store.append("f0", values(0))
        assert store.contains(values(1).keys).all() or store.append("f1", values(1))
        assert StoreRoot(files).states.put(LINEAGE, tmp_path / "checkpoint", {}) == path.startswith("states/")
        assert faults(files) == [], path
        for file in files.stored(""):
            files.remove(file.path)
        for other, content in whole.items():
            write(files, other, content)


def test_a_store_whose_recipe_is_gone_is_found_by_the_run_that_computed_it(files: Files) -> None:
    store = StoreRoot(files).stores()[0]
    files.remove(f"{store.folder}/recipe.json")
    assert faults(files) == [f"{store.folder}/recipe.json"]
    with pytest.raises(CorruptionError, match="10 rows beside it stay"):
        refuse(list(inspect(files)))
    refuse(list(repair(files)), after_repair=True)
    (problem,) = parts(files)[store.folder].problems
    assert problem.harmless
    assert "10 rows wait for a run" in problem.what
    again = StoreRoot(files).open("gradient", {"r": 1}, LAYOUT)
    assert again.contains(values(0).keys).all()
    assert parts(files)[store.folder].problems == ()
    # The mark of the repair does not hide a second loss of bytes.
    data = next(file.path for file in files.stored(f"{store.folder}/data"))
    write(files, data, b"other")
    files.remove(f"{store.folder}/recipe.json")
    assert faults(files) == [data]


def test_a_lost_file_of_a_state_takes_the_state_with_it(files: Files) -> None:
    for path in [file.path for file in files.stored(f"states/{LINEAGE}") if not file.path.endswith("manifest.json")]:
        data = files.read(path)
        files.remove(path)
        assert faults(files) == [path]
        write(files, path, data)
    files.remove(path)
    refuse(list(repair(files)), after_repair=True)
    assert files.stored("states") == []
    assert StoreRoot(files).states.find(LINEAGE) is None


def test_a_planted_file_is_a_fault_and_goes_alone(files: Files) -> None:
    kept = next(file.path for file in files.stored("states") if file.path.endswith("adapter.safetensors"))
    planted = kept.replace("adapter.safetensors", "optimizer.pt")
    write(files, planted, b"bomb")
    assert faults(files) == [planted]
    refuse(list(repair(files)), after_repair=True)
    assert faults(files) == []
    assert StoreRoot(files).states.find(LINEAGE) == {}


def test_what_was_renamed_or_is_of_a_newer_version_is_left_and_said(files: Files, tmp_path: Path) -> None:
    other = "cd" * 16
    for file in files.stored(f"states/{LINEAGE}"):
        write(files, file.path.replace(LINEAGE, other), files.read(file.path))
    assert faults(files) == [f"states/{other}/manifest.json"]
    with pytest.raises(CorruptionError, match=f"is of the state {LINEAGE}"):
        StoreRoot(files).states.fetch(other, tmp_path / "scratch")
    refuse(list(repair(files)), after_repair=True)
    store = StoreRoot(files).stores()[0]
    renamed = f"gradient-{'0' * 32}"
    for file in files.stored(store.folder):
        write(files, file.path.replace(store.folder, renamed), files.read(file.path))
    before = files.stored("")
    with pytest.raises(CorruptionError, match=f"Call it {store.folder} again"):
        refuse(list(repair(files)), after_repair=True)
    assert files.stored("") == before
    for file in files.stored(renamed):
        files.remove(file.path)
    path = f"{store.folder}/recipe.json"
    write(files, path, seal({**unseal(files.read(path), "it"), "format": FORMAT + 1}))
    with pytest.raises(MismatchError, match=r"1 not looked into:\n.*read it with a newer DataFlex"):
        refuse(list(repair(files)), after_repair=True)


@pytest.mark.parametrize("projection", ["normal", "factorized"])
def test_a_store_of_a_former_projection_is_left_and_said(
    files: Files, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, projection: str
) -> None:
    recipe = {"feature": {"kind": "gradient", "projection": {"type": projection, "dim": 8, "seed": 0}}}
    folder = folder_name("gradient", recipe)
    claim(files, folder, "recipe", {"kind": "gradient", "recipe": recipe, "layout": LAYOUT.plain(), "libraries": {}})
    before, root = files.stored(""), StoreRoot(files)
    for look in (
        lambda: root.find("gradient", recipe),
        lambda: root.open("gradient", recipe, LAYOUT),
        lambda: open_store(f"{files.url}/{folder}"),
    ):
        with pytest.raises(MismatchError, match=f"under the projection {projection}, which was taken out of DataFlex"):
            look()
    named = f"{folder}/recipe.json is of gradients under the projection {projection}"
    for verb, expected in (("ls", 0), ("verify", 3), ("repair", 3)):
        caplog.clear()
        code, out, err = run(capsys, "store", verb, "--root", files.url)
        assert (code, (err + caplog.text).count(named)) == (expected, 1), err
        assert verb == "repair" or folder_name("gradient", {"r": 1}) in out, "the others are there as ever"
    now = {"feature": {"kind": "gradient", "projection": {"type": "rademacher", "dim": 8, "seed": 0}}}
    nearest = root.nearest("gradient", now)
    assert nearest is not None
    assert nearest[0].recipe == {"r": 1}
    assert files.stored("") == before
    assert run(capsys, "store", "gc", "--unreferenced", "--grace", "0", "--delete", "--root", files.url)[0] == 0
    assert files.stored(folder) == []
    assert run(capsys, "store", "verify", "--root", files.url)[0] == 0


def test_what_cannot_be_read_is_a_fault_that_nothing_is_removed_for(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "root")
    store = make_store(files, 1)
    entry = tmp_path / "root" / store.folder / "log" / "f0.json"
    entry.unlink()
    entry.symlink_to(entry)
    before = files.stored("")
    assert faults(files) == [store.folder]
    with pytest.raises(CorruptionError, match="cannot be read"):
        refuse(list(repair(files)), after_repair=True)
    assert files.stored("") == before


def test_a_linked_store_is_looked_at(tmp_path: Path) -> None:
    store = make_store(LocalFiles(tmp_path / "elsewhere"), 1)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / store.folder).symlink_to(store.path)
    next(Path(store.path, "data").iterdir()).write_bytes(b"other")
    assert len(faults(LocalFiles(tmp_path / "root"))) == 1


def test_the_command_names_the_faults_and_exits_with_4(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = next(file.path for file in files.stored("") if file.path.endswith("recipe.json"))
    kept = next(file.path for file in files.stored("states") if file.path.endswith("adapter.safetensors"))
    for path in (recipe, kept):
        write(files, path, b"other")
    code, out, err = run(capsys, "store", "verify", "--root", files.url, "--json")
    assert code == 4
    found = json.loads(out)
    assert {name for name, part in found.items() if part["faults"]} == {recipe.split("/")[0], f"states/{LINEAGE}"}
    assert recipe in err
    assert kept in err
    assert "Traceback" not in err
    code, out, err = run(capsys, "store", "repair", "--root", files.url, "--json")
    assert (code, json.loads(out).keys()) == (0, {recipe.split("/")[0], f"states/{LINEAGE}"})
    assert f"removed: {files.url}/{kept} is damaged" in out
    assert run(capsys, "store", "verify", "--root", files.url)[0] == 0
    assert json.loads(run(capsys, "store", "repair", "--root", files.url, "--json")[1]) == {}


VERBS = (("ls",), ("ls", "--by-run"), ("show", "x"), ("verify",), ("repair",), ("gc", "--leftovers", "--delete"))


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_root_that_is_named_and_not_there_is_an_error(
    verb: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    MemoryFileSystem.store.clear()
    (tmp_path / "file").write_text("")
    for root in (str(tmp_path / "nosuch"), str(tmp_path / "file"), f"file://{tmp_path}/nosuch", "memory://nosuch"):
        code, out, err = run(capsys, "store", *verb, "--root", root)
        assert (code, out) == (2, "")
        assert err.startswith("dataflex: --root: found ")
    monkeypatch.setenv("DATAFLEX_HOME", str(tmp_path / "nosuch"))
    assert run(capsys, "store", *verb)[2].startswith("dataflex: DATAFLEX_HOME: found no such folder")
    # Where nothing was named, nothing need be there yet.
    monkeypatch.delenv("DATAFLEX_HOME")
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "cache"))
    code, _, err = run(capsys, "store", *verb)
    assert code == (3 if verb[0] == "show" else 0), err
    assert not (tmp_path / "nosuch").exists()
    assert not (tmp_path / "cache").exists()
