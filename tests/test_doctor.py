"""`dataflex doctor` finds what is broken, in environments that are broken in the ways that people have met."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataflex.doctor import disk, examine, imports, versions
from dataflex.doctor.finding import Finding
from tests.command import run

ROOT = Path(__file__).parents[1]


def distribution(site: Path, name: str, version: str, *requires: str, module: str = "", code: str = "") -> None:
    """Install a package by hand: its metadata, and a module of the code given."""
    about = site / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Provides-Extra: odd"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (about / "METADATA").write_text("\n".join(lines) + "\n", "utf-8")
    if module:
        (about / "top_level.txt").write_text(f"{module}\n", "utf-8")
        (site / module).mkdir()
        (site / module / "__init__.py").write_text(code, "utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of packages that comes before the installed ones, here and in what is started from here."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    monkeypatch.chdir(tmp_path)
    return folder


def test_requirements_are_followed_and_those_not_met_are_named(site: Path) -> None:
    distribution(
        site, "dataflex", "9.9", "One>=2,<3", "absent-one", "two; python_version < '3'", "three; extra == 'odd'"
    )
    distribution(site, "one", "2.15", "two==1.0", "two; extra == 'never'", "not!a requirement")
    distribution(site, "two", "2.0", "one<2.14")  # in a circle, too
    distribution(site, "three", "not.a.version", "dataflex")
    found = {f.about: f.found for f in versions.disagreements()}
    assert found == {
        "absent-one": "dataflex 9.9 requires absent-one; found none",
        "two": "one 2.15 requires two==1.0; found 2.0",
        "one": "two 2.0 requires one<2.14; found 2.15",
    }
    assert {f.level for f in versions.disagreements()} == {"warning"}


def test_wheels_for_different_cuda_are_seen_without_an_import(site: Path) -> None:
    for name, local in (("torch", "2.15.0+cu132"), ("torchaudio", "2.11.0+cu130"), ("torchvision", "0.29.0+cu132")):
        distribution(site, name, local.partition("+")[0], module=name, code="raise RuntimeError('imported')")
        (site / name / "version.py").write_text(f"__version__ = '{local}'\n", "utf-8")
    code = "from dataflex.doctor.imports import mismatches; print(*(f.found for f in mismatches()), sep='\\n')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["2.11.0 is made for cu130, torch 2.15.0 for cu132"], ran.stderr


def test_imports_are_tried_apart(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {
        "whole": "",
        "wrong": "raise RuntimeError('compiled with different CUDA versions')",
        "killed": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "left": "import sys; sys.exit(7)",
        "hangs": "import time; time.sleep(60)",
    }
    for name, code in ends.items():
        distribution(site, name, "1.0", module=name, code=code)
    monkeypatch.setattr(imports, "SECONDS", 5)
    monkeypatch.setattr(imports, "OPTIONAL", {"wrong": "wrong", "unknown": "unknown"})
    names = [*ends, "missing"]
    found = {f.about: f for f in imports.imports({n: n for n in names}, critical=set(names) - {"wrong"})}
    assert list(found) == names
    assert found["whole"] == Finding("ok", "whole", "1.0 imports")
    assert found["wrong"].level == "warning"
    assert found["wrong"].found.endswith("import: RuntimeError: compiled with different CUDA versions")
    assert all(found[name].level == "error" for name in ("killed", "left", "hangs", "missing"))
    assert "-11" in found["killed"].found
    assert found["hangs"].found.endswith("no end within 5 s")
    assert found["missing"].found == "no version does not import: ModuleNotFoundError: No module named 'missing'"
    assert imports.optional() == {"wrong": "wrong", "faiss": "faiss-cpu"}
    assert set(imports.optional(["unknown"])) == {"wrong", "unknown", "faiss"}


def test_two_kinds_of_faiss_are_an_error(site: Path) -> None:
    assert versions.side_by_side() is None
    distribution(site, "faiss-gpu", "1.15.1", module="faiss")
    found = versions.side_by_side()
    assert found is not None
    assert found.level == "error"
    assert found.found.startswith("faiss-cpu ")
    assert "and faiss-gpu 1.15.1 are both installed" in found.found
    assert found.advice.startswith("`pip uninstall faiss-cpu faiss-gpu`")


def test_room_is_looked_for_where_nothing_is_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    places = {
        "store": str(tmp_path / "a" / "b"),
        "output": str(tmp_path / "file" / "run"),
        "cache": "memory://bucket/x",
    }
    monkeypatch.setattr(disk, "LITTLE", 0)
    monkeypatch.setattr(disk, "LEAST", 0)
    store, output, cache = disk.room(places)
    assert store.level == "ok"
    assert store.found.endswith(f"GB free at {tmp_path / 'a' / 'b'}")
    assert (output.level, output.found) == ("error", f"{tmp_path / 'file'} is a file, not a folder")
    assert (cache.level, cache.found) == ("ok", "memory://bucket/x answers; it is no disk of this machine")
    monkeypatch.setattr(disk, "LITTLE", 1e30)
    assert next(disk.room(places)).level == "warning"
    monkeypatch.setattr(disk, "LEAST", 1e30)
    assert next(disk.room(places)).level == "error"
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        assert next(disk.room({"store": str(tmp_path / "new")})).found == f"{tmp_path} cannot be written to"
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("broken", ["", "no_such_module", "pydantic"])
def test_command(broken: str, site: Path, monkeypatch: Any, capsys: Any) -> None:
    needed = {name: name for name in ("packaging", broken) if name}
    if broken == "pydantic":
        distribution(site, "pydantic", "2.99", module="pydantic", code="raise SystemError('another core')")
    for module in (imports, examine):
        monkeypatch.setattr(module, "NEEDED", needed)
    monkeypatch.setattr(imports, "OPTIONAL", {})
    monkeypatch.setattr(imports, "owners", lambda module: [])  # FAISS itself takes a second
    monkeypatch.setattr(imports, "DEVICES", "print('two of a kind')")  # torch takes seconds
    (site.parent / "run.yaml").write_text("model_name_or_path: [unclosed\n")
    for arguments in (["--json"], ["run.yaml"]):
        code, out, err = run(capsys, "doctor", *arguments)
        assert code == (1 if broken or "run.yaml" in arguments else 0)
        assert "Traceback" not in out + err
        if arguments == ["run.yaml"]:
            wanted = "error    configuration: cannot be read" if broken == "pydantic" else "error    run.yaml: "
            assert wanted in out
            continue
        found = {f["about"]: f for f in json.loads(out)}
        assert {"python", "packaging", "output", "Hugging Face cache"} <= set(found)
        assert ("store" in found) == (broken != "pydantic")
        assert found["GPU"]["found"] == "two of a kind"
        if broken:
            assert found[broken]["level"] == "error"
            assert err.startswith("dataflex: no run can work before this is mended: ")
            assert broken in err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_this_environment_is_sound(site: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "dataflex.cli", "doctor"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert not [line for line in lines if line.startswith("error")]
    assert {"torch", "llamafactory", "faiss-cpu"} <= {line.split()[1].rstrip(":") for line in lines if line[:2] == "ok"}
