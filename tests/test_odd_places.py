"""What lies where a file of data belongs and cannot be read as one is refused by name, before anything waits for it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import ConfigError
from tests.bad_data import FOLDER, GOOD, short


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "x.json")


def _circle(folder: Path) -> None:
    (folder / "x.json").symlink_to("y.json")
    (folder / "y.json").symlink_to("x.json")


def _nowhere(folder: Path) -> None:
    (folder / "x.json").symlink_to("gone.json")


def _closed(folder: Path) -> None:
    (folder / "x.json").write_text(json.dumps([GOOD]))
    (folder / "x.json").chmod(0)


def _stray(folder: Path) -> None:
    (folder / "x.json").mkdir()
    (folder / "x.json" / "rows.json").write_text(json.dumps([GOOD]))
    (folder / "x.json" / "README").write_text("rows")


def _within(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        (folder / "x.json").mkdir()
        make(folder / "x.json")

    return lay


def _locked(folder: Path) -> None:
    _within(_closed)(folder)
    (folder / "x.json").chmod(0o300)


ODD_PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (_pipe, "x.json: a pipe, socket or device"),
    "circle": (_circle, "x.json: Too many levels of symbolic links"),
    "nowhere": (_nowhere, "x.json: No such file or directory"),
    "closed": (_closed, "x.json: Permission denied"),
    "stray": (_stray, "found README in the folder"),
    "pipe in a folder": (_within(_pipe), "x.json/x.json: a pipe, socket or device"),
    "circle in a folder": (_within(_circle), "x.json/x.json: Too many levels"),
    "closed in a folder": (_within(_closed), "x.json/x.json: Permission denied"),
    "folder in a folder": (_within(_within(_nowhere)), "x.json/x.json: a folder within a folder"),
    "closed folder": (_locked, "a folder that can be read; "),
}


@pytest.fixture
def as_nobody() -> Any:
    """Be a user whom permissions bind, where tests run as one whom they do not."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)


def unread(folder: str) -> str:
    """Return the text with which the dataset x of a folder is refused before anything is loaded."""
    from dataflex.config.paths import check_files
    from dataflex.config.problems import Origin, Problems

    problems = Problems()
    check_files({"dataset": "x", "dataset_dir": folder}, (), Origin(Path("run.yaml")), problems)
    with pytest.raises(ConfigError) as raised:
        problems.raise_if_any()
    return str(raised.value)


@pytest.mark.parametrize("case", ODD_PLACES)
def test_what_cannot_be_read_as_a_file_is_refused_by_name(case: str, as_nobody: None) -> None:
    """`validate` says it: behind it a pipe would be waited for without end."""
    make, said = ODD_PLACES[case]
    with tempfile.TemporaryDirectory() as folder:  # one that whoever we are can reach
        info = Path(folder) / "dataset_info.json"
        info.write_text(json.dumps({"x": {"file_name": "x.json"}}))
        make(Path(folder))
        assert said in short(unread(folder), f"{info}: x.file_name")
        for path in Path(folder).glob("x.json"):
            path.chmod(0o700)


@pytest.mark.parametrize("make", [_pipe, _circle, _nowhere, _closed])
def test_a_file_of_registrations_that_cannot_be_read_is_refused(make: Callable[[Path], None], as_nobody: None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        (Path(folder) / "dataset_info.json").symlink_to("x.json")
        assert "found no readable" in short(unread(folder), f"{folder}/dataset_info.json")


def test_a_file_outside_the_folder_is_a_file_as_any(
    load_dataset: Callable[..., Any], workspace: Any, tmp_path: Path
) -> None:
    from dataflex.config import load

    (tmp_path / "data").mkdir()
    (tmp_path / "pool.json").symlink_to(FOLDER / "three_rows.json")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "../pool.json"}}))
    assert load(workspace.write("run", dataset="x", eval_dataset="x", dataset_dir=str(tmp_path / "data")))
    assert len(load_dataset(tmp_path / "data", "x").train) == 3
