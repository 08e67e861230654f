"""`import dataflex` is light, and run files are read with values of Python's."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dataflex
from dataflex.api import run as api_run
from dataflex.api.run import _as_before
from dataflex.config import load
from dataflex.errors import ConfigError, ConflictError
from tests.command import ROOT, python


def test_nothing_is_imported_before_it_is_used(run_file: Path) -> None:
    code = """
import sys, dataflex
heavy = ("torch", "transformers", "llamafactory", "pydantic", "omegaconf", "numpy", "pyarrow", "datasets", "pandas")
print([name for name in heavy if name in sys.modules], set(dataflex.__all__) <= set(dir(dataflex)))
run = dataflex.load("run.yaml", seed=3)
print([name for name in ("torch", "transformers", "llamafactory", "datasets", "pandas") if name in sys.modules], run)
print(dataflex.open_store.__module__, dataflex.Run is type(run), hasattr(dataflex, "lode"))
"""
    done = python("-c", code)
    assert done.stdout.splitlines() == [
        "[] True",
        "[] Run('run.yaml', less, output_dir='out')",
        "dataflex.api.stores True False",
    ], done.stderr
    assert all(getattr(dataflex, name) is not None for name in dataflex.__all__)


def test_overrides_are_what_the_command_line_would_say(run_file: Path) -> None:
    said = load(
        "run.yaml",
        ["learning_rate=5e-5", "lora_target=[q_proj, v_proj]", "output_dir=other", "dataflex.params.proj_dim=64",
         "dataflex.params.seed=2", "dataflex.refresh={policy: rotating, refresh_fraction: 0.5}", "warmup_step="],
    )  # fmt: skip
    found = dataflex.load(
        Path("run.yaml"),
        learning_rate=np.float64(5e-5),
        lora_target=("q_proj", "v_proj"),
        output_dir=Path("other"),
        warmup_step=None,
        dataflex={"params": {"proj_dim": np.int64(64)}, "refresh": {"policy": "rotating", "refresh_fraction": 0.5}},
        **{"dataflex.params.seed": 2},
    ).settings
    assert found.llamafactory == said.llamafactory
    assert type(found.llamafactory["learning_rate"]) is float
    assert (found.keys, found.params, found.dataflex) == (said.keys, said.params, said.dataflex)
    assert type(found.params.proj_dim) is int


def test_a_mapping_of_ours_keeps_what_it_does_not_name(run_file: Path) -> None:
    text = run_file.read_text("utf-8")
    run_file.write_text(
        f"{text}dataflex:\n  store: kept\n  params: {{proj_dim: 128, seed: 5}}\n"
        "  refresh: {policy: rotating, refresh_fraction: 0.5}\n",
        "utf-8",
    )
    settings = dataflex.load(run_file, dataflex={"params": {"seed": 6}, "refresh": {"policy": "full"}}).settings
    assert settings.store_root == str(Path("kept").resolve())
    assert (settings.params.proj_dim, settings.params.seed) == (128, 6)
    assert settings.dataflex.refresh.policy == "full"
    assert dataflex.load(run_file, dataflex={"params": None}).settings.params.proj_dim == 8192


def test_everything_wrong_is_said_at_once_and_where(run_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        dataflex.load(
            run_file, learning_rat=1, seed=object(), template={"a": 2**60}, dataflex={"params": {"proj_dom": 3}}
        )
    text = str(caught.value)
    assert "dataflex.load: seed: found object; expected text, a number, true, false, a list, a mapping or None" in text
    assert "dataflex.load: template: found a whole number beyond" in text
    with pytest.raises(ConfigError) as caught:
        dataflex.load(run_file, learning_rat=1, dataflex={"params": {"proj_dom": 3}}, stage="dpo")
    text = str(caught.value)
    assert text.startswith("3 problems in the configuration:")
    assert "dataflex.load: learning_rat: found an unknown key" in text
    assert "did you mean 'proj_dim'?" in text
    assert "command line" not in text


@pytest.mark.parametrize(
    ("env", "keys", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, {}, "found a process of 2 (WORLD_SIZE)"),
        ({"FORCE_TORCHRUN": "1"}, {}, "found a launcher asked for by FORCE_TORCHRUN or USE_MCA"),
        ({}, {"deepspeed": "ds.json"}, "found deepspeed in the run file, which works under a launcher alone"),
        ({"LOCAL_RANK": "0", "RANK": "0"}, {}, "found LOCAL_RANK=0, RANK=0 without WORLD_SIZE"),
        ({"RANK": "no"}, {}, "environment variable RANK: found 'no'"),
    ],
    ids=["one of two", "forced", "deepspeed", "half a launcher", "no number"],
)
def test_several_processes_are_refused_with_the_way_out(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], keys: dict[str, str], said: str
) -> None:
    Path("ds.json").write_text('{"zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": "auto"}')
    run = dataflex.load(run_file, **keys)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        run.train()
    assert said in str(caught.value)
    if "environment" not in str(caught.value):
        assert "Use the command: dataflex train RUN.yaml" in str(caught.value)
    assert not Path("out").exists()


def test_one_verb_at_a_time(run_file: Path) -> None:
    run = dataflex.load(run_file)
    with api_run._busy, pytest.raises(ConflictError, match="featurize into out: another verb is at work"):
        run.featurize()
    assert not Path("out").exists()
    with pytest.raises(ConfigError, match="out: found no such folder"):
        _ = run.results


def test_what_the_page_names_is_there() -> None:
    text = (ROOT / "docs" / "python.md").read_text("utf-8") + (ROOT / "README.md").read_text("utf-8")
    things = {
        "run": dataflex.Run, "results": dataflex.RunResults, "choice": dataflex.Choice, "store": dataflex.Store,
        "dataflex": dataflex,
    }  # fmt: skip
    found = set(re.findall(r"(?<![\w./])(run|results|choice|store|dataflex)\.(\w+)\(", text))
    assert len(found) > 12
    assert [(thing, name) for thing, name in found if not hasattr(things[thing], name)] == []
    what_was_left = text.split("## What a run left")[1].split("### Joined")[0]
    named = [
        name
        for cell in re.findall(r"^\| (`.+?) \|", what_was_left, re.MULTILINE)
        for name in re.findall(r"`(\w+)", cell)
    ]
    assert len(named) > 12
    assert [name for name in named if not hasattr(dataflex.RunResults, name)] == []


def test_switches_of_the_process_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that asks for TF32 or determinism sets them for the process; the next one has not asked."""
    monkeypatch.setenv("KEPT", "before")
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()

    def run() -> None:
        matmul.fp32_precision = "tf32"
        torch.use_deterministic_algorithms(True)
        os.environ.update(CUBLAS_WORKSPACE_CONFIG=":16:8", KEPT="after")
        raise ValueError("ended")

    with pytest.raises(ValueError, match="ended"), _as_before():
        run()
    assert (matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()) == before
    assert os.environ["KEPT"] == "before"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_truth_values_of_numpy_are_taken(run_file: Path) -> None:
    assert dataflex.load(run_file, do_train=np.True_).settings.llamafactory["do_train"] is True
