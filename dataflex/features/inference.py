"""Run a model that is being trained as if for evaluation, and leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from dataflex.features.sharded import is_dealt_out, put_back


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Switch off dropout, NEFTune and whatever else acts in training, but keep gradient checkpointing where it is on.

    Parameters do not require gradients meanwhile, so that no kernel forms one, but under FSDP2. Afterwards mode flags,
    `requires_grad`, checkpointing functions and random states are as before.
    """
    modes = [(module, module.training) for module in model.modules()]
    is_sharded = is_dealt_out(model)
    # FSDP2 notes at the first pass of all, which may be this one, what it will reduce gradients of, and in which type.
    trainable = [] if is_sharded else [p for p in model.parameters() if p.requires_grad]
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    # Only devices in use: to save the random state of a GPU, torch would have to start CUDA in this process.
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad():
        try:
            model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            for layer in layers:
                layer.training = True  # Transformers checkpoints in training mode only; the children stay in eval mode
                layer._gradient_checkpointing_func = _checkpoint  # type: ignore[assignment]
            yield
        finally:
            for layer, function in zip(layers, functions, strict=True):
                layer._gradient_checkpointing_func = function
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, mode in modes:
                module.training = mode
            if is_sharded:
                put_back(model)


def _checkpoint(function: partial[Any], *args: Any) -> Any:
    """Checkpoint a layer without reentrance, which `torch.autograd.grad` needs, its own body in eval mode too.

    The function is a layer's `partial(__call__, **kwargs)`; some layers apply dropout by their own `training` flag.
    """
    layer = function.func.__self__  # type: ignore[attr-defined]
    return checkpoint(partial(_in_eval, layer, function), *args, use_reentrant=False, preserve_rng_state=False)


def _in_eval(layer: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    layer.training = False
    try:
        return function(*args)
    finally:
        layer.training = True
