"""Run LLaMA-Factory's own training workflow with our trainer and our rows put in place of two of its names."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dataflex import distributed
from dataflex.checkpoints.marks import mark_complete, require_whole
from dataflex.checkpoints.pickles import refused
from dataflex.config.keys import DataflexKeys
from dataflex.environment import is_on
from dataflex.errors import ConfigError
from dataflex.explanation import explained, raised_in
from dataflex.llamafactory import tokenized
from dataflex.llamafactory.exclusion import drawn_targets, with_tests, without_targets
from dataflex.llamafactory.learning_rates import check_schedule
from dataflex.llamafactory.loaded import check_loaded, keep_one_arithmetic
from dataflex.llamafactory.place import place_of
from dataflex.llamafactory.provenance import made_from
from dataflex.llamafactory.records import Sample
from dataflex.llamafactory.row_sets import load_rows, load_tests
from dataflex.llamafactory.sanity import TRAINERS, judge_rows, judge_tokens, judged
from dataflex.rows import RowSets
from dataflex.trainers.directing import Directing, Stopped
from dataflex.trainers.outline import Prepared
from dataflex.trainers.resumption import Resumption
from dataflex.trainers.round_trainer import RoundTrainer
from dataflex.trainers.stopping import Stopping
from dataflex.trainers.trainer import DataflexTrainer

log = logging.getLogger(__name__)

_REFUSERS = ("llamafactory", "transformers", "peft", "huggingface_hub")
_OPTIMIZERS = ("transformers.trainer_optimizer", "torch.optim")
"""Modules that read nothing of the run file but what the optimizer is given."""
_FOLDERS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "reward_model")
"""Keys that may name a checkpoint."""
_CHANGED = ("rm", "ppo")
"""Stages whose checkpoints LLaMA-Factory changes after they are written, and does not resume from."""


def run(
    arguments: Mapping[str, Any],
    directing: Directing | None,
    early_stopping_min_delta: float = 0.0,
    checkpoint_on_signal: bool = True,
    is_training: bool = True,
    options: DataflexKeys | None = None,
    foresee: Callable[[Prepared], None] | None = None,
    sample: Sample | None = None,
) -> None:
    """Train as `llamafactory-cli train` does; with our trainer and rows unless `directing` is None.

    A process group that this starts is left to the caller (`distributed.leave`).

    Args:
        arguments: LLaMA-Factory's keys and values, DataFlex keys removed.
        directing: makes what accompanies the run; None for LLaMA-Factory untouched.
        early_stopping_min_delta: with `early_stopping_steps`, what counts as an improvement.
        checkpoint_on_signal: whether a training that a signal stops leaves a checkpoint.
        is_training: whether the run is a training, and not one that only computes features.
        options: the `dataflex:` mapping: which target rows there are, which training rows, what is measured on.
        foresee: called when the rows are there, before the model is loaded; it may end the run by `Stopped`.
        sample: takes some records of each dataset to stand for all; None: all are taken.

    Raises:
        ConfigError: LLaMA-Factory, or what it stands on, refuses an argument.
        CorruptionError: a checkpoint that is named, to resume from or to load, is damaged.
        MismatchError: a checkpoint that is named cannot be resumed from, or a file of it or of the model is a pickle of
            more than tensors and plain values.
        Interrupted: a signal asked the run to stop.
    """
    from llamafactory.train import tuner

    arguments = dict(arguments)
    callbacks: list[TrainerCallback] = []
    if early_stopping_min_delta and arguments.get("early_stopping_steps"):
        # LLaMA-Factory's own callback has no threshold, so ours takes its place.
        callbacks.append(EarlyStoppingCallback(arguments.pop("early_stopping_steps"), early_stopping_min_delta))
    # All that LLaMA-Factory asks it is whether there is a group to destroy; that would be with the trainer still there.
    no_group = SimpleNamespace(is_initialized=lambda: False)
    resumption = Resumption.of(arguments, takes_unmarked=directing is None)
    _require_devices(arguments)
    _check_weights(arguments)
    check_schedule(arguments)
    arguments |= resumption.arguments()
    stopping = Stopping(resumption, checkpoint_on_signal and is_training, is_training)
    callbacks.append(stopping)
    with stopping, _explained(), refused(), patch.object(tuner, "dist", no_group):
        if directing is None:
            if arguments.get("stage") not in _CHANGED:
                callbacks.insert(0, _Marks())  # what is stopped at a save is marked
            with _begun_at(resumption), _worded(str(arguments["stage"])), judged(arguments):
                tuner.run_exp(arguments, callbacks)
            return
        load = functools.partial(_loaded, options or DataflexKeys(), sample)
        stage, told = str(arguments["stage"]), foresee or (lambda prepared: None)
        with _substituted(stage, directing, load, resumption, stopping, told), contextlib.suppress(Stopped):
            tuner.run_exp(arguments, callbacks)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn the exceptions by which LLaMA-Factory and its libraries refuse an argument into a ConfigError.

    These are a ValueError, an ImportError for a missing package, and an OSError without a number for a missing model.
    """
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        if (module := _refuser(error)) is None or getattr(error, "errno", None) is not None:
            raise
        package, text = module.partition(".")[0], " ".join(str(error).split())
        if module.startswith(_OPTIMIZERS):
            text = f"optim, optim_args, learning_rate, weight_decay or adam_*: {text}"
        raise ConfigError(f"{package} refuses the run file: {text} (raised in {module})") from error


def _refuser(error: Exception) -> str | None:
    """Return the module that raised an error, if it is one that reads the run file's arguments."""
    module = raised_in(error)
    return module if module.partition(".")[0] in _REFUSERS or module.startswith(_OPTIMIZERS) else None


def _loaded(options: DataflexKeys, sample: Sample | None, *args: Any, **kwargs: Any) -> RowSets:
    kwargs["sample"] = sample
    sets = load_rows(*args, **kwargs)
    if options.test_dataset:
        sets = with_tests(sets, load_tests(options.test_dataset, *args, **kwargs))
    if options.exclude_targets:
        sets = without_targets(sets)
    if options.target_rows is None or sample is not None:
        return sets
    return drawn_targets(sets, options.target_rows, options.target_seed)


@contextlib.contextmanager
def _substituted(
    stage: str,
    directing: Directing,
    load: Callable[..., RowSets],
    resumption: Resumption,
    stopping: Stopping,
    foresee: Callable[[Prepared], None],
) -> Iterator[None]:
    """Put our trainer and our `get_dataset` in place inside the stage's workflow module, and nowhere else."""
    workflow = importlib.import_module(f"llamafactory.train.{stage}.workflow")
    base = getattr(workflow, TRAINERS[stage])
    loaded: list[RowSets] = []
    model_arguments: list[Any] = []
    given: list[tuple[Any, Any]] = []

    def get_dataset(
        template: Any, model_args: Any, data_args: Any, training_args: Any, stage: str, **kwargs: Any
    ) -> Any:
        sets = load(template, model_args, data_args, training_args, stage, **kwargs)
        judge_rows(sets.train, sets.targets.items(), data_args, is_packed=stage == "pt" and bool(data_args.packing))
        if not sets.raw:
            judge_tokens(sets.train.examples, kwargs["tokenizer"], stage, data_args.train_on_prompt)
        loaded.append(sets)
        model_arguments.append(model_args)
        given.append((data_args, training_args))
        return sets.module

    added: Any = DataflexTrainer if directing.schedule is None else RoundTrainer

    # Made here, as its base is known only now: LLaMA-Factory has a trainer class for each stage.
    class Joined(added, base):  # type: ignore[misc, valid-type]
        def __init__(self, **kwargs: Any) -> None:
            self.is_new = model_arguments[-1].train_from_scratch
            about: dict[str, Any] = {"directing": directing, "row_sets": loaded[-1], "model_args": model_arguments[-1]}
            about |= {"resumption": resumption, "stopping": stopping}
            super().__init__(**about, **kwargs)

    with patch.object(workflow, TRAINERS[stage], Joined), _checked(workflow, get_dataset):
        load_model = workflow.load_model

        def foreseen(tokenizer: Any, model_args: Any, finetuning_args: Any, *args: Any, **kwargs: Any) -> Any:
            data_args, training_args = given[-1]
            foresee(Prepared(loaded[-1], tokenizer, model_args, data_args, training_args, finetuning_args, Joined))
            model = load_model(tokenizer, model_args, finetuning_args, *args, **kwargs)
            keep_one_arithmetic(model)
            return model

        with patch.object(workflow, "load_model", foreseen):
            yield


@contextlib.contextmanager
def _worded(stage: str) -> Iterator[None]:
    """Report in words data that LLaMA-Factory's own training cannot load, or that was made under other settings."""
    workflow = importlib.import_module(f"llamafactory.train.{stage}.workflow")
    get = workflow.get_dataset

    def get_dataset(
        template: Any, model_args: Any, data_args: Any, training_args: Any, stage: str, **kwargs: Any
    ) -> Any:
        path = data_args.tokenized_path
        names = dict.fromkeys([*(data_args.dataset or []), *(data_args.eval_dataset or [])])
        is_made = path is not None and tokenized.is_there(path)
        places = [] if is_made else [place_of(name, data_args.dataset_dir) for name in names]
        if is_made:
            tokenized.compared(path, made_from(stage, data_args, training_args.seed, kwargs["tokenizer"]))
        for place in places:
            place.check()

        def look() -> str | None:
            faults = ((place, place.fault()) for place in places)
            return next((f"{place}: {text}" for place, text in faults if text), None)

        with explained(f"tokenized_path {path}" if is_made else f"datasets {', '.join(map(str, places))}", look):
            return get(template, model_args, data_args, training_args, stage, **kwargs)

    with _checked(workflow, get_dataset):
        yield


@contextlib.contextmanager
def _checked(workflow: Any, get_dataset: Callable[..., Any]) -> Iterator[None]:
    """Put a `get_dataset` in place, and report in words a model that cannot be loaded or does not fit the rows."""
    made: list[Mapping[str, Any]] = []
    load = _in_words(workflow.load_model, "")

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(get_dataset(*args, **kwargs))
        return made[-1]

    def load_model(
        tokenizer: Any, model_args: Any, finetuning_args: Any, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        model = load(tokenizer, model_args, finetuning_args, is_trainable, **kwargs)
        check_loaded(model, made[-1], tokenizer, model_args, finetuning_args, is_trainable)
        return model

    with (
        patch.object(workflow, "get_dataset", noted),
        patch.object(workflow, "load_tokenizer", _in_words(workflow.load_tokenizer, "the tokenizer of ")),
        patch.object(workflow, "load_model", load_model),
    ):
        yield


def _in_words(load: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Return a function that loads something of a model, and says in words what cannot be loaded."""

    def loaded(*args: Any, **kwargs: Any) -> Any:
        given = next(a for a in args if hasattr(a, "model_name_or_path"))
        model = given.model_name_or_path
        with explained(f"model_name_or_path: {what}{model} cannot be loaded", refusal=ConfigError):
            try:
                return load(*args, **kwargs)
            except StrictDataclassError as error:
                if given.rope_scaling is None:
                    raise
                # LLaMA-Factory makes the model's length a float, which configurations of some versions do not take.
                raise ConfigError(
                    f"rope_scaling: found {given.rope_scaling}, which the installed Transformers does not let "
                    f"LLaMA-Factory set ({' '.join(str(error).split())}); expected no such key. Write rope_parameters "
                    f"into {model}/config.json instead"
                ) from error
            except ValueError as error:
                if _refuser(error) is None:
                    raise
                argument = error
        raise argument  # outside, so that `_explained` says who refuses it

    return loaded


class _Marks(TrainerCallback):
    """Marks checkpoints of LLaMA-Factory's own trainers as complete."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint that was just written."""
        distributed.barrier()  # every process has written its part
        if args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            mark_complete(folder, {"global_step": state.global_step, "is_resumable": not args.save_only_model})


@contextlib.contextmanager
def _begun_at(resumption: Resumption) -> Iterator[None]:
    """Make LLaMA-Factory's own trainers begin at the checkpoint that `resumption` names."""
    train = Trainer.train

    def begun(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        return train(self, resumption.start(resume_from_checkpoint), *args, **kwargs)

    with patch.object(Trainer, "train", begun):
        yield


def _require_devices(arguments: Mapping[str, Any]) -> None:
    """Refuse FSDP on CPUs, where accelerate would train by DDP and not say so.

    Raises:
        ConfigError: it is asked for, by the run file or by accelerate's launcher, and there is no device for it.
    """
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    on_cpu = arguments.get("use_cpu") or is_on("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if on_cpu and (by_launcher or arguments.get("fsdp")):
        what = "ACCELERATE_USE_FSDP in the environment" if by_launcher else f"fsdp: {arguments['fsdp']}"
        raise ConfigError(
            f"{what}: found CPUs alone; expected devices such as GPUs, as accelerate enters FSDP nowhere else: it "
            "would train by DDP. Leave FSDP out, or run where there are devices"
        )


def _check_weights(arguments: Mapping[str, Any]) -> None:
    """Refuse damaged checkpoints that the run is to load weights from; one process of each node reads them.

    Raises:
        CorruptionError: a file is not what was written.
    """
    for key in _FOLDERS if distributed.local_rank() == 0 else ():
        found = arguments.get(key) or []
        for folder in found.split(",") if isinstance(found, str) else found:
            require_whole(str(folder).strip())
