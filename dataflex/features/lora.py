"""LoRA layers in as few passes over the activations as they need, while features are taken.

A LoRA layer is y = x W^T + b + s (x A^T) B^T. PEFT computes its second part on the side, multiplies it by s, adds it:
three passes over (B, T, O) where the product can be added as it is formed; and autograd does the same again on the way
back. Here a layer is one function, which also hands over what the gradients of A and B are made of. That is so where W,
A and B are of one precision and nothing runs under autocast: in float32, or with `pure_bf16`. Under `bf16: true`
LLaMA-Factory keeps A and B in float32 beside a W in bfloat16, and layers run as PEFT has them.

B rows of a batch, T tokens, I/O layer in/out, r rank, s the adapter's scaling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from dataflex.features.capture import Taps


@contextmanager
def in_one(model: nn.Module, taps: Taps | None, tapped: Collection[nn.Module]) -> Iterator[None]:
    """Run a model's plain LoRA layers as one function each; the others run as they are.

    Args:
        model: in evaluation mode, where an adapter's dropout does nothing.
        taps: is handed the input of A and B and the gradients at their outputs; None where no gradient is taken.
        tapped: the modules whose parameters' gradients are taken; a layer whose W or b is among them runs as it is.
    """
    modules: list[Any] = [module for module in model.modules() if _is_plain(module)]
    layers = [module for module in modules if module.get_base_layer() not in tapped]
    for layer in layers:
        layer.forward = partial(_forward, layer, taps)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_plain(layer: Any) -> bool:
    """Say whether a layer is what the formula above says, and nobody looks into it."""
    if type(layer) is not Linear or "forward" in layer.__dict__:
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or len(layer.active_adapters) != 1 or layer.merged or layer.disable_adapters:
        return False
    (name,) = names
    parts = [layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]]
    if layer.lora_variant or layer.fan_in_fan_out or any(type(part) is not nn.Linear for part in parts):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in parts):
        return False
    if any(part._backward_hooks or part._backward_pre_hooks for part in parts):
        return False
    if parts[1].bias is not None or parts[2].bias is not None:
        return False
    weights = [part.weight for part in parts]
    return len({w.dtype for w in weights}) == 1 and not any(hasattr(w, "ds_id") for w in weights)


def _forward(layer: Any, taps: Taps | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = layer.get_base_layer()
    if args or kwargs or x.dtype != base.weight.dtype or torch.is_autocast_enabled(x.device.type):
        found: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return found
    (name,) = layer.active_adapters
    a, b, scale = layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name])
    if taps is None or not torch.is_grad_enabled():
        return _product(x, base.weight, base.bias, a.weight, b.weight, scale)[0]
    taps.count(a)
    taps.count(b)
    made: Tensor = _Lora.apply(x, taps.anchor, base, a, b, scale, taps)
    return made


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return y (..., O) and x A^T (..., r)."""
    inner = nn.functional.linear(x, a)
    y = nn.functional.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), b.t(), alpha=scale)
    return y, inner


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, base: Any, a: Any, b: Any, scale: float, taps: Taps) -> Tensor:
        y, inner = _product(x, base.weight, base.bias, a.weight, b.weight, scale)
        ctx.save_for_backward(x, inner)
        ctx.parts = base, a, b, scale, taps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, None, None]:
        x, inner = ctx.saved_tensors
        base, a, b, scale, taps = ctx.parts
        gy = grads[0]
        g_inner = (gy @ b.weight).mul_(scale)
        # The gradient at B's output is s gy; s goes to the smaller factor of the product that is B's gradient.
        taps.hand_over(b, inner * scale, gy)
        taps.hand_over(a, x, g_inner)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = gy @ base.weight
            gx.view(-1, gx.shape[-1]).addmm_(g_inner.view(-1, g_inner.shape[-1]), a.weight)
        return gx, None, None, None, None, None, None
