"""The slow and obvious way to a per-example gradient, to check the fast one against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dataflex.features.engine import FeatureEngine
from dataflex.features.inference import evaluation
from dataflex.features.projection import build_projector
from dataflex.features.spec import GradientSpec, Projection


def single_gradient(engine: FeatureEngine, example: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return one example's gradient by parameter name: alone, by the model's own loss and autograd, in eval mode."""
    named = dict(engine.model.named_parameters())
    parameters = [named[p.name] for p in engine.parameters]
    labels = torch.tensor([list(example["labels"])], device=engine.device)
    tokens = torch.tensor([list(example["input_ids"])], device=engine.device)
    with evaluation(engine.model):
        for parameter in parameters:
            parameter.requires_grad_(True)
        with engine.autocast():
            loss = engine.model(input_ids=tokens, labels=labels, use_cache=False).loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(engine.parameters, parameters, gradients, strict=True)
    return {p.name: torch.zeros_like(w) if g is None else g for p, w, g in pairs}


def gradient_error(engine: FeatureEngine, examples: Sequence[Mapping[str, Any]]) -> float:
    """Return the largest relative L2 error of the engine's gradients, in one batch, against `single_gradient`.

    About 1e-6 is expected in float32, 1e-2 in bfloat16, whose kernels are not batch-invariant. Both sides are compared
    after one sketch to 8192, so memory stays that of one gradient. Not for sharded parameters.
    """
    projection = Projection(type="sjlt", dim=8192)
    projector = build_projector(projection, {p.key: p.size for p in engine.parameters})
    (fast,) = engine.compute(examples, [GradientSpec(projection=projection)])
    worst = 0.0
    for row, example in enumerate(examples):
        y = projector.zeros(1, engine.device)
        gradient = single_gradient(engine, example)
        for p in engine.parameters:
            projector.add(y, p.key, 0, gradient[p.name].float().reshape(1, -1))
        slow = projector.values(y)[0].cpu()
        assert fast.vectors is not None
        error = torch.linalg.vector_norm(torch.from_numpy(fast.vectors[row]) - slow) / torch.linalg.vector_norm(slow)
        worst = max(worst, float(error))
    return worst
