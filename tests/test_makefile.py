"""`make` takes the first Python on the path that runs and is of a version that will do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no program `make`")
PROMISE = "echo 'pyenv: command not found' >&2; exit 127"


def made(folder: Path, pythons: dict[str, str | tuple[int, int]], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `make` where there is no environment and the path has these names alone: a version, or what a shell does."""
    shutil.copy(Path(__file__).parents[1] / "Makefile", folder)
    names = folder / "bin"
    names.mkdir()
    for name, what in pythons.items():
        if not isinstance(what, str):
            what = f"exec '{sys.executable}' -c 'import sys; sys.version_info = {(*what, 0)}; exec(sys.argv[1])' \"$2\""
        (names / name).write_text(f"#!/bin/sh\n{what}\n")
        (names / name).chmod(0o755)
    shown = "chosen: ; @: $(info $(PYTHON))"
    command = [str(shutil.which("make")), "--no-print-directory", "--eval", shown, *arguments]
    return subprocess.run(command, cwd=folder, env={"PATH": str(names)}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3.11": (3, 11), "python3.12": (3, 12), "python3.13": (3, 13), "python3": (3, 12)}, "python3.11"),
        ({"python3.11": PROMISE, "python3.12": (3, 12), "python3": (3, 11)}, "python3.12"),
        ({"python3.11": PROMISE, "python3.12": PROMISE, "python3.13": (3, 13)}, "python3.13"),
        ({"python3.11": (3, 10), "python3.12": (3, 14), "python3.13": (3, 13)}, "python3.13"),
        ({"python3": (3, 13)}, "python3"),
        ({"python3": (3, 10)}, ""),
        ({"python3": (3, 14), "python3.10": (3, 10), "python3.14": (3, 14)}, ""),
        ({"python3.11": PROMISE, "python3": (2, 7)}, ""),
        ({"python3.12": "exit 0"}, "python3.12"),
        ({}, ""),
    ],
)
def test_the_first_that_runs_and_will_do_is_taken(
    pythons: dict[str, str | tuple[int, int]], chosen: str, tmp_path: Path
) -> None:
    done = made(tmp_path, pythons, "chosen")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{chosen}\n", "")


def test_one_that_is_named_is_taken(tmp_path: Path) -> None:
    assert made(tmp_path, {"python3.11": (3, 11)}, "chosen", "PYTHON=/opt/python").stdout == "/opt/python\n"


def test_none_that_will_do_is_said(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    done = made(tmp_path, {"python3.11": PROMISE, "python3": (3, 10)}, "install")
    assert done.returncode == 2
    assert done.stderr.startswith("found no Python 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.12\n")
    assert not (tmp_path / ".venv").exists()
