"""The direction Adam would step in on one example, given the moments a run has gathered.

n examples, m elements of a block of a parameter (m and m' below are moments).

With g the example's gradient, m and v the moments after t steps, b1, b2 and eps the optimizer's:

    m' = b1 m + (1 - b1) g                v' = b2 v + (1 - b2) g^2
    pytorch         rho m' / (1 - b1^(t+1))  /  (sqrt(v' / (1 - b2^(t+1))) + eps)
    less_reference  rho m' / sqrt(v' + eps)
    precond_only    rho (1 - b1) g / (1 - b1^(t+1))  /  (sqrt(v / (1 - b2^(t+1))) + eps)

rho is the learning rate of the parameter's group over that of the optimizer's first group, 1 but where an optimizer has
several rates, as LoRA+ has. `pytorch` is the change that `torch.optim.Adam` makes on this example alone, over minus the
first group's learning rate. Weight decay is left out: it is the same for all examples.

Source: Adam, arXiv 1412.6980, algorithm 1; LESS, arXiv 2402.04333, eq. 2, and its published code for `less_reference`
(no bias correction, eps inside the root); LoRA+, arXiv 2402.12354, for several rates; Influence Distillation, arXiv
2505.19051, for `precond_only`, which drops the momentum that all examples share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dataflex.errors import DataflexError, MismatchError
from dataflex.fingerprint import digest, tensors_digest


@dataclass(frozen=True)
class Scalars:
    """What Adam's step on one parameter depends on besides its moments.

    Attributes:
        step: optimizer steps done.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        rate: learning rate of the parameter's group over that of the first group.
    """

    step: int
    beta1: float
    beta2: float
    eps: float
    rate: float = 1.0


@dataclass(frozen=True)
class Moments:
    """Adam's state by the model's own parameter names; tensors are float32 and shaped as the parameters are."""

    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    scalars: Mapping[str, Scalars]

    @classmethod
    def from_optimizer(cls, optimizer: Any, named_parameters: Iterable[tuple[str, Tensor]]) -> Moments:
        """Copy the state of a live optimizer, matched by parameter identity, so the order of its groups is no matter.

        Raises:
            DataflexError: the optimizer keeps no Adam moments for a trainable parameter, or has not stepped yet.
        """
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        # By identity, not by position: an optimizer orders its parameters by groups, the model by modules.
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        found = {}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                where = f"{type(optimizer).__name__} for {name}"
                group, first = groups.get(id(parameter), {}), optimizer.param_groups[0]
                found[name] = _entry(optimizer.state.get(parameter, {}), group, first, where)
        return cls._of(found)

    @classmethod
    def from_optimizer_pt(
        cls, state_dict: Mapping[str, Any], names: Sequence[str], shapes: Mapping[str, Sequence[int]]
    ) -> Moments:
        """Read a saved `optimizer.state_dict()`, which numbers its parameters instead of naming them.

        Args:
            state_dict: what `optimizer.pt` holds.
            names: parameter names in the order of the optimizer's groups; Transformers begins with those that decay.
            shapes: the model's shape of each of these parameters.

        Raises:
            MismatchError: the count or a shape is not the model's.
            DataflexError: it holds no Adam moments, or no step was done.
        """
        ids = [(i, group) for group in state_dict["param_groups"] for i in group["params"]]
        if len(ids) != len(names):
            raise MismatchError(
                f"the saved optimizer has {len(ids)} parameters, the model has {len(names)} trainable ones"
            )
        found, first = {}, state_dict["param_groups"][0]
        for name, (number, group) in zip(names, ids, strict=True):
            entry = _entry(state_dict["state"].get(number, {}), group, first, f"the saved optimizer for {name}")
            if tuple(entry[0].shape) != tuple(shapes[name]):
                raise MismatchError(
                    f"parameter {number} of the saved optimizer has shape {tuple(entry[0].shape)}, {name} has "
                    f"{tuple(shapes[name])}; give the names in the order of the optimizer's groups"
                )
            found[name] = entry
        return cls._of(found)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read what `save` wrote.

        Raises:
            MismatchError: an older DataFlex wrote it, without the learning rates.
        """
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            scalars = json.loads(file.metadata()["scalars"])
        if not all("rate" in each for each in scalars.values()):
            raise MismatchError(
                f"{path}: found no learning rates; expected those that Adam's step is scaled by. An older DataFlex "
                "wrote it: train that checkpoint anew, or use sgd gradients"
            )
        return cls._of(
            {n: (tensors[f"exp_avg/{n}"], tensors[f"exp_avg_sq/{n}"], Scalars(**s)) for n, s in scalars.items()}
        )

    @classmethod
    def _of(cls, entries: Mapping[str, tuple[Tensor, Tensor, Scalars]]) -> Moments:
        first, second, scalars = ({name: e[i] for name, e in entries.items()} for i in range(3))
        return cls(first, second, scalars)  # type: ignore[arg-type]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: moments by parameter name, the scalars as JSON in its metadata."""
        tensors = {f"{kind}/{name}": t.contiguous().cpu() for kind, name, t in self._tensors()}
        scalars = json.dumps({name: asdict(s) for name, s in self.scalars.items()}, sort_keys=True)
        save_file(tensors, path, metadata={"scalars": scalars})

    def to(self, device: torch.device) -> Moments:
        """Return the same moments on another device."""
        first, second = ({n: t.to(device) for n, t in part.items()} for part in (self.exp_avg, self.exp_avg_sq))
        return Moments(first, second, self.scalars)

    def digest(self) -> str:
        """Name the moments by their content, for recipes."""
        tensors = tensors_digest((f"{kind}/{name}", t) for kind, name, t in self._tensors())
        return digest({"tensors": tensors, "scalars": {name: asdict(s) for name, s in self.scalars.items()}})

    def _tensors(self) -> Iterable[tuple[str, str, Tensor]]:
        yield from (("exp_avg", name, t) for name, t in self.exp_avg.items())
        yield from (("exp_avg_sq", name, t) for name, t in self.exp_avg_sq.items())


def relative_rate(group: Mapping[str, Any], first: Mapping[str, Any]) -> float:
    """Return a group's learning rate over the first group's, both before the schedule, which scales all alike.

    Raises:
        DataflexError: the first rate is zero and this one is not.
    """
    # Only schedulers that are functions of the step note the rate they began with.
    name = "initial_lr" if "initial_lr" in group and "initial_lr" in first else "lr"
    rate, base = float(group[name]), float(first[name])
    if rate == base:
        return 1.0
    if base == 0:
        raise DataflexError(
            f"the optimizer's first group has a learning rate of 0 and another {rate:g}; expected rates that can be "
            "compared. Set learning_rate above 0, or use `direction: sgd`"
        )
    return rate / base


def relative_rates(groups: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return `relative_rate` of every parameter of an optimizer's groups, by the parameter's `id`."""
    return {id(p): relative_rate(group, groups[0]) for group in groups for p in group["params"]}


def _entry(
    state: Mapping[str, Any], group: Mapping[str, Any], base: Mapping[str, Any], where: str
) -> tuple[Tensor, Tensor, Scalars]:
    first, second = state.get("exp_avg"), state.get("exp_avg_sq")
    plain = all(isinstance(t, Tensor) and t.is_floating_point() for t in (first, second))
    if not plain or "betas" not in group or "eps" not in group:
        kept = ", ".join(sorted(state)) or "nothing"
        raise DataflexError(
            f"{where} keeps {kept}; an Adam direction needs exp_avg and exp_avg_sq as tensors, and betas and eps. "
            "Train at least one step with `optim: adamw_torch`, or use `direction: sgd`"
        )
    if group.get("amsgrad") or group.get("maximize"):
        raise DataflexError(f"{where} uses amsgrad or maximize, for which no direction is defined here")
    step = int(state.get("step", group.get("step", 0)))  # DeepSpeed's FusedAdam has counted in the group
    if step < 1:
        raise DataflexError(f"{where} has done no step, so its moments say nothing; train a warm-up first")
    # NAdam, for one, has moments of the same names and makes another step of them.
    if more := sorted(state.keys() - {"step", "exp_avg", "exp_avg_sq"}):
        raise DataflexError(f"{where} keeps {more[0]} too, so it is another optimizer than Adam; use `direction: sgd`")
    beta1, beta2 = group["betas"]
    # A copy, as the optimizer writes its next step into the same tensors.
    first, second = (state[key].detach().to(torch.float32, copy=True) for key in ("exp_avg", "exp_avg_sq"))
    return first, second, Scalars(step, float(beta1), float(beta2), float(group["eps"]), relative_rate(group, base))


def adam_direction(moments: Moments, variant: str, name: str, start: int, g: Tensor) -> Tensor:
    """Return the direction for elements [start, start + m) of a parameter; g (n, m) is left as it is.

    Raises:
        DataflexError: the moments lack this parameter.
    """
    if name not in moments.scalars:
        raise DataflexError(f"no Adam moments for the trainable parameter {name}; they were taken from another model")
    s, stop = moments.scalars[name], start + g.shape[1]
    m = moments.exp_avg[name].reshape(-1)[start:stop].to(g)
    v = moments.exp_avg_sq[name].reshape(-1)[start:stop].to(g)
    # Bias corrections of the step that would come next. Everything acts element by element on the whole gradient, so it
    # has to be done before a projection, not after.
    first, second = 1 - s.beta1 ** (s.step + 1), 1 - s.beta2 ** (s.step + 1)
    if variant == "precond_only":
        step = g * ((1 - s.beta1) / first / ((v / second).sqrt() + s.eps))
    elif variant == "less_reference":  # as published: eps inside the root, no bias correction
        root = torch.addcmul(v * s.beta2 + s.eps, g, g, value=1 - s.beta2).sqrt_()
        step = torch.add(m * s.beta1, g, alpha=1 - s.beta1).div_(root)
    else:
        root = torch.addcmul(v * (s.beta2 / second), g, g, value=(1 - s.beta2) / second).sqrt_().add_(s.eps)
        step = torch.add(m * (s.beta1 / first), g, alpha=(1 - s.beta1) / first).div_(root)
    return step if s.rate == 1 else step.mul_(s.rate)
