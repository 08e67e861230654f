"""Batched per-example gradients against one example at a time through plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dataflex.errors import DataflexError
from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import FeatureValues, GradientSpec, Projection
from tests.reference import gradient_error

VOCAB = 61
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WHOLE = GradientSpec(projection=Projection(type="identity"))


def lora(model: Any, **config: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear", **config}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide mistakes in A
            nn.init.normal_(parameter, std=0.2)
    return model


def llama(**config: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **config))


def gpt2() -> GPT2LMHeadModel:
    config: dict[str, Any] = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**config))


def opt() -> OPTForCausalLM:
    config: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 32}
    config |= {"hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 40, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**config))


def mixtral(**config: Any) -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SMALL, **{"num_local_experts": 4, **config}))


def bias_only(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def saved(modules: list[str], more: int = 0, **config: Any) -> Any:
    """LoRA beside whole modules that are trained, of a model with `more` new tokens."""
    model = llama(**config)
    model.resize_token_embeddings(VOCAB + more, mean_resizing=False)
    return lora(model, target_modules=["q_proj", "down_proj"], modules_to_save=modules)


MODELS = {
    "llama_lora": lambda: lora(llama()),
    "llama_lora_bias": lambda: lora(llama(attention_bias=True), lora_bias=True),
    "llama_lora_and_biases": lambda: lora(llama(attention_bias=True), bias="all"),
    "llama_rslora": lambda: lora(llama(), use_rslora=True),
    "llama_modules_to_save": lambda: lora(llama(), target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"]),
    # what LLaMA-Factory's additional_target becomes, and what it sets itself for new tokens
    "llama_tied_saved_embedding": lambda: saved(["embed_tokens"], tie_word_embeddings=True),
    "llama_tied_saved_both": lambda: saved(["embed_tokens", "lm_head"], tie_word_embeddings=True),
    "llama_resized_saved_both": lambda: saved(["embed_tokens", "lm_head"], more=3),
    "llama_full_tied": lambda: llama(tie_word_embeddings=True),
    "qwen2_lora": lambda: lora(Qwen2ForCausalLM(Qwen2Config(**SMALL))),
    "qwen2_full": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3_full": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gpt2_lora": lambda: lora(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "gpt2_full": gpt2,
    "gpt2_biases": lambda: bias_only(gpt2()),
    "opt_lora": lambda: lora(opt(), target_modules=["q_proj", "v_proj"]),
    "mixtral_lora": lambda: lora(mixtral(), target_modules=["q_proj", "o_proj"]),
}


@pytest.fixture
def examples() -> list[dict[str, list[int]]]:
    """Rows of 2 to 17 tokens: all supervised, none of the prompt, only the last, and holes in between."""
    random, rows = np.random.default_rng(0), []
    for length, masked in [(9, 0), (2, 1), (17, 8), (12, 11), (9, 3), (5, 0), (17, 2), (11, 0)]:
        tokens = random.integers(0, VOCAB, length)
        labels = tokens.copy()
        labels[:masked] = -100
        labels[3::4] = -100 if length > 10 and masked < 10 else labels[3::4]
        rows.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    return rows


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


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


def gradients(model: Any, examples: list[dict[str, list[int]]], **settings: Any) -> np.ndarray:
    (values,) = FeatureEngine(model, pad_token_id=0, **settings).compute(examples, [WHOLE])
    return vectors(values)


def vectors(values: FeatureValues) -> np.ndarray:
    assert values.vectors is not None
    assert not values.status.any()
    return values.vectors


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
    handle = norm.register_forward_hook(lambda *_: calls.append(1))
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
