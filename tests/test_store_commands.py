"""`dataflex store` lists, shows, verifies and repairs stores, and never takes the working folder for a root."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataflex.rows import KEY_DTYPE
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values
from tests.command import python, run

pytestmark = pytest.mark.usefixtures("run_file")


def make_store(folder: Path) -> str:
    store = StoreRoot(folder).open("loss", {"feature": {"kind": "loss"}}, Layout({"tokens": "int32"}))
    keys = np.arange(6, dtype=np.uint64).reshape(3, 2).view(KEY_DTYPE).reshape(3)
    store.append("f", Values(keys, np.zeros(3, np.uint8), {"tokens": np.arange(3, dtype=np.int32)}))
    return store.folder


def test_stores_are_listed_shown_verified_and_repaired(capsys, tmp_path):
    name = make_store(tmp_path / "stores")
    root = ("--root", str(tmp_path / "stores"))
    assert name in run(capsys, "store", "ls", *root)[1]
    assert json.loads(run(capsys, "store", "ls", *root, "--json")[1])[0]["rows"] == 3
    assert json.loads(run(capsys, "store", "show", name[:8], *root)[1])["recipe"] == {"feature": {"kind": "loss"}}
    code, out, _ = run(capsys, "store", "verify", *root)
    assert code == 0
    assert out.splitlines()[0] == f"{name}: intact, 0 unused files"
    assert out.splitlines()[1].startswith("looked at 1 stores, 0 kept states and 0 records of runs, ")
    (data,) = (tmp_path / "stores" / name / "data").glob("*.parquet")
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    code, out, err = run(capsys, "store", "verify", *root)
    assert code == 4
    assert f"{name}: damaged" in out
    assert "SHA-256" in err
    assert "removed: " in run(capsys, "store", "repair", *root)[1]
    assert run(capsys, "store", "verify", *root)[0] == 0


@pytest.mark.parametrize("verb", ["ls", "show loss", "verify", "repair", "gc --leftovers --grace 0 --delete"])
@pytest.mark.parametrize("root", [["--root", ""], ["--root", " "], ["--root="]])
def test_an_empty_root_is_not_the_working_folder(capsys, tmp_path, verb, root):
    name = make_store(tmp_path)
    (tmp_path / name / "data" / "left.parquet.tmp").touch()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, "store", *verb.split(), *root)
    assert (code, out) == (2, "")
    assert err.startswith("dataflex: command line: found an empty text (")
    assert err.count("--root") == 1
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_no_store(capsys, tmp_path):
    assert run(capsys, "store", "ls", "--root", str(tmp_path))[1] == f"no stores under {tmp_path}\n"
    code, _, err = run(capsys, "store", "show", "loss", "--root", str(tmp_path))
    assert code == 3
    assert "no store loss" in err


def test_a_store_that_cannot_be_reached_stops_a_run_before_anything_is_loaded(capsys):
    for verb in ("validate", "train", "featurize"):
        code, out, err = run(capsys, verb, "run.yaml", "dataflex.store=az://bucket/x")
        assert code == 2
        assert err.startswith("dataflex: root of the stores: az://bucket/x cannot be reached from here: ")
        assert "\n  pip install 'adlfs'" in err
        assert ("az://bucket/x (float16)" in out) == (verb == "validate")  # it says all it knows first
    assert run(capsys, "store", "ls", "--root", "nosuch://x")[0] == 2


def test_store_ls_imports_no_torch():
    done = python("-X", "importtime", "-m", "dataflex.cli", "store", "ls", "--root", ".")
    assert done.stdout == f"no stores under {Path.cwd()}\n"
    assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " transformers"))]
