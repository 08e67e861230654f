"""`dataflex doctor --gradients` finds kernels and layers that let padding or other rows into a row's gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.config import load
from dataflex.doctor.gradients import TOLERANCES, refuse, report
from dataflex.errors import DataflexError
from dataflex.features.engine import FeatureEngine
from dataflex.features.invariance import CONDITIONS, chosen_rows, moved
from dataflex.pipelines.invariance import _takes_tf32
from tests.architectures import build
from tests.command import python, run

ROWS = [
    {"input_ids": [5, 9, 3, 7], "labels": [-100, -100, 3, 7]},
    {"input_ids": [8, 2, 4, 4, 6, 9, 1], "labels": [-100, 2, 4, 4, 6, 9, 1]},
    {"input_ids": [3, 3, 8, 1, 5], "labels": [-100, -100, -100, 1, 5], "attention_mask": [1, 1, 1, 1, 1]},
]


def measured(change: Callable[[torch.Tensor], torch.Tensor] | None) -> dict[str, float]:
    """How far gradients move in a model with a changed layer, by condition."""
    model = build("llama_lora")
    if change is not None:
        layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
        layer.register_forward_hook(lambda module, inputs, output: change(output))
    found = moved(FeatureEngine(model, pad_token_id=0, token_budget=1000), ROWS, pad_token_id=0)
    assert found.keys() == CONDITIONS.keys()
    return {name: each.most for name, each in found.items()}


def test_a_sound_model_moves_by_rounding() -> None:
    assert max(measured(None).values()) < TOLERANCES["float32"] / 10


def test_every_condition_sees_what_it_is_for() -> None:
    calls: list[int] = []

    def drifting(output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * (1 + 0.01 * len(calls))

    noisy = measured(drifting)
    assert min(noisy.values()) > 1e-3
    padded = measured(lambda output: output * (1 + 0.01 * output.shape[1]))
    assert padded["again"] < 1e-6
    assert padded["padded"] > 1e-3
    mixed = measured(lambda output: output + 0.1 * output.mean(dim=(0, 1), keepdim=True) * (len(output) > 1))
    assert max(mixed["again"], mixed["padded"]) < 1e-5
    assert min(mixed["together"], mixed["permuted"]) > 1e-3
    first = measured(lambda output: output + 0.1 * output[:1] * (len(output) > 1))
    assert first["permuted"] > 1e-3
    broken = measured(lambda output: output / (len(output) == 1))
    assert broken["together"] == np.inf


def test_rows_are_of_all_lengths_and_fit_a_batch() -> None:
    lengths = np.array([900, 10, 40, 7, 300, 300, 20, 5000])
    assert lengths[chosen_rows(lengths, 8192)].tolist() == [7, 10, 20, 40, 300, 300, 900]  # 5000: more than half
    for tokens in (100, 700, 2000, 8192):
        rows = chosen_rows(lengths, tokens)
        assert len(rows) >= 2
        assert len(set(rows)) == len(rows)
        assert len(rows) * lengths[rows].max() <= tokens
    assert chosen_rows(lengths, 4).tolist() == [3, 1]  # the two shortest, whatever they take
    assert chosen_rows(np.array([5]), 100).tolist() == [0]


@pytest.fixture
def mixing_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel in the place of sdpa that lets the rows of a batch into each other, as no kernel should."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sound = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mixing(*args: Any, **kwargs: Any) -> Any:
        output, weights = sound(*args, **kwargs)
        return output + 0.2 * (output.mean(dim=0, keepdim=True) - output), weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", mixing)


@pytest.mark.usefixtures("mixing_sdpa")
def test_a_kernel_that_mixes_rows_is_found_and_the_key_that_helps_is_named(workspace: Any) -> None:
    findings, plain = report(load(workspace.write("mixed")))
    assert (plain["within"], plain["attention"], plain["precision"]) == (False, "sdpa", "float32")
    assert plain["moved"]["padded"]["gradient"] < plain["tolerance"] < plain["moved"]["together"]["gradient"]
    assert max(each["gradient"] for each in plain["under_eager"].values()) < plain["tolerance"]
    levels = {finding.about: finding.level for finding in findings}
    assert levels[CONDITIONS["padded"]] == "ok"
    assert levels[CONDITIONS["together"]] == levels[CONDITIONS["permuted"]] == "error"
    with pytest.raises(
        DataflexError, match=r"all rows in one batch\); set flash_attn: disabled, under which they move"
    ):
        refuse(findings)
    assert not (workspace.folder / "store").exists()
    assert not (workspace.folder / "out/mixed/checkpoint-1").exists()


def test_a_run_without_gradients_needs_no_look(workspace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = workspace.write("plain", component_name="loss", dataflex={"store": str(workspace.folder / "store")})
    findings, plain = report(load(path))
    assert plain == {"asked_for": False, "within": True}
    assert "asks for no gradients" in findings[0].found
    refuse(findings)
    code, _, err = run(capsys, "doctor", "--gradients")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("dataflex: --gradients: found no run file")


@pytest.mark.slow
def test_the_command(workspace: Any) -> None:
    path = workspace.write("looked", component_name="cluster_less", bf16=True)
    done = python("-m", "dataflex.cli", "doctor", "--gradients", str(path), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["within"], found["precision"], found["tolerance"]) == (True, "bfloat16", TOLERANCES["bfloat16"])
    assert found["moved"].keys() == CONDITIONS.keys()
    status = json.loads((workspace.folder / "out/looked/status_doctor.json").read_text("utf-8"))
    assert (status["state"], status["exit_code"]) == ("finished", 0)


@pytest.mark.slow
def test_what_eager_attention_does_not_mend_is_said(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    sound = Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda self, x: sound(self, x) * (1 + 0.01 * len(x)))
    findings, plain = report(load(workspace.write("layer")))
    assert plain["within"] is False
    with pytest.raises(DataflexError, match=r"it is not the attention \(.* under flash_attn: disabled\)"):
        refuse(findings)


@pytest.mark.parametrize("name", ["gpt2_lora", "opt_lora"])
def test_rows_are_padded_no_longer_than_positions_go(name: str) -> None:
    """Positions that are learned end; where a row has nearly all of them, little can be padded."""
    rows = [{"input_ids": [1 + i % 8 for i in range(n)], "labels": [1 + i % 8 for i in range(n)]} for n in (20, 15)]
    found = moved(FeatureEngine(build(name), pad_token_id=0, token_budget=1000), rows, pad_token_id=0)
    assert max(each.most for each in found.values()) < TOLERANCES["float32"]


def test_tensor_float_is_asked_for_in_the_way_it_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the newer switch was used, torch refuses to read the older one."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert _takes_tf32()
        matmul.fp32_precision = "ieee"
        assert not _takes_tf32()
    finally:
        matmul.fp32_precision = before
