"""The engine gives each row the same numbers in any order and batch, and many features of one pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex.errors import DataflexError
from dataflex.features.adam import Moments, Scalars
from dataflex.features.batching import count_batches, plan_batches
from dataflex.features.engine import FeatureEngine
from dataflex.features.projection import build_projector
from dataflex.features.spec import EmbeddingSpec, FeatureSpec, FeatureValues, GradientSpec, LossSpec, Projection
from dataflex.rows import Status

VOCAB, POISON = 41, 40


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**config))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


@pytest.fixture
def examples() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    rows = []
    for length in (7, 3, 12, 7, 5, 9, 2):
        tokens = random.integers(1, POISON, length)
        labels = np.where(np.arange(length) < length // 3, -100, tokens)
        rows.append({"input_ids": tokens.tolist(), "labels": labels, "attention_mask": np.ones(length, dtype=np.int64)})
    return rows


def moments(model: Any) -> Moments:
    torch.manual_seed(1)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return Moments(
        {n: torch.randn(p.shape) * 1e-2 for n, p in named.items()},
        {n: torch.rand(p.shape) * 1e-3 for n, p in named.items()},
        {n: Scalars(9, 0.9, 0.999, 1e-8) for n in named},
    )


SPECS: list[FeatureSpec] = [
    LossSpec(),
    EmbeddingSpec(),
    GradientSpec(projection=Projection(dim=64)),
    GradientSpec(projection=Projection(type="srht", dim=32)),
    GradientSpec(direction="adam", projection=Projection(dim=64, seed=1)),
    GradientSpec(direction="adam", adam_variant="less_reference", projection=Projection(type="identity")),
]


def same(a: FeatureValues, b: FeatureValues, tolerance: float = 0.0) -> None:
    np.testing.assert_array_equal(a.status, b.status)
    assert a.scalars.keys() == b.scalars.keys()
    for name, column in a.scalars.items():
        assert column.dtype == b.scalars[name].dtype
        np.testing.assert_allclose(column, b.scalars[name], rtol=tolerance)
    assert (a.vectors is None) == (b.vectors is None)
    if a.vectors is not None and b.vectors is not None:
        np.testing.assert_allclose(a.vectors, b.vectors, rtol=0, atol=tolerance * np.abs(b.vectors).max())


def take(values: FeatureValues, rows: list[int]) -> FeatureValues:
    vectors = None if values.vectors is None else values.vectors[rows]
    return FeatureValues(values.status[rows], {n: c[rows] for n, c in values.scalars.items()}, vectors)


def test_loss_is_the_models_own(model: Any, examples: list[dict[str, Any]]) -> None:
    (found,) = FeatureEngine(model, pad_token_id=0).compute(examples, [LossSpec()])
    assert found.scalars["loss_sum"].dtype == np.float64
    assert found.scalars["tokens"].dtype == np.int32
    model.eval()
    for row, example in enumerate(examples):
        tensors = {name: torch.tensor(np.asarray(value))[None] for name, value in example.items()}
        mean = found.scalars["loss_sum"][row] / found.scalars["tokens"][row]
        assert mean == pytest.approx(model(**tensors).loss.item(), rel=1e-5)
        assert found.scalars["tokens"][row] == (np.asarray(example["labels"])[1:] != -100).sum()


def test_features_asked_for_together_are_those_asked_for_alone(model: Any, examples: list[dict[str, Any]]) -> None:
    """And come from one forward pass a batch."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    engine = FeatureEngine(model, pad_token_id=0, token_budget=24, moments=moments(model))
    engine.compute([], [LossSpec()])  # once, to see what the model does with its head
    calls.clear()
    together = engine.compute(examples, SPECS)
    assert len(calls) == count_batches([len(e["input_ids"]) for e in examples], 24) == 3
    for spec, values in zip(SPECS, together, strict=True):
        same(engine.compute(examples, [spec])[0], values, 1e-6)


def test_any_order_and_batch_gives_the_same(model: Any, examples: list[dict[str, Any]]) -> None:
    whole = FeatureEngine(model, pad_token_id=0, moments=moments(model)).compute(examples, SPECS)
    order = [3, 0, 6, 5, 1, 4, 2]
    for budget in (1, 20, 10_000):
        engine = FeatureEngine(model, pad_token_id=0, token_budget=budget, moments=moments(model))
        for part, values in zip(engine.compute([examples[i] for i in order], SPECS), whole, strict=True):
            same(part, take(values, order), 2e-5)


def test_projected_gradient_is_the_projection_of_the_gradient(model: Any, examples: list[dict[str, Any]]) -> None:
    engine = FeatureEngine(model, pad_token_id=0)
    projection = Projection(dim=64, sparsity=2)
    plain, found = engine.compute(
        examples, [GradientSpec(projection=Projection(type="identity")), GradientSpec(projection=projection)]
    )
    projector = build_projector(projection, {p.key: p.size for p in engine.parameters})
    y, at = projector.zeros(len(examples), torch.device("cpu"), torch.float64), 0
    assert plain.vectors is not None
    assert found.vectors is not None
    for p in sorted(engine.parameters, key=lambda p: p.key):
        projector.add(y, p.key, 0, torch.from_numpy(plain.vectors[:, at : at + p.size]).double())
        at += p.size
    np.testing.assert_allclose(found.vectors, projector.values(y).numpy(), rtol=0, atol=1e-6)


def test_rows_without_a_target(model: Any, examples: list[dict[str, Any]]) -> None:
    """No label, only the first token labelled, a single token: nothing to predict."""
    nothing = [
        {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
        {"input_ids": [5, 6, 7], "labels": [5, -100, -100]},
        {"input_ids": [5], "labels": [5]},
    ]
    engine = FeatureEngine(model, pad_token_id=0, moments=moments(model))
    found = engine.compute([nothing[0], *examples, *nothing[1:]], SPECS)
    bad = [0, len(examples) + 1, len(examples) + 2]
    for spec, values, healthy in zip(SPECS, found, engine.compute(examples, SPECS), strict=True):
        same(take(values, list(range(1, len(examples) + 1))), healthy, 2e-5)
        if isinstance(spec, EmbeddingSpec):
            assert (values.status == Status.OK).all()
            continue
        assert (values.status[bad] == Status.NO_LABELS).all()
        assert all((column[bad] == 0).all() for column in values.scalars.values())
        assert values.vectors is None or not values.vectors[bad].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["right", "left"])
def test_one_bad_row_harms_no_other(model: Any, examples: list[dict[str, Any]], value: float, side: str) -> None:
    model.get_input_embeddings().weight.data[POISON, 3] = value
    poisoned = {"input_ids": [4, 5, POISON, 6], "labels": [4, 5, POISON, 6]}
    engine = FeatureEngine(model, pad_token_id=0, padding_side=side, moments=moments(model))
    found = engine.compute([*examples[:3], poisoned, *examples[3:]], SPECS)
    healthy = engine.compute([*examples[:3], {**poisoned, "input_ids": [4, 5, 7, 6]}, *examples[3:]], SPECS)
    rest = [0, 1, 2, 4, 5, 6, 7]
    for values, wanted in zip(found, healthy, strict=True):
        same(take(values, rest), take(wanted, rest))
        assert values.status[3] == Status.NONFINITE
        assert all(column[3] == 0 for column in values.scalars.values())
        assert values.vectors is None or not values.vectors[3].any()
        assert values.vectors is None or np.isfinite(values.vectors).all()


def test_overflow_in_one_gradient_only(model: Any, examples: list[dict[str, Any]]) -> None:
    """A finite loss may have an infinite Adam direction; the loss stays usable."""
    bad = moments(model)
    name = next(iter(bad.scalars))
    bad.exp_avg[name][0, 0] = float("inf")
    loss, plain, adam = FeatureEngine(model, pad_token_id=0, moments=bad).compute(
        examples, [LossSpec(), GradientSpec(), GradientSpec(direction="adam")]
    )
    assert not loss.status.any()
    assert not plain.status.any()
    assert (adam.status == Status.NONFINITE).all()
    assert adam.vectors is not None
    assert not adam.vectors.any()


def test_ranks_can_run_the_same_number_of_batches(model: Any, examples: list[dict[str, Any]]) -> None:
    counted = {"forward": 0, "backward": 0}

    def forward(*_: object) -> None:
        counted["forward"] += 1

    def backward(*_: object) -> None:
        counted["backward"] += 1

    model.get_base_model().model.layers[1].register_full_backward_hook(backward)
    model.register_forward_pre_hook(forward)
    engine = FeatureEngine(model, pad_token_id=0, token_budget=20)
    specs: list[FeatureSpec] = [LossSpec(), GradientSpec()]
    engine.compute([], [LossSpec()])  # once, to see what the model does with its head
    counted.update(forward=0)
    alone = engine.compute(examples, specs)
    own = counted["forward"]
    assert own == count_batches([len(e["input_ids"]) for e in examples], 20)
    counted.update(forward=0, backward=0)
    padded = engine.compute(examples, specs, min_batches=own + 3)
    assert counted == {"forward": own + 3, "backward": own + 3}
    for a, b in zip(padded, alone, strict=True):
        same(a, b)
    counted.update(forward=0, backward=0)
    loss, gradient = engine.compute([], specs, min_batches=2)
    assert counted == {"forward": 2, "backward": 2}
    assert len(loss.status) == 0
    assert gradient.vectors is not None
    assert gradient.vectors.shape == (0, 8192)


@pytest.mark.parametrize("budget", [1, 10, 16, 1000])
def test_plan_of_batches(budget: int) -> None:
    lengths = np.random.default_rng(budget).integers(1, 12, 50)
    plan = plan_batches(lengths, budget)
    assert sorted(np.concatenate(plan).tolist()) == list(range(50))
    assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= budget for rows in plan)
    assert all(lengths[a].min() >= lengths[b].max() for a, b in itertools.pairwise(plan))
    assert count_batches(lengths, budget) == len(plan)
    assert plan_batches([], budget) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: {**e, "attention_mask": [1, 1, 1, 2, 2, 2, 2]}, "neat_packing"),
        (lambda e: {**e, "labels": [1, 2]}, "7 tokens, 2 labels"),
        (lambda e: {"input_ids": [], "labels": []}, "not empty"),
    ],
)
def test_refuses_malformed_examples(
    model: Any, examples: list[dict[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataflexError, match=message):
        FeatureEngine(model, pad_token_id=0).compute([change(examples[0])], [LossSpec()])


def test_model_is_restored_after_an_error(model: Any, examples: list[dict[str, Any]]) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(DataflexError):
        FeatureEngine(model, pad_token_id=0).compute([{**examples[0], "labels": [1]}], [GradientSpec()])
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in trainable)
    assert not any(m._forward_hooks for m in model.modules())
