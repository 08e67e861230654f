"""What is added to a Transformers trainer: complete checkpoints, exact resumption, losses that are weighted or watched.

The training loop is Transformers' own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from dataflex import distributed
from dataflex.checkpoints.marks import mark_complete, unmark
from dataflex.errors import DataflexError
from dataflex.rows import RowSets
from dataflex.schedule import Round
from dataflex.trainers.dealt_out import DealtOut
from dataflex.trainers.directing import Directing, Director, Stopped
from dataflex.trainers.first_step import FirstStepJudged
from dataflex.trainers.micro_batch import ROWS
from dataflex.trainers.pace import Pace
from dataflex.trainers.resumption import Resumption
from dataflex.trainers.shown import OURS, OwnNumbers, Shown
from dataflex.trainers.stopping import Stopping
from dataflex.trainers.weighing import Weighing

log = logging.getLogger(__name__)


class DataflexTrainer(DealtOut, FirstStepJudged):
    """Mixin: put before LLaMA-Factory's trainer class in the bases.

    Args:
        directing: makes what accompanies the run.
        row_sets: training rows and target sets.
        model_args: LLaMA-Factory's model arguments.
        resumption: where to begin.
        stopping: what ends the run where a signal asks for it.
        kwargs: what LLaMA-Factory's workflow passes to its trainer.
    """

    rounds: Sequence[Round] = ()
    """Empty where LLaMA-Factory itself orders the rows."""
    director: Director | None = None
    """There from the beginning of `train` on."""
    finetuning_args: Any
    """LLaMA-Factory's, which its trainer sets."""
    # Transformers' types allow for trainers without them, and for models of any kind.
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any

    @property
    def _weighing(self) -> Weighing | None:
        return None if self.director is None else self.director.weighing

    def __init__(
        self,
        *,
        directing: Directing,
        row_sets: RowSets,
        model_args: Any,
        resumption: Resumption,
        stopping: Stopping,
        **kwargs: Any,
    ):
        args = kwargs["args"]
        self.directing = directing
        self.resumption = resumption
        self.stopping = stopping
        self.row_sets = row_sets
        self.model_arguments = model_args
        self.global_batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.last_batch: Any = None
        self.parameter_groups: Sequence[dict[str, Any]] = ()
        self._stopped = False
        super().__init__(**kwargs)
        self.shown = Shown()
        self.add_callback(OwnNumbers)
        self.pace = Pace()
        self.add_callback(self.pace)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(self.shown)

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(str(self.args.output_dir))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; raises `Stopped` when the director ended the run early."""
        if self.args.world_size > 1 and self.args.device.type == "cpu":
            _accept_cpu_index()
        self.director = director = self.directing.begin(self, self.resumption.start(resume_from_checkpoint))
        self.stopping.counts(lambda: director.steps_kept)
        if director.weighing is not None:
            self.compute_loss_func = self._loss
            self.train_dataset = self.train_dataset.add_column(ROWS, np.arange(len(self.train_dataset)))
            self.data_collator = _WithRows(self.data_collator)
        try:
            output = super().train(director.start, *args, **kwargs)
        finally:
            self.shown.close()
        director.finish()
        if self._stopped:
            raise Stopped
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Return LLaMA-Factory's optimizer, its groups noted: DeepSpeed hides which parameter is in which."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self.parameter_groups = [dict(group) for group in optimizer.param_groups]
        return optimizer

    def _train_on(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Train on a micro-batch: by the weighter's own step, where it has one."""
        director = self.director
        if director is None or director.own_step is None:
            return super()._train_on(model, inputs, num_items_in_batch)
        acts = self.state.global_step >= director.acts_from
        # It divides by the accumulation steps itself.
        items = None if num_items_in_batch is None else num_items_in_batch / self.args.gradient_accumulation_steps
        with _scaled_once(self.accelerator):
            return director.own_step(self, model, inputs, items, acts)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of the next step, which the director's `weighing` sees first."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.last_batch = batches[-1] if batches else self.last_batch
        if self._weighing is not None and batches:
            with same_random_state():
                self._weighing.begin(self, batches, items)
        return batches, items

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a micro-batch: weighted in training, LLaMA-Factory's own elsewhere."""
        weighing = self._weighing
        if weighing is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        rows = inputs.pop(ROWS, None)
        if rows is None:
            kept, self.compute_loss_func = self.compute_loss_func, None
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                self.compute_loss_func = kept
        with weighing.captured(self, whole=self.compute_loss_func != self._loss) as states:
            self._forward = rows, states, {name: value for name, value in inputs.items() if name != "labels"}
            return super().compute_loss(model, inputs, *args, **kwargs)

    def loss_by(self, weigh: Callable[[Any, Any], Any], model: Any, inputs: Any) -> Any:
        """Return `weigh(logits, labels)` of a forward pass that computes no loss of its own, for weighters.

        Args:
            weigh: returns a scalar.
            model: as the trainer wraps it.
            inputs: a micro-batch, left as it is.
        """

        def loss(output: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
            return self._with_auxiliary(weigh(_logits(output), labels), output)

        kept, self.compute_loss_func = self.compute_loss_func, loss
        try:
            return self.compute_loss(model, dict(inputs))
        finally:
            self.compute_loss_func = kept

    def _loss(self, output: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        """Transformers' `compute_loss_func`: called with what the forward pass gave."""
        assert self._weighing is not None
        return self._with_auxiliary(self._weighing.loss(_logits(output), labels, *self._forward), output)

    def _with_auxiliary(self, loss: Any, output: Any) -> Any:
        """Add the auxiliary loss of a mixture of experts, which the model adds to no loss but its own."""
        model = self.model
        extra, config = output.get("aux_loss"), model.config.get_text_config()
        if extra is not None and getattr(config, "output_router_logits", False):  # as the model adds it itself
            loss = loss + _auxiliary_weight(model, config) * extra.to(loss.device)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what Transformers does, and the spread of the weights beside the loss."""
        if self._weighing is not None and "loss" in logs:
            logs |= {f"{OURS}{name}": value for name, value in self._weighing.report().items()}
        super().log(logs, *args, **kwargs)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print the numbers of the end, which stand in files as well, where more is to be said."""
        if log.isEnabledFor(logging.DEBUG):
            super().log_metrics(split, metrics)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate without moving the random state, so that evaluating more often trains the same weights."""
        with same_random_state():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, mark the checkpoint complete, and only then remove those beyond `save_total_limit`."""
        run = self._get_output_dir(trial)
        folder = os.path.join(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            unmark(folder)  # of an earlier run, or one that was damaged
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        assert self.director is not None
        info = self.director.saved(folder)
        distributed.barrier()
        if self.args.should_save:
            mark_complete(folder, info)
            rotate_checkpoints(
                output_dir=run,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def learning_rates(self, first: int, steps: int) -> list[float] | None:
        """Return the learning rates of a span of steps before any is taken, None if they follow from measured losses.

        LLaMA-Factory's own scheduler is stepped over an optimizer of one number.
        """
        if self.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            return None
        number = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([number], lr=self.args.learning_rate)
        kept = self.lr_scheduler, self._created_lr_scheduler
        self.lr_scheduler = None
        try:
            scheduler: Any = self.create_scheduler(self.args.max_steps, optimizer)
        finally:
            self.lr_scheduler, self._created_lr_scheduler = kept
        rates = []
        for step in range(first + steps):
            if step >= first:
                rates.append(float(scheduler.get_last_lr()[0]))
            optimizer.step()
            scheduler.step()
        return rates

    def snapshot(self, folder: str) -> str:
        """Write a resumable checkpoint of the current step under `folder` and return its path. Collective."""
        kept = self.args.output_dir, self.args.save_total_limit, self.args.save_only_model
        self.args.output_dir, self.args.save_total_limit, self.args.save_only_model = folder, None, False
        try:
            with same_random_state():
                self._save_checkpoint(self.model, trial=None)
        finally:
            self.args.output_dir, self.args.save_total_limit, self.args.save_only_model = kept
        return os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")


def _logits(output: Any) -> Any:
    """Return the logits of a forward pass.

    Raises:
        DataflexError: there are none.
    """
    if output.get("logits") is None:
        raise DataflexError(
            "the model gave no logits, so there is no loss of single examples: a fused loss (Liger) hides them; set "
            "enable_liger_kernel: false"
        )
    return output["logits"]


def _auxiliary_weight(model: Any, config: Any) -> float:
    """Return what a mixture of experts multiplies its auxiliary loss by, wherever its class in Transformers keeps that.

    Raises:
        DataflexError: this one keeps it otherwise.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    for holder, name in ((bare, "router_aux_loss_coef"), (config, "router_aux_loss_coef"), (config, "aux_loss_coef")):
        if isinstance(found := getattr(holder, name, None), int | float):
            return float(found)
    raise DataflexError(
        f"{type(bare).__name__}: found an auxiliary loss and no coefficient of it (router_aux_loss_coef), without "
        "which it cannot be added to weighted losses; leave moe_aux_loss_coef out"
    )


@contextlib.contextmanager
def _scaled_once(accelerator: Any) -> Iterator[None]:
    """Keep DeepSpeed from dividing by the accumulation steps what has been divided by them, as Transformers does."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        yield
        return
    kept = accelerator.backward
    accelerator.backward = functools.partial(kept, scale_wrt_gas=False)
    try:
        yield
    finally:
        accelerator.backward = kept


class _WithRows:
    """A collator that hands each example's position in the training set on, beside what the model is fed."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, features: Any) -> Any:
        rows = [feature.get(ROWS) for feature in features]
        batch = self.collator([{k: v for k, v in feature.items() if k != ROWS} for feature in features])
        if rows[0] is not None:
            batch[ROWS] = torch.tensor(rows)
        return batch


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's random state as it was found."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@functools.cache
def _accept_cpu_index() -> None:
    """Let `torch.load` map to `cpu:0`, the device that Transformers names when several CPU processes resume."""
    torch.serialization.register_package(
        5, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None
    )
