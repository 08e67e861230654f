"""Whether what a checkpoint was trained on is what this run is trained on: its frozen weights, or its base.

Of a checkpoint only the trainable weights are put into the live model. Over other frozen weights than those they were
trained with they would be a model that nobody has trained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dataflex.checkpoints.marks import recorded
from dataflex.errors import MismatchError
from dataflex.fingerprint import difference, model_digest
from dataflex.folders import model_folder
from dataflex.live.weights import ADAPTER, adapter_config, by_name, tensors

log = logging.getLogger(__name__)


def covers(folder: Path, model: Any, buffers: bool = True) -> bool:
    """Compare the frozen weights in a checkpoint with the live model's, tensor by tensor.

    Args:
        folder: the checkpoint.
        model: the bare model, not sharded.
        buffers: whether persistent buffers are compared too: those of a training model may move.

    Returns:
        Whether the checkpoint holds every frozen weight, so that there is nothing left to ask.

    Raises:
        MismatchError: names the first that differs.
    """
    held, seen = by_name(model), set()
    for name, stored in tensors(folder):
        live = held.get(name)
        if live is None or live.requires_grad or not (buffers or isinstance(live, torch.nn.Parameter)):
            continue
        if not _is_same(live.detach(), stored[...]):
            raise MismatchError(
                f"{folder}: its {name}, which this run does not train, differs from that of this run's base; loaded "
                "over it the trained weights would be a hybrid of two models. Use the model_name_or_path it was made "
                "with, or a checkpoint of this one"
            )
        seen.add(id(live))
    return all(parameter.requires_grad or id(parameter) in seen for parameter in model.parameters())


def require_base(folder: Path, base: Mapping[str, Any], args: Any) -> None:
    """Compare the base that a checkpoint was trained on with this run's, where it does not hold it.

    Args:
        folder: the checkpoint.
        base: this run's, as `ModelState.base`.
        args: LLaMA-Factory's model arguments.

    Raises:
        MismatchError: it is another.
    """
    theirs = recorded(folder).get("base") or _of_adapter(folder, base, args)
    if theirs is None:
        log.warning("%s: the base it was trained on is not known here, so it is not compared with this run's", folder)
    elif found := difference({name: base[name] for name in theirs}, theirs):
        raise MismatchError(
            f"{folder}: was trained on another base than this run's ({'; '.join(found)}); use the model_name_or_path "
            "it was made with, or a checkpoint of this one"
        )


def _of_adapter(folder: Path, base: Mapping[str, Any], args: Any) -> dict[str, Any] | None:
    """Return the base that PEFT noted, by content; None if it is not here."""
    if not (folder / ADAPTER).is_file():
        return None
    named = adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    if named == args.model_name_or_path or Path(named).resolve() == Path(args.model_name_or_path).resolve():
        return {"weights": base["weights"]}
    try:
        return {"weights": model_digest(model_folder(named, cache_dir=args.cache_dir))}
    except (MismatchError, OSError, ValueError):  # no such folder, and no such name among what was downloaded
        return None


def _is_same(live: torch.Tensor, stored: torch.Tensor) -> bool:
    """Say whether two tensors are the same number by number, in the coarser of their types."""
    stored = stored.to(live.device)
    if live.shape != stored.shape:
        return False
    # A base in bfloat16 may be loaded in float32, and saved in either: a cast in one of the two directions is exact.
    return torch.equal(live, stored.to(live.dtype)) or torch.equal(live.to(stored.dtype), stored)
