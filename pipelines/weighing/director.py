"""Directs a run with a weighter: LLaMA-Factory's own order of rows, each example's loss weighted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dataflex import distributed
from dataflex.checkpoints.marks import FOLDER
from dataflex.components.user_code import code_digest
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError, MismatchError
from dataflex.pipelines.json_state import kept_by_json
from dataflex.pipelines.run import Run, open_run
from dataflex.pipelines.summary import TRAINED, write_summary
from dataflex.pipelines.weighing.anchors import Anchors
from dataflex.trainers.directing import DirectedTrainer
from dataflex.trainers.factors import ByWeighter
from dataflex.trainers.weighing import Weighing
from dataflex.weighters.base import NativeWeighter

_STATE_FILE = f"{FOLDER}/weighter.json"


class WeighingDirector:
    """A `dataflex.trainers.directing.Director`, made on every rank when the trainer exists.

    Args:
        settings: the validated run file.
        trainer: which trains.
        checkpoint: to go on from, or None.
    """

    steps_kept = 0

    def __init__(self, settings: Settings, trainer: DirectedTrainer, checkpoint: str | None):
        self.settings, self.start = settings, checkpoint
        self.run = open_run(settings, trainer, "train", (), checkpoint is not None)
        assert isinstance(self.run.method, NativeWeighter)
        self.weighter = self.run.method
        self.acts_from = settings.keys.warmup_step
        self.own_step = self.weighter.own_step if self.weighter.acts_alone else None
        self.weighing = None if self.weighter.acts_alone else self._weighing()
        if checkpoint is not None:
            self.run.state.require_same_base(checkpoint, is_resumed=True)
            self.run.say_what_has_changed(checkpoint)
            self._restore(Path(checkpoint) / _STATE_FILE)
        self._state()  # what no checkpoint could keep is refused before the first step

    def _weighing(self) -> Weighing:
        factor = weighter_factor(self.run, self.weighter, self.acts_from)
        return Weighing([factor], (), self.weighter.wants_states, self.acts_from)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = kept_by_json(self.weighter.state(), "weighter state")
        return state

    def _restore(self, path: Path) -> None:
        """Take up the state that `saved` wrote.

        Raises:
            MismatchError: it is missing, of another weighter, or of one whose code has changed.
        """
        if not path.is_file():
            raise MismatchError(f"{path}: missing; expected a checkpoint of a run with train_type: dynamic_weight")
        found = json.loads(path.read_text("utf-8"))
        if found["weighter"] != self.settings.component_name:
            raise MismatchError(
                f"{path}: found the weighter {found['weighter']}, this run has {self.settings.component_name}; resume "
                "with the weighter the run was begun with, or start anew with another output_dir"
            )
        if found.get("code") != code_digest(self.settings.component):
            raise MismatchError(
                f"{path}: the code of {found['weighter']} has changed since it was written; resume with the code that "
                "the run was begun with, or start anew with another output_dir"
            )
        self.weighter.restore(found["state"])

    def saved(self, checkpoint: str) -> dict[str, Any]:
        """Add the weighter's state to a checkpoint."""
        trainer = self.run.trainer
        if trainer.args.should_save:
            path = Path(checkpoint) / _STATE_FILE
            path.parent.mkdir(exist_ok=True)
            code = code_digest(self.settings.component)
            kept = {"weighter": self.settings.component_name, "code": code, "state": self._state()}
            path.write_text(json.dumps(kept) + "\n", "utf-8")
        return {"global_step": trainer.state.global_step, **self.run.mark()}

    def finish(self) -> None:
        """Write the run's summary."""
        trainer = self.run.trainer
        write_summary(trainer.output_dir / TRAINED, "train", self.run, {"steps": trainer.state.global_step})
        if distributed.is_main():
            self.run.access.record.finish()


def weighter_factor(
    run: Run, weighter: NativeWeighter, acts_from: int, beside: Callable[[Tensor], Tensor] | None = None
) -> ByWeighter:
    """Bring about what a weighter asks for, and return it as a factor of the loss. Collective.

    Args:
        run: the run.
        weighter: gives the weights.
        acts_from: optimizer step from which it acts.
        beside: the factor that rows have besides, see `ByWeighter`.

    Raises:
        ConfigError: it compares examples, and there is never more than one.
    """
    args = run.trainer.args
    is_batch = weighter.params.normalisation == "batch"
    parts = args.gradient_accumulation_steps if is_batch else 1
    if weighter.compares and args.per_device_train_batch_size * distributed.world() * parts == 1:
        held = "optimizer steps" if is_batch else "micro-batches"
        raise ConfigError(
            f"weighter: found {held} of one example, whose weight would always be that of the plain loss; expected two "
            "or more to be compared. Raise per_device_train_batch_size, or set gradient_accumulation_steps and "
            "normalisation: batch"
        )
    found = {}
    for need in weighter.needs():
        (store,) = run.access.ensure([need.spec], run.rows, need.state)
        found[need] = run.access.view(need.spec, run.rows, store)
    weighter.prepare(found, rows=run.rows)
    before = Anchors(run, weighter) if weighter.needs_targets else None
    return ByWeighter(weighter, args.per_device_train_batch_size, acts_from, before, beside)
