"""Batched per-example gradients equal those of one example at a time through plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import GradientSpec, Projection
from tests.architectures import MODELS, WHOLE, build, gradients, rows, vectors
from tests.reference import gradient_error


@pytest.fixture
def examples() -> list[dict[str, list[int]]]:
    return rows()


def expected(model: Any, examples: list[dict[str, list[int]]]) -> np.ndarray:
    """Return each example's gradient, parameters sorted by name: one example, the model's own loss, `backward`."""
    rows = []
    for example in examples:
        model.zero_grad()
        model(**{key: torch.tensor([value]) for key, value in example.items()}, use_cache=False).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        rows.append(torch.cat([grads[n].float().reshape(-1) for n in sorted(grads, key=_without_adapter)]).numpy())
    model.zero_grad()
    return np.stack(rows)


def _without_adapter(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", "")


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


@pytest.mark.parametrize("name", MODELS)
def test_equals_one_example_at_a_time(name: str, examples: list[dict[str, list[int]]]) -> None:
    model = build(name)
    wanted = expected(model, examples)
    for side in ("right", "left"):
        assert error(gradients(model, examples, padding_side=side), wanted) < 1e-5


@pytest.mark.parametrize("budget", [1, 20, 40, 10_000])
@pytest.mark.parametrize("name", ["qwen2_lora", "gpt2_full"])
def test_batch_composition_does_not_matter(name: str, budget: int, examples: list[dict[str, list[int]]]) -> None:
    model = build(name)
    order = np.random.default_rng(budget).permutation(len(examples))
    found = gradients(model, [examples[i] for i in order], token_budget=budget)
    assert error(found, expected(model, examples)[order]) < 1e-5


def test_memory_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, examples: list[dict[str, list[int]]]) -> None:
    model = build("gpt2_full")
    whole = gradients(model, examples)
    monkeypatch.setattr("dataflex.features.sketch.BLOCK_ELEMENTS", {"cpu": 500})
    assert error(gradients(model, examples), whole) < 1e-6


def test_padding_contributes_exactly_nothing(examples: list[dict[str, list[int]]]) -> None:
    model = build("llama_lora")
    for side in ("right", "left"):
        found = [
            FeatureEngine(model, pad_token_id=pad, padding_side=side).compute(examples, [WHOLE])[0].vectors
            for pad in (0, 17)
        ]
        np.testing.assert_array_equal(found[0], found[1])


def plain_checkpointing(model: Any, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


def llamafactory_checkpointing(model: Any) -> None:
    from llamafactory.model.model_utils.checkpointing import _gradient_checkpointing_enable

    base = model.get_base_model()
    base.gradient_checkpointing_enable = MethodType(_gradient_checkpointing_enable, base)
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.enable_input_require_grads()


@pytest.mark.parametrize("name", ["llama_lora", "opt_lora"])
@pytest.mark.parametrize(
    "enable",
    [partial(plain_checkpointing, use_reentrant=True), partial(plain_checkpointing, use_reentrant=False)],
    ids=["reentrant", "non_reentrant"],
)
def test_gradient_checkpointing(name: str, enable: Callable[[Any], None], examples: list[dict[str, list[int]]]) -> None:
    model = build(name)
    wanted = gradients(model, examples)
    enable(model)
    _check_checkpointed(model, wanted, examples)


def test_checkpointing_of_llamafactory(examples: list[dict[str, list[int]]]) -> None:
    model = build("llama_lora")
    wanted = gradients(model, examples)
    llamafactory_checkpointing(model)
    _check_checkpointed(model, wanted, examples)


def _check_checkpointed(model: Any, wanted: np.ndarray, examples: list[dict[str, list[int]]]) -> None:
    model.train()
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    functions = [layer._gradient_checkpointing_func for layer in layers]
    calls = []
    norm = next(m for m in layers[0].modules() if "norm" in type(m).__name__.lower())
    handle = norm.register_forward_hook(lambda *_: calls.append(1) if torch.is_grad_enabled() else None)
    found = gradients(model, examples, token_budget=10_000)
    handle.remove()
    assert len(calls) == 2, "the layer was not computed again in the backward pass, so nothing was checkpointed"
    assert error(found, wanted) < 1e-6
    assert [layer._gradient_checkpointing_func for layer in layers] == functions
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("mixed", [False, True], ids=["bfloat16", "autocast"])
def test_half_precision(mixed: bool, examples: list[dict[str, list[int]]]) -> None:
    model = build("llama_lora")
    wanted = expected(model, examples)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16) if mixed else nullcontext
    engine = FeatureEngine(model if mixed else model.to(torch.bfloat16), pad_token_id=0, autocast=autocast)
    assert gradient_error(engine, examples) < 4e-2, "one example at a time in the same precision"
    (values,) = engine.compute(examples, [WHOLE])
    assert 1e-5 < error(vectors(values), wanted) < 0.1, "float32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["sjlt", "rademacher", "srht"])
def test_gpu_agrees_with_cpu(kind: str, examples: list[dict[str, list[int]]]) -> None:
    spec = GradientSpec(projection=Projection(type=kind, dim=256))
    model = build("qwen2_lora")
    (wanted,) = FeatureEngine(model, pad_token_id=0).compute(examples, [spec])
    engine = FeatureEngine(model.cuda(), pad_token_id=0)
    (found,) = engine.compute(examples, [spec])
    assert error(vectors(found), vectors(wanted)) < 1e-4
    half = FeatureEngine(model.to(torch.bfloat16), pad_token_id=0)
    assert gradient_error(half, examples) < 0.1


def test_training_mode_gives_the_gradients_of_eval_mode(examples: list[dict[str, list[int]]]) -> None:
    from transformers.integrations.neftune import activate_neftune

    model = build("llama_lora")
    wanted = gradients(model, examples)
    activate_neftune(model, 5.0)
    model.train()
    for _ in range(2):
        np.testing.assert_array_equal(gradients(model, examples), wanted)


def test_leaves_no_trace(examples: list[dict[str, list[int]]]) -> None:
    model = build("llama_lora")
    model.train()
    model.get_base_model().model.norm.eval()
    model(
        input_ids=torch.tensor([examples[0]["input_ids"]]), labels=torch.tensor([examples[0]["labels"]])
    ).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = (
        {n: m.training for n, m in model.named_modules()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        {n: len(m._forward_hooks) for n, m in model.named_modules()},
        model.config.to_dict(),
    )
    random = torch.get_rng_state()
    with torch.no_grad():
        gradients(model, examples)
    assert torch.equal(torch.get_rng_state(), random)
    assert before == (
        {n: m.training for n, m in model.named_modules()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        {n: len(m._forward_hooks) for n, m in model.named_modules()},
        model.config.to_dict(),
    )
    assert grads.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if n in grads)


def test_module_that_runs_twice(examples: list[dict[str, list[int]]]) -> None:
    model = build("llama_lora")
    layers = model.get_base_model().model.layers
    layers[1].mlp = layers[0].mlp
    assert error(gradients(model, examples), expected(model, examples)) < 1e-5


def test_self_check_finds_agreement_and_disagreement(examples: list[dict[str, list[int]]]) -> None:
    model = build("llama_lora")
    engine = FeatureEngine(model, pad_token_id=0)
    assert gradient_error(engine, examples) < 1e-5
    projection = model.get_base_model().model.layers[0].self_attn.q_proj
    bypassed = projection.lora_B["default"]
    projection.lora_B["default"] = Bypass(bypassed)
    assert gradient_error(FeatureEngine(model, pad_token_id=0), examples) > 1e-2


class Bypass(nn.Linear):
    """A layer whose weight is also used where no hook can see it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.other = [linear]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.detach().t() + self.other[0](x)
