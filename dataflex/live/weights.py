"""A checkpoint's trainable weights, put into the live model for a while."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dataflex.errors import MismatchError
from dataflex.features.sharded import part
from dataflex.fingerprint import plain

SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""What scales the weights of an adapter, which the weights do not tell."""

ADAPTER = "adapter_model.safetensors"


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
    check(folder, model, scaling)
    ours, found = _trainable(model), _read(folder, model)
    kept = {name: parameter.detach().clone() for name, parameter in ours.items()}
    try:
        _copy(found, ours)
        yield
    finally:
        _copy(kept, ours)


def restore(folder: Path, model: Any, scaling: dict[str, Any]) -> None:
    """Put the weights in to stay, each process its own part where the model is dealt out; arguments as `loaded`.

    Raises:
        MismatchError: as `loaded`.
    """
    check(folder, model, scaling)
    _copy(_read(folder, model), _trainable(model))


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Give each tensor of a checkpoint by the name it has there, as a slice: `[...]` reads it, and not before.

    Raises:
        MismatchError: the folder holds no weights, or damaged ones.
    """
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise MismatchError(
                f"{path}: cannot be read ({error}); expected the weights of a checkpoint, whole"
            ) from error


def by_name(model: Any) -> dict[str, Any]:
    """Return the live model's parameters and persistent buffers by the names that a checkpoint gives them.

    A tied weight has several; a checkpoint has one of them.
    """
    # An adapter's file may hold the embeddings too: PEFT adds them where the vocabulary was resized.
    return _named(model, save_embedding_layers=True)


def saved(model: Any) -> dict[str, Any]:
    """Return those of `by_name` that a checkpoint is given."""
    return _named(model)


def scaling(model: Any) -> dict[str, Any]:
    """Return what scales the adapter's weights, which the weights do not tell; empty without an adapter."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return {}
    config = configs[model.active_adapter]
    return {name: plain(getattr(config, name)) for name in SCALING if getattr(config, name, None)}


def _named(model: Any, **of_adapter: Any) -> dict[str, Any]:
    held: dict[str, Any] = model.state_dict(keep_vars=True)
    if not hasattr(model, "peft_config"):
        return held
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, held, adapter_name=str(model.active_adapter), **of_adapter))


def _files(folder: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights: those that a loader would read, and no older ones beside."""
    index = folder / "model.safetensors.index.json"
    for name in (ADAPTER, "model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    if not index.is_file():
        raise MismatchError(f"{folder}: found neither {ADAPTER} nor model*.safetensors; expected a checkpoint")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MismatchError(f"{index}: cannot be read ({error!r}); expected the index of a checkpoint") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise MismatchError(f"{index}: found {outside[0]!r}; expected names of files beside it")
    return [folder / name for name in names]


def check(folder: Path, model: Any, scaling: dict[str, Any]) -> None:
    """Hold a checkpoint's names and shapes against the model; of its numbers none is read.

    Raises:
        MismatchError: they are not those of the model.
    """
    is_adapter = (folder / ADAPTER).is_file()
    if is_adapter:
        _check_scaling(folder, scaling)
    held, wrong, unknown, known = by_name(model), [], [], set()
    for key, stored in tensors(folder):
        live = held.get(key)
        if live is not None:
            known.add(id(live))
            wrong += [key] if list(stored.get_shape()) != list(live.shape) else []
        elif is_adapter or not _is_left_out(key, model):
            unknown.append(key)
    expected = model.named_parameters() if not is_adapter else _trainable(model).items()
    missing = [name for name, parameter in expected if id(parameter) not in known]
    if missing or wrong or unknown:
        raise MismatchError(
            f"{folder}: its weights are not those of this run's trainable parameters: {len(missing)} missing "
            f"(first: {sorted(missing)[:1]}), {len(wrong)} of another shape (first: {sorted(wrong)[:1]}), "
            f"{len(unknown)} unknown (first: {sorted(unknown)[:1]}); use the model, finetuning_type, lora_rank and "
            "lora_target it was made with"
        )


def _read(folder: Path, model: Any) -> dict[str, Any]:
    """Read the trainable weights, by the model's names."""
    held, names = by_name(model), {id(parameter): name for name, parameter in _trainable(model).items()}
    return {
        names[id(held[key])]: stored[...] for key, stored in tensors(folder) if key in held and id(held[key]) in names
    }


def _trainable(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return what PEFT noted of an adapter.

    Raises:
        MismatchError: it cannot be read.
    """
    path = folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"found {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise MismatchError(f"{path}: cannot be read ({error}); expected the JSON object of an adapter") from error
    return found


def _check_scaling(folder: Path, scaling: dict[str, Any]) -> None:
    theirs, config = adapter_config(folder), folder / "adapter_config.json"
    for name in SCALING:
        if (theirs.get(name) or None) != (scaling.get(name) or None):  # an option that is off may be left out
            raise MismatchError(f"{config}: {name} is {theirs.get(name)}, this run has {scaling.get(name)}")


def _is_left_out(key: str, model: Any) -> bool:
    """Say whether Transformers passes over a tensor of this name too, such as a rotary table of an older version."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return key.endswith("rotary_emb.inv_freq") or any(re.search(pattern, key) for pattern in patterns)


@torch.no_grad()
def _copy(source: dict[str, Any], target: dict[str, Any]) -> None:
    for name, parameter in target.items():
        parameter.copy_(part(source[name].to(parameter.device, parameter.dtype), parameter))
