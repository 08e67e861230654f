"""Taps on modules: hand over a module's input and the gradient at its output, in the course of one backward pass.

A tap is an identity on the module's output. It keeps the input with `save_for_backward`, so gradient checkpointing
drops it and makes it again like any other saved tensor; and it depends on one scalar that all taps share, the *anchor*.
So `torch.autograd.grad(total, anchor)` computes exactly the activation gradients on the way to the taps: no gradient of
a weight is formed, `.grad` is not touched, and no hook of DDP or an optimizer runs.

Padding needs no care here: its targets are ignored and no real token attends to it, so the gradient there is exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dataflex.errors import DataflexError

Receive = Callable[[nn.Module, Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, emit: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.emit = emit
        ctx.save_for_backward(x)
        return output.detach()  # the same memory; a view would forbid models that go on in place, as Falcon does

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.emit(x, grads[0])
        return grads[0], None, None, None


class Taps:
    """Hooks on modules for one batch at a time.

    Attributes:
        calls: how often each module ran in the forward pass; recomputation in the backward pass is not counted.
        paused: while set, modules run as if there were no hook.
    """

    def __init__(self, receive: Receive) -> None:
        # No parameter asks for a gradient while features are taken: without a tensor that does there would be no graph.
        self.anchor = torch.zeros((), requires_grad=True)
        self.calls: dict[nn.Module, int] = {}
        self.paused = False
        self._receive = receive
        self._modules: set[nn.Module] = set()
        self._backward = False

    @contextmanager
    def on(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Put the hooks on, and take them off."""
        self._modules = set(modules)
        handles = [module.register_forward_hook(self._hook, with_kwargs=True) for module in self._modules]
        try:
            yield
        finally:
            self._modules = set()
            for handle in handles:
                handle.remove()

    def count(self, module: nn.Module) -> None:
        """Count a use of a module; when the backward pass runs it again for gradient checkpointing that is the same."""
        if not self._backward:
            self.calls[module] = self.calls.get(module, 0) + 1

    def hand_over(self, module: nn.Module, x: Tensor, gy: Tensor) -> None:
        """Hand over what a tap on a module would have seen, if there is one on it."""
        if module in self._modules:
            self._receive(module, x, gy)

    def backward(self, total: Tensor) -> None:
        """Run the backward pass of a scalar loss; every tap on its way hands over what it saw."""
        self._backward = True
        try:
            torch.autograd.grad(total, [self.anchor], allow_unused=True)
        finally:
            self._backward = False

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        if self.paused or not torch.is_grad_enabled():
            return None
        inputs = [*args, *kwargs.values()]
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            raise DataflexError(
                f"{type(module).__name__} has trainable parameters but not one tensor in and one out, so there is no "
                "exact rule for its per-example gradient; freeze it or train a LoRA adapter"
            )
        self.count(module)
        (x,) = inputs
        if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            # As the module itself does; half the memory, and what autograd's own weight gradient would see.
            x = x.to(torch.get_autocast_dtype(x.device.type)) if isinstance(module, nn.Linear) else x
        return _Tap.apply(output, self.anchor, x, partial(self._receive, module))
