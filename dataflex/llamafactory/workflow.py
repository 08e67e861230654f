"""Run LLaMA-Factory's own training workflow with our trainer and our rows put in place of two of its names."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from transformers import EarlyStoppingCallback

from dataflex.errors import ConfigError, DataflexError
from dataflex.llamafactory.rows import RowSets, load_rows
from dataflex.trainers.checkpoints import incomplete_reason, newest_complete
from dataflex.trainers.round_trainer import RoundTrainer
from dataflex.trainers.trainer import DataflexTrainer, Director, Stopped

log = logging.getLogger(__name__)

_TRAINERS = {"sft": "CustomSeq2SeqTrainer", "pt": "CustomTrainer"}


def run(arguments: Mapping[str, Any], director: Director | None, early_stopping_min_delta: float = 0.0) -> None:
    """Train as `llamafactory-cli train` does, with our trainer where there is a director.

    A process group that this starts is left to the caller (`distributed.leave`).

    Args:
        arguments: LLaMA-Factory's keys and values, DataFlex keys removed.
        director: accompanies the run, and decides its rows if it has `decide`; None for LLaMA-Factory untouched.
        early_stopping_min_delta: with `early_stopping_steps`, what counts as an improvement.

    Raises:
        ConfigError: LLaMA-Factory, or what it stands on, refuses an argument.
        DataflexError: a checkpoint to resume from is incomplete.
    """
    from llamafactory.train import tuner

    arguments = dict(arguments)
    callbacks = []
    if early_stopping_min_delta and arguments.get("early_stopping_steps"):
        # LLaMA-Factory's own callback has no threshold, so ours takes its place.
        callbacks.append(EarlyStoppingCallback(arguments.pop("early_stopping_steps"), early_stopping_min_delta))
    # All that LLaMA-Factory asks it is whether there is a group to destroy; that would be with the trainer still there.
    no_group = SimpleNamespace(is_initialized=lambda: False)
    with _explained(), patch.object(tuner, "dist", no_group):
        if director is None:
            tuner.run_exp(arguments, callbacks)
            return
        arguments = _resumption(arguments)
        with _substituted(str(arguments["stage"]), director), contextlib.suppress(Stopped):
            tuner.run_exp(arguments, callbacks)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn a ValueError with which LLaMA-Factory or what it stands on refuses an argument into an error for people."""
    try:
        yield
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        module = str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
        package = module.partition(".")[0]
        if package not in ("llamafactory", "transformers", "peft"):
            raise
        raise ConfigError(f"{package} refuses the run file: {error} (raised in {module})") from error


@contextlib.contextmanager
def _substituted(stage: str, director: Director) -> Iterator[None]:
    """Put our trainer and our `get_dataset` in place inside the stage's workflow module, and nowhere else."""
    workflow = importlib.import_module(f"llamafactory.train.{stage}.workflow")
    base = getattr(workflow, _TRAINERS[stage])
    loaded: list[RowSets] = []
    model_arguments: list[Any] = []

    def get_dataset(
        template: Any, model_args: Any, data_args: Any, training_args: Any, stage: str, **kwargs: Any
    ) -> Any:
        loaded.append(load_rows(template, model_args, data_args, training_args, stage, **kwargs))
        model_arguments.append(model_args)
        return loaded[-1].module

    added: Any = RoundTrainer if hasattr(director, "decide") else DataflexTrainer

    class Joined(added, base):  # type: ignore[misc, valid-type]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(director=director, row_sets=loaded[-1], model_args=model_arguments[-1], **kwargs)

    with patch.object(workflow, _TRAINERS[stage], Joined), patch.object(workflow, "get_dataset", get_dataset):
        yield


def _resumption(arguments: dict[str, Any]) -> dict[str, Any]:
    """Choose the checkpoint to resume from before LLaMA-Factory does: the newest that is complete.

    Raises:
        DataflexError: the checkpoint named by `resume_from_checkpoint` is incomplete.
    """
    named, folder = arguments.get("resume_from_checkpoint"), str(arguments["output_dir"])
    if isinstance(named, str):
        if (reason := incomplete_reason(named)) is not None:
            raise DataflexError(f"resume_from_checkpoint: {named} is incomplete: {reason}. Name a complete checkpoint.")
        return arguments
    if arguments.get("overwrite_output_dir") and not named:
        return arguments
    checkpoint, skipped = newest_complete(folder)
    for path, reason in skipped:
        log.warning("skipping the incomplete checkpoint %s: %s", path, reason)
    if checkpoint is not None:
        return arguments | {"resume_from_checkpoint": checkpoint}
    if named is True:
        raise DataflexError(f"resume_from_checkpoint: no complete checkpoint in {folder}; remove the key to start anew")
    # Otherwise LLaMA-Factory would pick up the incomplete ones.
    return arguments | ({"overwrite_output_dir": True} if skipped else {})
