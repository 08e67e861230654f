"""A checkpoint's trainable weights, put into the live model for a while."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dataflex.errors import MismatchError

SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""What scales the weights of an adapter, which the weights do not tell."""


@contextlib.contextmanager
def loaded(folder: Path, model: Any, scaling: dict[str, Any]) -> Iterator[None]:
    """Put the weights in, and the model's own back afterwards.

    Args:
        folder: a LLaMA-Factory checkpoint.
        model: the bare model.
        scaling: what of its adapter's configuration scales the weights.

    Raises:
        MismatchError: the checkpoint's weights are not those of the model's trainable parameters.
    """
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = _read(folder, model, ours, scaling)
    kept = {name: parameter.detach().clone() for name, parameter in ours.items()}
    try:
        _copy(found, ours)
        yield
    finally:
        _copy(kept, ours)


def _read(folder: Path, model: Any, ours: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """Read the weights, by the model's names, and hold them against the model."""
    adapter = folder / "adapter_model.safetensors"
    if adapter.is_file():
        found = {_with_adapter(key, str(model.active_adapter)): value for key, value in _tensors(adapter).items()}
        theirs = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        for name in SCALING:
            if (theirs.get(name) or None) != (scaling.get(name) or None):  # an option that is off may be left out
                raise MismatchError(
                    f"{folder}/adapter_config.json: {name} is {theirs.get(name)}, this run has {scaling.get(name)}"
                )
    elif shards := sorted(folder.glob("model*.safetensors")):
        found = {key: value for shard in shards for key, value in _tensors(shard).items()}
    else:
        raise MismatchError(
            f"{folder}: found neither adapter_model.safetensors nor model*.safetensors; expected a checkpoint"
        )
    missing = sorted(ours.keys() - found.keys())
    wrong = sorted(name for name in ours.keys() & found.keys() if ours[name].shape != found[name].shape)
    unknown = sorted(found.keys() - ours.keys()) if adapter.is_file() else []
    if missing or wrong or unknown:
        raise MismatchError(
            f"{folder}: its weights are not those of this run's trainable parameters: {len(missing)} missing "
            f"(first: {missing[:1]}), {len(wrong)} of another shape (first: {wrong[:1]}), {len(unknown)} unknown "
            f"(first: {unknown[:1]}); use the finetuning_type, lora_rank and lora_target it was made with"
        )
    return found


def _tensors(path: Path) -> dict[str, Any]:
    """Read a file of weights.

    Raises:
        MismatchError: it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise MismatchError(f"{path}: cannot be read ({error}); expected the weights of a checkpoint, whole") from error


@torch.no_grad()
def _copy(source: dict[str, Any], target: dict[str, Any]) -> None:
    for name, parameter in target.items():
        parameter.copy_(source[name].to(parameter))


def _with_adapter(key: str, adapter: str) -> str:
    """Insert the adapter's name, which PEFT leaves out of its files."""
    for part in ("lora_A", "lora_B"):
        if f".{part}." in key and f".{part}.{adapter}." not in key:
            return key.replace(f".{part}.", f".{part}.{adapter}.")
    for part in ("lora_embedding_A", "lora_embedding_B"):
        if key.endswith(f".{part}"):
            return f"{key}.{adapter}"
    return key
