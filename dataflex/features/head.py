"""A causal model's output embedding, its *head*, run apart from the model: on supervised tokens alone, in chunks.

In instruction data one token in three or four is supervised, and logits are the largest thing that a language model
makes: at a vocabulary of 128k one token has 512 KB of them in float32. Here the model runs without its head; a loss
then takes the last hidden states of the supervised tokens, and no more than `CHUNK` logits exist at a time. Where
gradients are wanted, each chunk is differentiated as soon as its losses are there, so that a supervised token costs H
numbers beside its hidden state, whatever the vocabulary.

B rows of a batch, T tokens, M supervised ones among them, H hidden size, V numbers of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dataflex.features.cross_entropy import token_losses, wide
from dataflex.features.sharded import is_dealt_out

CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits that exist at a time: 16 MB float32 on a CPU, 256 MB bfloat16 on a GPU; of one token at least."""

_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda value: value,  # Cohere
    "logits_scaling": lambda value: 1 / value,  # Granite
    "lm_head_multiplier": lambda value: value,  # Falcon-H1
}
"""Keys of a configuration by which a model multiplies its head's output."""


@dataclass
class Head:
    """The head of a model, and what the model makes of its output.

    Attributes:
        module: the output embedding.
        finish: turns what the module gives into logits, element by element.
        width: V.
    """

    module: nn.Module
    finish: Callable[[Tensor], Tensor]
    width: int
    _runs: bool = field(default=False, repr=False)
    _autocast: tuple[str, torch.dtype, bool] = field(default=("cpu", torch.bfloat16, False), repr=False)

    @property
    def is_trained(self) -> bool:
        """Whether it has a parameter to train, whose gradient needs the head to run within the model."""
        return any(parameter.requires_grad for parameter in self.module.parameters())

    @contextmanager
    def apart(self) -> Iterator[list[Tensor]]:
        """Collect what the head is given, (B, T, H) of each forward pass, and let it see no token meanwhile."""
        given: list[Tensor] = []

        def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (states,) = inputs
            if self._runs:  # on a chunk: losses may be asked for before the block ends
                return inputs
            given.append(states)
            kind = states.device.type
            self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            return (states[:, :0],)

        handle = self.module.register_forward_pre_hook(take)
        try:
            yield given
        finally:
            handle.remove()

    def losses(self, states: Tensor, targets: Tensor, at: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of every target in nats, (B, T) float32 (float64 of such states), 0 without one.

        Args:
            states: (B, T, H), what the head was given.
            targets: (B, T) int64, the label of the next token; negative where there is none.
            at: (M,) positions of the supervised tokens among all B x T, if they are known: to find them waits for the
                device.
        """
        if at is None:
            at = supervised(targets)
        kind, dtype, enabled = self._autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):  # as the model had it when it came to its head
            found = _Losses.apply(states.flatten(0, 1)[at], targets.flatten()[at], self)
        return found.new_zeros(targets.numel()).index_put((at,), found).view_as(targets)

    def chunk(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return the losses (c,) of a chunk of tokens; states (c, H)."""
        self._runs = True
        try:
            logits = self.finish(self.module(states[None]))
        finally:
            self._runs = False
        return token_losses(logits, targets[None])[0]


def supervised(targets: Tensor) -> Tensor:
    """Return the positions (M,) of the supervised tokens among all B x T; waits for the device."""
    return (targets.flatten() >= 0).nonzero()[:, 0]


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: Head) -> Tensor:
        losses = states.new_empty(len(states), dtype=wide(states[:0]).dtype)
        slopes = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        step = max(1, CHUNK.get(states.device.type, 1 << 27) // head.width)
        for a in range(0, len(states), step):
            part = slice(a, a + step)
            if slopes is None:
                losses[part] = head.chunk(states[part], targets[part])
                continue
            # A token's loss depends on its own state alone: what its loss is multiplied by can come later.
            with torch.enable_grad():
                given = states[part].detach().requires_grad_()
                found = head.chunk(given, targets[part])
                losses[part] = found.detach()
                (slopes[part],) = torch.autograd.grad(found.sum(), [given])
        ctx.save_for_backward(*([] if slopes is None else [slopes]))
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        weight = grads[0][:, None]
        # Zero by filling, not by the product: a token that is left out may have NaN.
        return (wide(slopes) * weight).masked_fill_(weight == 0, 0.0).to(slopes.dtype), None, None


def find_head(model: Any, run: Callable[[list[int]], Any]) -> Head | None:
    """Return the head of a model that can be run apart from it, or None.

    None has a model without an output embedding; one that calls it more than once, or with anything but the last
    hidden states of all tokens; one that makes of its output what is not known here; and one whose weights are sharded,
    as they are at hand only in the course of the model's own pass.

    Args:
        model: the bare module.
        run: runs the model on one row of these tokens, as it will be run, and returns its output.
    """
    module = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(module, nn.Module) or any(hasattr(p, "ds_id") for p in module.parameters()):
        return None
    if is_dealt_out(model):
        return None
    seen: list[tuple[tuple[Any, ...], Any]] = []
    tokens = int(model.get_input_embeddings().weight.shape[0])

    def keep(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        seen.append((given, out.clone() if isinstance(out, Tensor) else out))  # the model may write into it

    handle = module.register_forward_hook(keep)
    try:
        # Not the token that pads: its embedding is often zero, and so would be all logits, whatever is made of them.
        logits = run([1 % tokens, 2 % tokens, 3 % tokens]).get("logits")
    finally:
        handle.remove()
    if len(seen) != 1 or not isinstance(logits, Tensor):
        return None
    ((given, raw),) = seen
    if len(given) != 1 or not isinstance(raw, Tensor) or given[0].dim() != 3 or raw.shape != logits.shape:
        return None
    if not bool((raw != raw[..., :1]).any()):
        return None
    for finish in _finishes(model):
        if torch.equal(finish(raw).float(), logits.float()):
            return Head(module, finish, raw.shape[-1])
    return None


def _finishes(model: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield what models are known to make of their head's output."""
    yield lambda raw: raw
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name, scale in _SCALES.items():
        if isinstance(value := getattr(config, name, None), int | float) and value:
            yield partial(torch.mul, other=scale(value))
            yield partial(torch.div, other=value)
    if isinstance(cap := getattr(config, "final_logit_softcapping", None), int | float) and cap:
        yield lambda raw: torch.tanh(raw / cap) * cap
