"""How fast this machine works: what passes over rows and steps of training took, for whoever has to foresee them.

A speed is plain data. `of` says what was done, on which machine and with which model; `tokens` is of all that was done,
`seconds` what it took one process.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from dataflex.features.spec import FeatureSpec
from dataflex.fingerprint import digest
from dataflex.live.state import ModelState


def pass_of(state: ModelState, specs: Sequence[FeatureSpec]) -> dict[str, Any]:
    """Say what a pass over rows is: the features that it computes, by what, and where."""
    backward = any(spec.gradient is not None for spec in specs)
    features = sorted(digest(spec.recipe()) for spec in specs)
    about = {"what": "pass", "features": features, "backward": backward}
    encoder = next((spec.encoder for spec in specs if spec.encoder is not None), None)
    by = {"model": digest(state.encoder(encoder))} if encoder is not None else model_of(state)
    return {**about, **by, **machine(state.trainer.args.device)}


def training_of(state: ModelState) -> dict[str, Any]:
    """Say what training is: of which model, how, and where."""
    tuning = {"finetuning_type": str(state.trainer.finetuning_args.finetuning_type), "trainable": state.trainable_size}
    return {"what": "train", **tuning, **model_of(state), **machine(state.trainer.args.device)}


def model_of(state: ModelState) -> dict[str, str]:
    """Name the run's model as far as it makes a difference to speed."""
    return {"model": digest({"weights": state.loaded["weights"], "numerics": state.numerics()})}


def machine(device: Any) -> dict[str, str]:
    """Name this machine and the device that a model runs on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    return {"host": platform.node(), "device": f"{device.type}: {name}"}


def nearest(wanted: Mapping[str, Any], speeds: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the first speed of the same work; else of a pass with other features, if it is as deep; None: none.

    Args:
        wanted: of `pass_of` or `training_of`.
        speeds: as they are recorded, the latest first.
    """
    done = [speed for speed in speeds if speed.get("seconds", 0) > 0 and speed.get("tokens", 0) > 0]
    same = (speed for speed in done if speed["of"] == wanted)
    loose = {name: value for name, value in wanted.items() if name != "features"}
    alike = (speed for speed in done if {n: v for n, v in speed["of"].items() if n != "features"} == loose)
    return next(same, None) or next(alike, None)
