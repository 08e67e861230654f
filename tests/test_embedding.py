"""Pooled hidden states of a batch are those of one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from dataflex.errors import ConfigError
from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import EmbeddingSpec, FeatureSpec, LossSpec

EXAMPLES = [
    {"input_ids": tokens, "labels": [-100] * len(tokens)}
    for tokens in ([3, 4, 5, 6, 7], [9], [8, 8, 1, 2, 3, 4, 5, 6, 7])
]


def qwen() -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(**config)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {"vocab_size": 31, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**config)).eval()


def pooled(states: np.ndarray, pooling: str) -> np.ndarray:
    if pooling == "last":
        return states[-1]
    weights = np.ones(len(states)) if pooling == "mean" else np.arange(1, len(states) + 1)
    return (states * (weights / weights.sum())[:, None]).sum(axis=0)


@pytest.mark.parametrize("make", [qwen, gpt2])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "last", "position_weighted"])
@pytest.mark.parametrize("layer", [0, 2, -1])
def test_equals_one_example_at_a_time(make: Callable[[], Any], side: str, pooling: str, layer: int) -> None:
    model = make()
    spec = EmbeddingSpec(pooling=pooling, layer=layer)
    (found,) = FeatureEngine(model, pad_token_id=0, padding_side=side).compute(EXAMPLES, [spec])
    assert found.vectors is not None
    assert not found.status.any(), "an embedding needs no labels"
    for row, example in enumerate(EXAMPLES):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([example["input_ids"]]), output_hidden_states=True).hidden_states[
                layer
            ]
        wanted = pooled(states[0].double().numpy(), pooling)
        np.testing.assert_allclose(found.vectors[row], wanted, rtol=1e-4, atol=2e-6)
        assert found.scalars["norm"][row] == pytest.approx(np.linalg.norm(wanted), rel=1e-5)


def test_several_layers_and_the_loss_in_one_pass() -> None:
    model, calls = qwen(), []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    specs: list[FeatureSpec] = [EmbeddingSpec(), LossSpec(), EmbeddingSpec(pooling="last", layer=1)]
    engine = FeatureEngine(model, pad_token_id=0)
    engine.compute([], [LossSpec()])  # once, to see what the model does with its head
    calls.clear()
    together = engine.compute(EXAMPLES, specs)
    assert calls == [False]
    for spec, values in zip(specs, together, strict=True):
        (alone,) = engine.compute(EXAMPLES, [spec])
        np.testing.assert_array_equal(alone.status, values.status)
        if values.vectors is not None:
            np.testing.assert_array_equal(alone.vectors, values.vectors)


def test_an_attention_mask_of_the_example_counts() -> None:
    model = qwen()
    masked = {**EXAMPLES[0], "attention_mask": [0, 0, 1, 1, 1]}
    (found,) = FeatureEngine(model, pad_token_id=0).compute([masked], [EmbeddingSpec()])
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([masked["input_ids"]]),
            attention_mask=torch.tensor([masked["attention_mask"]]),
            output_hidden_states=True,
        )
    assert found.vectors is not None
    np.testing.assert_allclose(found.vectors[0], output.hidden_states[-1][0, 2:].mean(dim=0), rtol=1e-4, atol=2e-6)


def test_refuses_a_layer_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="states 0 to 3"):
        FeatureEngine(qwen(), pad_token_id=0).compute(EXAMPLES, [EmbeddingSpec(layer=4)])
