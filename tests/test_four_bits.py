"""Adapters over a base that bitsandbytes holds in 4 bits (QLoRA): gradients are exact, and keyed by how it is held."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.config.loading import load
from dataflex.errors import ConfigError
from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import GradientSpec, LossSpec, Projection
from dataflex.llamafactory.loaded import keep_one_arithmetic
from tests.architectures import lora
from tests.reference import gradient_error
from tests.workspace import NAMES, assert_equal_weights, cut_back, in_force, logged, mix

pytest.importorskip("bitsandbytes")


def model_of(folder: Any, **how: Any) -> Any:
    """Load a model as LLaMA-Factory does under `quantization_bit: 4`, with an adapter."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **how}
    held = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.float32, **how
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=held, dtype=torch.float32, device_map={"": "cpu"}
    )
    model = lora(base)
    keep_one_arithmetic(model)
    return model.eval()


@pytest.mark.parametrize("how", [{}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}])
def test_gradients_equal_one_row_at_a_time(tiny: Any, how: dict[str, Any]) -> None:
    model = model_of(tiny.model, **how)
    assert type(model.base_model.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    draws = np.random.default_rng(0)
    tokens = [draws.integers(3, 60, size).tolist() for size in (3, 17, 9, 5)]
    rows = [{"input_ids": t, "labels": [-100, *t[1:]], "attention_mask": [1] * len(t)} for t in tokens]
    engine = FeatureEngine(model, pad_token_id=0)
    assert gradient_error(engine, rows) < 1e-5
    spec = GradientSpec(projection=Projection(type="sjlt", dim=512))
    together, losses = engine.compute(rows, [spec, LossSpec()])
    alone = [engine.compute([row], [spec, LossSpec()]) for row in rows]
    for n, (gradient, loss) in enumerate(alone):
        assert together.vectors is not None
        assert gradient.vectors is not None
        np.testing.assert_allclose(together.vectors[n], gradient.vectors[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(losses.scalars["loss_sum"][n], loss.scalars["loss_sum"][0], rtol=1e-5)


def test_evaluation_leaves_the_arithmetic_of_training(tiny: Any) -> None:
    model = model_of(tiny.model)
    tokens = torch.arange(3, 20)[None]
    before = torch.autograd.grad(model(tokens, labels=tokens).loss, [p for p in model.parameters() if p.requires_grad])
    with torch.no_grad():
        in_evaluation = model.eval()(tokens).logits
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(model(tokens).logits, in_evaluation, rtol=1e-5, atol=1e-5)
    after = torch.autograd.grad(model(tokens, labels=tokens).loss, [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def trained(workspace_class: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A workspace with a finished run of LESS over 4 bits."""
    space = workspace_class(tmp_path_factory.mktemp("four_bits"), tiny)
    space.run("train", space.write("four", quantization_bit=4, lora_dropout=0.0))
    return space


def summary(space: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((space.folder / "out" / name / "dataflex_summary.json").read_text("utf-8"))
    return found


def test_a_run_chooses_by_gradients_over_4_bits_and_finds_them_again(trained: Any) -> None:
    first = summary(trained, "four")
    assert first["computed"] > 0
    trained.run("train", trained.write("again", quantization_bit=4, lora_dropout=0.0))
    again = summary(trained, "again")
    assert (again["computed"], again["reused"]) == (0, first["computed"])
    weights, same = trained.weights("four"), trained.weights("again")
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


@pytest.mark.parametrize("other", [{"quantization_bit": None}, {"quantization_type": "fp4"}])
def test_another_way_of_holding_the_base_is_another_name(trained: Any, other: dict[str, Any]) -> None:
    values = {"quantization_bit": 4, "lora_dropout": 0.0, "warmup_step": 0, "update_times": 1, **other}
    name = "-".join(map(str, other))
    trained.run("train", trained.write(name, **values))
    assert summary(trained, name)["reused"] == 0


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"quantization_bit": 8}, "quantization_bit: found bitsandbytes in 8 bits; expected bitsandbytes in 4 bits"),
        (
            {"quantization_bit": 8, "component_name": "loss", "dataflex": None, "eval_dataset": None},
            "no row has values of its own",
        ),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_bit: found hqq; expected bitsandbytes"),
    ],
)
def test_what_is_not_exact_is_refused(workspace: Any, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load(workspace.write("run", **keys))


@pytest.mark.slow
def test_what_is_resumed_ends_as_the_uninterrupted_run(trained: Any) -> None:
    out = trained.folder / "out"
    cut_back(shutil.copytree(out / "four", out / "resumed"), 4, rounds=2)
    trained.run("train", trained.write("resumed", quantization_bit=4, lora_dropout=0.0))
    assert trained.rounds("resumed") == trained.rounds("four")
    assert_equal_weights(trained.weights("resumed"), trained.weights("four"))


@pytest.mark.slow
def test_a_weighter_of_equal_weights_trains_as_nothing_does_and_a_mixer_moves_its_shares(trained: Any) -> None:
    """Over 4 bits: the loss whose logits are formed where labels are, on LLaMA-Factory's rows in their order."""
    once: dict[str, Any] = {"dataset": ",".join(NAMES), "eval_dataset": None, "lora_dropout": 0.0, "warmup_step": None}
    once |= {
        "update_step": None,
        "update_times": None,
        "quantization_bit": 4,
        "save_strategy": "no",
        "save_steps": None,
    }
    trained.run(
        "train", trained.write("plain", **once, train_type="static", component_name=None, max_steps=4, dataflex=None)
    )
    equal = {"store": str(trained.folder / "store"), "params": {"strategy": "uniform"}}
    keys = {"train_type": "dynamic_weight", "component_name": "loss", "train_step": 4}
    trained.run("train", trained.write("equal", **once, **keys, dataflex=equal))
    np.testing.assert_allclose(logged(trained, "equal"), logged(trained, "plain"), rtol=1e-4)
    path = mix(trained, "mixed", component_name="odm", quantization_bit=4, train_step=6)
    trained.run("train", path)
    shares = [line["proportions"] for line in in_force(trained, "mixed")]
    assert len({tuple(each.values()) for each in shares}) > 1
    assert np.isfinite(logged(trained, "mixed")).all()
