"""Losses with and without the prompt are losses of the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex.features.engine import FeatureEngine
from dataflex.features.excerpt import excerpt
from dataflex.features.spec import GradientSpec, LossSpec

WITH, ALONE = LossSpec(first_token="drop"), LossSpec(given="nothing")


def example(prompt: int, turns: list[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    """A row of a prompt, then of turns: so many supervised tokens, so many that are not."""
    labels = [-100] * prompt
    random = np.random.default_rng(seed)
    for supervised, others in turns:
        labels += [1] * supervised + [-100] * others
    ids = random.integers(1, 40, len(labels)).tolist()
    return {
        "input_ids": ids,
        "labels": [i if label > 0 else -100 for i, label in zip(ids, labels, strict=True)],
        "attention_mask": [1] * len(ids),
        "images": None,
    }


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size)).eval()


ROWS = [
    example(5, [(4, 0)]),
    example(3, [(2, 3), (4, 0)], 1),  # several turns: only the very first token has no predecessor
    example(0, [(6, 0)], 2),  # no prompt: the two are the same
    example(4, [(2, 2)], 3),
]


def test_both_are_means_over_the_same_tokens_and_equal_the_models_own_loss(model: Any) -> None:
    engine = FeatureEngine(model, pad_token_id=0)
    found = {spec: engine.compute([excerpt(r, spec) for r in ROWS], [spec])[0].scalars for spec in (WITH, ALONE)}
    np.testing.assert_array_equal(found[WITH]["tokens"], found[ALONE]["tokens"])
    for i, row in enumerate(ROWS):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        first = row["labels"].index(next(x for x in row["labels"] if x != -100))
        with torch.no_grad():
            whole, cut = model(input_ids=ids).logits[0].double(), model(input_ids=ids[:, first:]).logits[0].double()
        counted = [t for t in range(first + 1, ids.shape[1]) if row["labels"][t] != -100]
        assert found[WITH]["tokens"][i] == len(counted)
        for spec, logits, start in ((WITH, whole, 0), (ALONE, cut, first)):
            expected = -sum(float(torch.log_softmax(logits[t - 1 - start], 0)[labels[0, t]]) for t in counted)
            np.testing.assert_allclose(found[spec]["loss_sum"][i], expected, rtol=1e-5)


def test_a_row_of_one_supervised_token_has_neither(model: Any) -> None:
    engine = FeatureEngine(model, pad_token_id=0)
    for spec in (WITH, ALONE):
        (found,) = engine.compute([excerpt(example(3, [(1, 0)]), spec)], [spec])
        assert found.scalars["tokens"].tolist() == [0]


def test_everything_else_sees_the_whole_example() -> None:
    row = ROWS[0]
    assert excerpt(row, LossSpec()) is row
    assert excerpt(row, GradientSpec()) is row
    assert row["labels"][5] != -100  # nor is it changed for the others


def test_recipes_name_what_acts() -> None:
    assert LossSpec().recipe() == {"kind": "loss"}
    assert WITH.recipe() == {"kind": "loss", "first_token": "drop"}
    assert ALONE.recipe() == LossSpec(given="nothing", first_token="drop").recipe()
