"""Adam's moments by parameter name: of a live optimizer, of DeepSpeed's or FSDP2's shards, or of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dataflex.checkpoints.pickles import read_pickle
from dataflex.errors import ConfigError, MismatchError
from dataflex.features.adam import Moments, Scalars, relative_rates
from dataflex.live.live_trainer import LiveTrainer
from dataflex.live.sharding import Sharding

MOMENTS_FILE = "dataflex/moments.safetensors"
"""Where our checkpoints keep them, relative to the checkpoint."""

Named = list[tuple[str, Any]]


def live_moments(trainer: LiveTrainer, sharding: Sharding, named: Named) -> Moments:
    """Return the moments of the trainer's optimizer. Collective under DeepSpeed and FSDP2.

    Args:
        trainer: the running trainer.
        sharding: how its model lies over the processes.
        named: trainable parameters by name.

    Raises:
        MismatchError, DataflexError: the optimizer keeps no Adam moments.
    """
    if not sharding.has_torch_optimizer:
        return _from_deepspeed(trainer, named)
    if trainer.state.global_step == 0:
        return _before_any_step(trainer.optimizer, named)
    found = Moments.from_optimizer(trainer.optimizer, named)
    first, second = (dict(sharding.whole(some.items())) for some in (found.exp_avg, found.exp_avg_sq))
    return Moments(first, second, found.scalars)


def checkpoint_moments(folder: Path, trainer: LiveTrainer, sharding: Sharding, named: Named) -> Moments:
    """Return a checkpoint's moments: by name from ours, by position from a foreign `optimizer.pt`.

    The latter knows its parameters by number, so the optimizer that LLaMA-Factory made for this run tells the order;
    count and shapes are checked.

    Raises:
        MismatchError: there are none, they are not of these parameters, or optimizer.pt is no plain numbers.
        ConfigError: they cannot be matched under DeepSpeed.
    """
    if (folder / MOMENTS_FILE).is_file():
        return Moments.load(folder / MOMENTS_FILE)
    if not (folder / "optimizer.pt").is_file():
        raise MismatchError(
            f"{folder}: found neither {MOMENTS_FILE} nor optimizer.pt; gradient_type: adam and target_direction: "
            "precond_only need the optimizer state. Train with save_only_model: false, or use sgd for both"
        )
    if not sharding.has_torch_optimizer:
        raise ConfigError(f"{folder}/optimizer.pt: cannot be matched to DeepSpeed's parameters; run without deepspeed")
    names = {id(p): name for name, p in named}
    ordered = {names[id(p)]: tuple(p.shape) for group in trainer.optimizer.param_groups for p in group["params"]}
    return Moments.from_optimizer_pt(read_pickle(folder / "optimizer.pt"), list(ordered), ordered)


def _before_any_step(optimizer: Any, named: Named) -> Moments:
    """Return the zeros that Adam begins with."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rates = relative_rates(optimizer.param_groups)
    scalars = {name: _scalars(0, groups[id(p)], optimizer, rates[id(p)]) for name, p in named}
    zeros = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in named}
    return Moments(zeros, zeros, scalars)


def _from_deepspeed(trainer: LiveTrainer, named: Named) -> Moments:
    """Gather the moments from all ranks."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = trainer.model_wrapped
    if not trainer.state.global_step:
        raise MismatchError("found no Adam moments before the first step under DeepSpeed; set warmup_step")
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        # ZeRO-1 and ZeRO-2 link parameters with their moments once, when only the first group has stepped and has any.
        engine.optimizer._hp_optimizer_states_linked = False
        link()
    moments: dict[str, dict[str, Any]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for name, parameter in named:
        for key, kept in moments.items():
            value = safe_get_full_optimizer_state(parameter, key)
            if value is None:
                raise MismatchError(f"{name}: DeepSpeed's optimizer holds no {key}; use AdamW, or sgd gradients")
            kept[name] = value.detach().float().cpu()
    step = trainer.state.global_step - int(engine.skipped_steps)
    group = engine.optimizer.param_groups[0]
    # An optimizer that DeepSpeed makes itself, from its own configuration, has one rate.
    rates = relative_rates(trainer.parameter_groups)
    scalars = {name: _scalars(step, group, engine.optimizer, rates.get(id(p), 1.0)) for name, p in named}
    return Moments(moments["exp_avg"], moments["exp_avg_sq"], scalars)


def _scalars(step: int, group: Any, optimizer: Any, rate: float) -> Scalars:
    if "betas" not in group or "eps" not in group:
        kind = type(optimizer).__name__
        raise MismatchError(f"{kind} has no betas and eps; use optim: adamw_torch, or sgd gradients")
    beta1, beta2 = group["betas"]
    return Scalars(step, float(beta1), float(beta2), float(group["eps"]), rate)
