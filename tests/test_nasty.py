"""Every file of bad data in `nasty/` loads, or ends in a short message that names it; nothing ends in a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import ConfigError
from tests.bad_data import FOLDER, GOOD, lines, refusal, short

LINES = re.findall(r"^\| `([^`]+)` \| (.*) \| (.*) \|$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)


TABLE = [(file, outcome) for file, _, outcome in LINES if not file.startswith(("mixture_", "dataset_info_"))]


MIXTURES = [line for line in LINES if line[0].startswith("mixture_")]


REGISTRATIONS = [(file, outcome) for file, _, outcome in LINES if file.startswith("dataset_info_")]


MADE = {
    "huge_sample_200k.json": [{"instruction": "Continue.", "input": "", "output": ("many friends " * 16000)[:200_000]}],
    "prompt_longer_than_cutoff.json": [{"instruction": ("to all " * 9000)[:60_000], "input": "", "output": "42"}],
    "one_very_long_line.jsonl": [{"instruction": "x" * 150_000, "input": "", "output": "y"}],
    "sorted_by_source.json": [],
    "pt_repetitive.jsonl": [{"text": "the " * 5000, "domain": "loop"}] * 3,
}
"""What is too large to be kept; the rows of GSM8K and Banking77 that are kept are put around it."""


LOADS = [file for file, outcome in TABLE if re.match(r"\d+ rows", outcome)]


def lay_out(folder: Path) -> None:
    """Put all of the files into a folder, those that are made among them."""
    for file in FOLDER.iterdir():
        (folder / file.name).symlink_to(file)
    sums, intents = json.loads((FOLDER / "three_rows.json").read_text()), []
    *intents, _ = json.loads((FOLDER / "extreme_imbalance.json").read_text())
    for name, odd in MADE.items():
        rows = odd if name.startswith("pt_") else [*sums[:2], *odd, *sums[2:]]
        if name == "sorted_by_source.json":
            rows = [*(sums * 34)[:100], *intents[:100]]
        (folder / name).write_text(json.dumps(rows) if name.endswith(".json") else lines(*rows))


def registration(file: str) -> dict[str, Any]:
    return {"file_name": file} | ({"columns": {"prompt": "text"}} if file.startswith("pt_") else {})


def test_every_file_has_its_line() -> None:
    kept = {file.partition(":")[0] for file, *_ in LINES} - set(MADE)
    assert kept == {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert set(MADE) <= {file for file, _ in TABLE}


def test_every_file_loads_or_is_refused_by_name(load_dataset: Callable[..., Any], tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps({file: registration(file) for file, _ in TABLE}))
    for file, outcome in TABLE:
        stage = "pt" if file.startswith("pt_") else "sft"
        if file not in LOADS:
            text = refusal(load_dataset, tmp_path, file, stage=stage)
            assert outcome in text, file
            assert str(tmp_path / file) in text
            continue
        rows = load_dataset(tmp_path, file, stage).train
        dropped = ", ".join(str(index) for _, index in rows.dropped) or "none"
        assert f"{len(rows)} rows, dropped {dropped}" == outcome, file


@pytest.mark.parametrize(("file", "whole", "numbers"), MIXTURES)
def test_proportions_are_taken_or_refused_by_name(
    file: str, whole: str, numbers: str, workspace: Any, tmp_path: Path
) -> None:
    from dataflex.config import load
    from dataflex.mixers.base import normalised
    from dataflex.mixers.static import proportions_of

    (tmp_path / "x.json").write_text(json.dumps([GOOD]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({name: {"file_name": "x.json"} for name in ("web", "code")}))
    keys = {"train_type": "dynamic_mix", "dataset": "web,code", "eval_dataset": None, "dataset_dir": str(tmp_path)}
    values = list(json.loads((FOLDER / file).read_text()).values())
    mixer = {"params": {"proportions": str(FOLDER / file)}}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        (whole, str(FOLDER / file), {"component_name": "static", "dataflex": mixer}),
        (numbers, "init_mixture_proportions", {"init_mixture_proportions": values, "dataflex": None}),
    ]
    for outcome, name, more in asked:
        path = workspace.write("run", **keys, **{"component_name": "odm", **more})
        try:
            given = load(path).keys.init_mixture_proportions
        except ConfigError as error:
            text = str(error)
            assert outcome in text
            assert text.count("\n") < 3
            assert all(name in line for line in text.splitlines()[1:])
            continue
        found = proportions_of(str(FOLDER / file), ("web", "code"), "x") if given is None else normalised(given)
        assert ", ".join(f"{share:.3f}" for share in found) == outcome


@pytest.mark.parametrize(("entry", "outcome"), REGISTRATIONS)
def test_registrations_are_refused_by_name(entry: str, outcome: str, workspace: Any, tmp_path: Path) -> None:
    from dataflex.config import load

    lay_out(tmp_path)
    file, _, name = entry.partition(": ")
    (tmp_path / "dataset_info.json").symlink_to(FOLDER / file)
    with pytest.raises(ConfigError) as raised:
        load(workspace.write("run", dataset=name, eval_dataset=None, val_size=0.5, dataset_dir=str(tmp_path)))
    assert outcome in short(str(raised.value), str(tmp_path / "dataset_info.json"))


@pytest.mark.slow
def test_what_loads_can_be_trained_on(workspace: Any, tmp_path: Path) -> None:
    names = [file for file in LOADS if not file.startswith("pt_")]
    lay_out(tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps({file: registration(file) for file in names}))
    keys = {"dataset_dir": str(tmp_path), "max_samples": 8, "cutoff_len": 48, "save_steps": 100}
    run = workspace.write("run", dataset=",".join(names), eval_dataset="three_rows.json", **keys)
    assert workspace.run("train", run)["rows"] > 80
