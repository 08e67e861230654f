"""Bad data, registrations and models are told by every verb, by LLaMA-Factory's own training, by one process alone."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import ConfigError, DataflexError
from tests.bad_data import ASKED, GOOD, SHAREGPT, lines, turns
from tests.command import run
from tests.processes import TORCHRUN, TWO, ended

BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "text": ("one.json", "a mapping"),
    "null": (None, "a mapping"),
    "no name": ({}, "text.file_name"),
    "list": ({"file_name": ["one.json"]}, "file_name"),
    "columns": ({"file_name": "one.json", "columns": ["a"]}, "x.columns: found"),
    "no columns": ({"file_name": "one.json", "columns": None}, "x.columns: found"),
    "column": ({"file_name": "one.json", "columns": {"prompt": 5}}, "x.columns.prompt"),
    "misspelt": ({"file_name": "one.json", "columns": {"promt": "a"}}, "did you mean 'prompt'"),
    "tags": ({"file_name": "one.json", "tags": {"role": "a"}}, "x.tags.role"),
    "key": ({"file_name": "one.json", "formating": "sharegpt"}, "did you mean 'formatting'"),
    "formatting": ({"file_name": "one.json", "formatting": ["alpaca"]}, "x.formatting"),
    "ranking": ({"file_name": "one.json", "ranking": "false"}, "true or false"),
    "samples": ({"file_name": "one.json", "num_samples": "5"}, "a whole number"),
    "none": ({"file_name": "one.json", "num_samples": 0}, "a whole number"),
    "split": ({"file_name": "one.json", "split": 5}, "x.split"),
    "hub": ({"hf_hub_url": 5}, "x.hf_hub_url"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_registrations_are_refused_at_validate(case: str, workspace: Any, tmp_path: Path) -> None:
    from dataflex.config import load

    entry, said = BAD_ENTRIES[case]
    (tmp_path / "one.json").write_text(json.dumps([GOOD]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    path = workspace.write("run", dataset="x", eval_dataset="x", dataset_dir=str(tmp_path))
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert said.replace("text.", "x.") in str(raised.value)


def test_the_command_says_it_and_verbose_shows_how_it_arose(
    workspace: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.json").write_text(json.dumps([ASKED, turns(("human", "q"), ("gpt", None))]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json", **SHAREGPT}}))
    path = workspace.write("run", dataset="x", eval_dataset="x", dataset_dir=str(tmp_path))
    for flag in ([], ["-v"]):
        code, _, shown = run(capfd, *flag, "train", str(path))
        assert code == 1
        assert f"dataflex: dataset x ({tmp_path}/x.json), record 1: turn 1 has null as 'value'" in shown
        assert "Traceback" not in shown
        assert ("Traceback" in caplog.text) == bool(flag)  # pytest takes the log


def test_a_training_of_llamafactorys_own_says_it_as_well(workspace: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines(GOOD) + "\nnull\n")
    (tmp_path / "y.jsonl").write_text(lines(GOOD, {**GOOD, "output": 5}))
    names = ("x", "y")
    (tmp_path / "dataset_info.json").write_text(json.dumps({n: {"file_name": f"{n}.jsonl"} for n in names}))
    method = dict.fromkeys(("component_name", "warmup_step", "update_step", "update_times", "dataflex", "eval_dataset"))
    for name in names:
        path = workspace.write(name, dataset=name, dataset_dir=str(tmp_path), train_type="static", **method)
        with pytest.raises(DataflexError, match=rf"dataset {name} \({tmp_path}/{name}\.jsonl\): line 2: found"):
            workspace.run("train", path)


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
def test_a_damaged_model_is_named(workspace: Any, tiny: Any, tmp_path: Path, file: str) -> None:
    model = shutil.copytree(tiny.model, tmp_path / "model")
    (model / file).write_bytes((model / file).read_bytes()[:100])
    path = workspace.write("run", model_name_or_path=str(model))
    with pytest.raises(ConfigError, match=rf"{model} cannot be loaded: .* \(\w+\)$"):
        workspace.run("train", path)


ONE_RANK = """
from dataflex import distributed
from dataflex.errors import DataflexError
import torch
torch.distributed.init_process_group("gloo")
try:
    with distributed.together():
        if distributed.rank() == 1:
            raise DataflexError("met on rank 1")
except DataflexError as error:
    print(f"rank {distributed.rank()}: {error}, everywhere {error.everywhere}", flush=True)
"""


@pytest.mark.slow
def test_several_processes_end_together_and_one_says_it(workspace: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([ASKED, turns(("human", "q"), ("gpt", None))]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json", **SHAREGPT}}))
    path = workspace.write("run", dataset="x", eval_dataset="x", dataset_dir=str(tmp_path))
    status, said = ended([sys.executable, "-m", "dataflex.cli", "train", str(path)], **TWO)
    assert status != 0
    assert said.count(f"dataflex: dataset x ({tmp_path}/x.json), record 1: turn 1 has null") == 1
    script = tmp_path / "script.py"
    script.write_text(ONE_RANK)
    _, said = ended([*TORCHRUN, str(script)])
    # The two write at once, so a line's end may come behind the other's text.
    assert sorted(re.findall(r"rank (\d): met on rank 1, everywhere True", said)) == ["0", "1"]
