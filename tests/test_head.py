"""The head run apart from the model: the same losses and slopes, logits of a chunk alone, and when it is left in."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dataflex.features import head as heads
from dataflex.features.engine import FeatureEngine
from dataflex.features.head import Head, find_head
from dataflex.features.spec import EmbeddingSpec, LossSpec

IDS = torch.tensor([[5, 9, 2, 7, 1, 4], [3, 3, 8, 6, 2, 0]])
TARGETS = torch.tensor([[-100, 2, 7, 1, -100, -100], [3, -100, -100, -100, 0, -100]])
SIZES: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0},
}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "cap": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 0.02}),
    "multiplied": ("cohere", {"logit_scale": 0.25}),
    "divided": ("granite", {"logits_scaling": 7.0}),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}),
    "opt": (
        "opt",
        {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50},
    ),
}
"""Name -> the architecture and its own sizes."""


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kind, own = KINDS[name]
    config: Any = AutoConfig.for_model(kind, **{**(SIZES if kind not in ("gpt2", "opt") else {}), **own, **more})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def find(model: Any) -> Head | None:
    def run(tokens: list[int]) -> Any:
        with torch.no_grad():
            return model(input_ids=torch.tensor([tokens]))

    return find_head(model, run)


def plain(logits: Tensor) -> Tensor:
    """Token losses (B, T) of whole logits, by torch's own cross-entropy."""
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="none", ignore_index=-100)
    return flat.view_as(TARGETS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llama", "tied", "cap", "multiplied", "divided", "gpt2", "opt"])
def test_losses_and_slopes_are_those_of_whole_logits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "CHUNK", {"cpu": 100})  # two tokens at a time
    model = build(name).to(dtype)
    found = find(model)
    assert found is not None
    weight = torch.rand(TARGETS.shape, dtype=dtype)
    embedded = model.get_input_embeddings().weight
    wanted = plain(model(input_ids=IDS).logits)
    (wanted_slope,) = torch.autograd.grad((wanted * weight).sum(), [embedded])
    with found.apart() as states:
        assert model(input_ids=IDS).logits.shape == (2, 0, 50)
    got = found.losses(states[0], TARGETS)
    model.requires_grad_(False)  # the head is not trained; what is below it may be
    embedded.requires_grad_()
    with found.apart() as states:
        model(input_ids=IDS)
    if name in ("llama", "cap", "multiplied", "divided") and not model.config.tie_word_embeddings:
        (slope,) = torch.autograd.grad((found.losses(states[0], TARGETS) * weight).sum(), [embedded])
        torch.testing.assert_close(slope, wanted_slope)
    torch.testing.assert_close(got, wanted)
    assert (got[TARGETS < 0] == 0).all()


def test_no_more_logits_exist_than_a_chunk_has() -> None:
    """Of a vocabulary of 128k, 300 supervised tokens would have 154 MB of them."""
    model = build("llama", vocab_size=128_000)
    found = find(model)
    assert found is not None
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, given, out: sizes.append(out.numel()))
    states = torch.randn(3, 100, 16, requires_grad=True)
    seen: list[weakref.ref[Tensor]] = []

    def save(tensor: Tensor) -> Tensor:
        seen.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        losses = found.losses(states, torch.randint(0, 128_000, (3, 100)))
    kept = [t for t in (ref() for ref in seen) if t is not None and t.is_floating_point()]
    assert [t.shape for t in kept] == [(300, 16)]  # until the backward pass a token costs H numbers
    losses.sum().backward()
    assert max(sizes) <= heads.CHUNK["cpu"]
    assert sum(sizes) == 300 * 128_000


def test_a_token_that_is_left_out_may_have_nan() -> None:
    model = build("llama").requires_grad_(False)
    found = find(model)
    assert found is not None
    states = torch.randn(2, 6, 16)
    states[0, 1] = torch.nan
    states.requires_grad_()
    losses = found.losses(states, TARGETS)
    assert losses[0, 1].isnan()
    assert losses[0, 2].isfinite()
    torch.where(losses.isnan(), 0.0, losses).sum().backward()
    assert states.grad is not None
    assert states.grad.isfinite().all()
    assert states.grad[0, 2].abs().sum() > 0


def test_a_row_without_labels_has_no_loss() -> None:
    model = build("llama").requires_grad_(False)
    found = find(model)
    assert found is not None
    states = torch.randn(2, 6, 16, requires_grad=True)
    losses = found.losses(states, torch.full((2, 6), -100))
    assert losses.shape == (2, 6)
    assert not losses.any()
    losses.sum().backward()
    assert states.grad is not None
    assert not states.grad.any()


def test_half_precision_and_autocast_are_those_of_the_model() -> None:
    for model, context in (
        (build("llama").bfloat16(), torch.autocast("cpu", enabled=False)),
        (build("llama"), torch.autocast("cpu", dtype=torch.bfloat16)),
    ):
        found = find(model)
        assert found is not None
        with torch.no_grad():
            with context:
                wanted = plain(model(input_ids=IDS).logits.float())
                with found.apart() as states:
                    model(input_ids=IDS)
            assert found.losses(states[0], TARGETS).dtype == torch.float32
            torch.testing.assert_close(found.losses(states[0], TARGETS), wanted, rtol=1e-5, atol=1e-5)


class Changed(LlamaForCausalLM):
    """Makes of its head's output what no configuration tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out: Any = super().forward(*args, **kwargs)
        out.logits = out.logits.sort(dim=-1).values
        return out


class InPlace(LlamaForCausalLM):
    """Writes into its head's output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out: Any = super().forward(*args, **kwargs)
        with torch.no_grad():
            out.logits[:, :, 10:12] = torch.finfo(out.logits.dtype).min
        return out


class Scaled(nn.Module):
    """An output embedding that does not say how many logits it gives, with a parameter that is one number."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(states) * self.factor
        return found


class Twice(LlamaForCausalLM):
    """Calls its head twice."""

    def forward(self, input_ids: Any = None, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        out: Any = super().forward(input_ids, logits_to_keep=logits_to_keep, **kwargs)
        self.lm_head(torch.zeros(1, 2, 16))
        return out


@pytest.mark.parametrize("kind", [Changed, InPlace, Twice])
def test_a_head_that_is_not_understood_stays_in_the_model(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SIZES)).eval()
    assert find(model) is None
    row = {"input_ids": IDS[0].tolist(), "labels": [-100, -100, 2, 7, 1, -100]}
    (found,) = FeatureEngine(model, pad_token_id=0).compute([row], [LossSpec()])
    wanted = plain(model(input_ids=IDS).logits)[0].sum()
    assert found.scalars["loss_sum"][0] == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_a_head_need_not_say_how_wide_it_is() -> None:
    model = build("llama")
    model.lm_head = Scaled(model.lm_head)
    found = find(model)
    assert found is not None
    with found.apart() as states:
        model(input_ids=IDS)
    wanted = plain(model(input_ids=IDS).logits)
    torch.testing.assert_close(found.losses(states[0], TARGETS), wanted, rtol=1e-5, atol=1e-5)


def test_embeddings_of_a_head_that_stays_form_one_logit_a_row() -> None:
    torch.manual_seed(0)
    model = Twice(LlamaConfig(**SIZES)).eval()
    tokens: list[int] = []
    engine = FeatureEngine(model, pad_token_id=0)
    engine.compute([], [LossSpec()])
    model.lm_head.register_forward_hook(lambda _, given, out: tokens.append(given[0].shape[1]))
    engine.compute([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], [EmbeddingSpec()])
    assert tokens[-2:] == [1, 2]  # its own, then the second call of the double


def test_embeddings_run_no_head() -> None:
    model, tokens = build("llama"), []
    engine = FeatureEngine(model, pad_token_id=0)
    engine.compute([], [LossSpec()])
    model.lm_head.register_forward_hook(lambda _, given, out: tokens.append(given[0].numel()))
    engine.compute([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], [EmbeddingSpec()])
    assert tokens == [0]


def test_losses_run_the_head_on_supervised_tokens_alone() -> None:
    model, tokens = build("llama"), []
    engine = FeatureEngine(model, pad_token_id=0)
    engine.compute([], [LossSpec()])
    model.lm_head.register_forward_hook(lambda _, given, out: tokens.append(given[0].numel() // 16))
    engine.compute([{"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]}], [LossSpec()])
    assert tokens == [0, 2]
