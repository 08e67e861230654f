"""A trainer under FSDP2 whose checkpoints are those of one process: whole weights, whole moments, nothing of shards.

Accelerate's own would not do: of an adapter under `FULL_STATE_DICT` it writes the first process's part and no other,
and under `SHARDED_STATE_DICT` nothing that anything but FSDP2 reads. Written whole, a checkpoint is gone on from by any
number of processes, by DDP and alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from dataflex.features.sharded import is_dealt_out, part, put_back, whole
from dataflex.live import weights


class DealtOut(Trainer):
    """Mixin: put before LLaMA-Factory's trainer class in the bases; without FSDP2 it does nothing."""

    model: Any
    optimizer: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights as one process saves them. Collective."""
        if not is_dealt_out(self.model):
            super().save_model(output_dir, _internal_call)
            return
        state = _whole_weights(self.model, self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_dealt_out(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        with self._with(_Whole(self.optimizer, _whole_state(self.optimizer.state_dict(), self.args.should_save))):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not is_dealt_out(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with self._with(_Whole(self.optimizer, {})):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_dealt_out(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        put_back(self.model)
        weights.restore(Path(resume_from_checkpoint), self.model, weights.scaling(self.model))

    def _load_best_model(self) -> None:
        if not is_dealt_out(self.model):
            super()._load_best_model()
            return
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    @contextlib.contextmanager
    def _with(self, optimizer: _Whole) -> Iterator[None]:
        """Have Transformers save and load as it does without FSDP, by another optimizer."""
        kept, self.optimizer, self.is_fsdp_enabled = self.optimizer, optimizer, False
        try:
            yield
        finally:
            self.optimizer, self.is_fsdp_enabled = kept, True


class _Whole:
    """An optimizer's state, whole, as Transformers reads and writes it.

    Args:
        optimizer: whose state is dealt out.
        state: its state dict, whole, where it is to be written.
    """

    def __init__(self, optimizer: Any, state: dict[str, Any]):
        self._optimizer, self._state = optimizer, state

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state."""
        return self._state

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take this process's part of a whole state."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        dealt = {
            number: {
                key: part(value, p) if _is_like(value, p) else value for key, value in saved["state"][number].items()
            }
            for number, p in zip(numbers, parameters, strict=True)
            if number in saved["state"]
        }
        self._optimizer.load_state_dict({**saved, "state": dealt})


def _is_like(value: Any, parameter: Any) -> bool:
    """Say whether a part of an optimizer's state is a number for each element, and not one for all, as a step is."""
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _whole_state(state: dict[str, Any], is_kept: bool) -> dict[str, Any]:
    """Return an optimizer's state dict, whole, on the CPU; without its tensors where it is not kept. Collective."""
    found: dict[Any, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        made = {key: whole(value).cpu() if isinstance(value, torch.Tensor) else value for key, value in entries.items()}
        found[number] = made if is_kept else {}
    return {**state, "state": found}


def _whole_weights(model: Any, is_kept: bool) -> dict[str, torch.Tensor]:
    """Return by name, whole, on the CPU, the weights that a checkpoint holds; none where not kept. Collective."""
    put_back(model)
    wanted = {id(tensor) for tensor in weights.saved(model).values()}
    made: dict[int, torch.Tensor] = {}  # tied weights stay one
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in wanted:
            continue
        if id(tensor) not in made:
            gathered = whole(tensor.detach())
            made[id(tensor)] = gathered.cpu() if is_kept else gathered.new_empty(0)
        found[name] = made[id(tensor)]
    return found if is_kept else {}
