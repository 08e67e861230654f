"""What has no exact rule for per-example gradients is refused by name, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dataflex.errors import DataflexError
from dataflex.features.engine import FeatureEngine
from tests.architectures import build, gradients, llama, lora, mixtral, opt, rows


@pytest.fixture
def examples() -> list[dict[str, list[int]]]:
    return rows()


class Scaled(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.scale = model, nn.Parameter(torch.ones(()))
        self.config = model.config

    def forward(self, **inputs: torch.Tensor) -> object:
        return self.inner(**inputs)


def batch_norm() -> Any:
    model = lora(llama())
    model.get_base_model().model.extra = nn.BatchNorm1d(3)
    return model


def unused() -> Any:
    model = lora(llama())
    model.get_base_model().model.extra = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora(llama(), use_dora=True), "lora_magnitude_vector.*DoRA"),
        (batch_norm, "batch norm"),
        (lambda: lora(mixtral(output_router_logits=True), target_modules=["q_proj"]), "auxiliary loss"),
        (lambda: Scaled(llama()), "scale belongs to Scaled"),
        (lambda: mixtral(), "MixtralExperts"),
        (lambda: llama().requires_grad_(False), "no trainable parameter"),
        (unused, r"extra\.weight is trainable, but its module did not run"),
        (opt, "OPTLearnedPositionalEmbedding.*one tensor in"),
        (lambda: lora(opt(), target_modules=["fc1"]), r"given \(136, 4\) for a batch of 8 rows"),
    ],
)
def test_refuses_what_has_no_exact_rule(
    make: Callable[[], Any], message: str, examples: list[dict[str, list[int]]]
) -> None:
    model = make()
    with pytest.raises(DataflexError, match=message):
        gradients(model, examples)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora(llama(), use_dora=True), "DoRA"),
        (lambda: mixtral(), "MixtralExperts"),
        (unused, r"extra\.weight is trainable, but its module did not run"),
        (opt, "OPTLearnedPositionalEmbedding.*one tensor in"),
        (lambda: lora(opt(), target_modules=["fc1"]), "they cannot be told apart"),
    ],
)
def test_one_row_shows_that_a_parameter_has_no_rule(
    make: Callable[[], Any], message: str, examples: list[dict[str, list[int]]]
) -> None:
    with pytest.raises(DataflexError, match=message):
        FeatureEngine(make(), pad_token_id=0).require_rules(examples)


@pytest.mark.parametrize("name", ["llama_tied_saved_both", "gpt2_full", "mixtral_lora"])
def test_what_has_rules_is_not_refused(name: str, examples: list[dict[str, list[int]]]) -> None:
    model = build(name)
    FeatureEngine(model, pad_token_id=0).require_rules(examples)
    assert all(parameter.grad is None for parameter in model.parameters())
