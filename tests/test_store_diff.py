"""`dataflex store diff` compares recipes field by field, in one root or two; `store ls --by-run` says when."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from dataflex.features.spec import GradientSpec, Projection
from dataflex.stores.files import LocalFiles
from dataflex.stores.root import StoreRoot
from dataflex.stores.runs import RunRecord
from dataflex.stores.values import Layout
from tests.command import run


def make_store(folder: Path, dim: int, **more: Any) -> str:
    feature = GradientSpec(projection=Projection(dim=dim)).recipe()
    recipe = {"feature": feature, "base": {"weights": "c0ffee"}, "storage": "float16", **more}
    return StoreRoot(folder).open("gradient", recipe, Layout({"norm": "float32"}, dim, "float16")).folder


def test_fields_that_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, other = make_store(tmp_path, 64), make_store(tmp_path, 128, lora={"rank": 8})
    root = ("--root", str(tmp_path))
    code, out, _ = run(capsys, "store", "diff", one, other, *root)
    assert code == 3
    assert out.splitlines() == [
        f"- {tmp_path}/{one}",
        f"+ {tmp_path}/{other}",
        "feature.projection.dim",
        "  - 64",
        "  + 128",
        "lora.rank",
        "  - (none)",
        "  + 8",
    ]
    code, out, _ = run(capsys, "store", "diff", other[:14], one[:14], *root, "--json")
    assert code == 3
    assert json.loads(out)["differing"] == [
        {"field": "feature.projection.dim", "store": 128, "other": 64},
        {"field": "lora.rank", "store": 8},
    ]


def test_no_difference_in_another_root(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = make_store(tmp_path / "a", 64)
    assert make_store(tmp_path / "b", 64) == name
    roots = ("--root", str(tmp_path / "a"), "--other-root", str(tmp_path / "b"))
    code, out, _ = run(capsys, "store", "diff", "gradient", "gradient", *roots)
    assert (code, out) == (0, f"no difference: {tmp_path}/a/{name} and {tmp_path}/b/{name} have the same recipe\n")
    code, out, _ = run(capsys, "store", "diff", name, name, *roots, "--json")
    assert (code, json.loads(out)["differing"]) == (0, [])


def test_what_is_not_there_or_not_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, other = sorted([make_store(tmp_path, 64), make_store(tmp_path, 128)])
    root = ("--root", str(tmp_path))
    code, out, err = run(capsys, "store", "diff", "gradient", one, *root)
    assert (code, out) == (3, "")
    assert err == f"dataflex: 2 stores called gradient... under {tmp_path}; expected one of {one}, {other}\n"
    code, _, err = run(capsys, "store", "diff", one, "loss", *root)
    assert code == 3
    assert "no store loss" in err
    code, _, err = run(capsys, "store", "diff", one, other, *root, "--other-root", str(tmp_path / "nowhere"))
    assert code == 2
    assert err.startswith(f"dataflex: --other-root: found no such folder at {tmp_path}/nowhere; expected")


def test_by_run_says_when_it_was_started_and_last_active(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    for verb in ("featurize", "train"):
        RunRecord(files, tmp_path / "out", verb, "identity", "less").uses("state", "kept")
    for number, path in enumerate(sorted((tmp_path / "runs").glob("*/begun.*"))):
        os.utime(path, (at := 1_700_000_000 + 3600 * number, at))
    for path in (tmp_path / "runs").glob("*/state.*"):
        os.utime(path, (1_700_010_000, 1_700_010_000))

    def minute(seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

    _, out, _ = run(capsys, "store", "ls", "--by-run", "--root", str(tmp_path))
    _, listed, _ = run(capsys, "store", "ls", "--by-run", "--root", str(tmp_path), "--json")
    found = json.loads(listed)
    assert {each["stage"] for each in found} == {"featurize", "train"}
    assert sorted(each["started"] for each in found) == [1_700_000_000, 1_700_003_600]
    assert {each["modified"] for each in found} == {1_700_010_000}
    for each in found:
        says = f"  {each['stage']} less, not finished, started {minute(each['started'])}, last active "
        assert f"{tmp_path / 'out'}{says}{minute(1_700_010_000)}" in out
