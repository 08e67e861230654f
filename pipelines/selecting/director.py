"""Directs a training run: every round is read from the journal, drawn as a warm-up, or chosen by the selector."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dataflex import distributed
from dataflex.checkpoints.marks import FOLDER
from dataflex.config.settings import Settings
from dataflex.errors import CoverageError, DataflexError
from dataflex.live.moments import MOMENTS_FILE
from dataflex.pipelines.run import open_run
from dataflex.pipelines.selecting import update, warmup
from dataflex.pipelines.selecting.beginning import Begun, begin
from dataflex.pipelines.selecting.diagnostics import Diagnostics
from dataflex.pipelines.selecting.kept_texts import keep
from dataflex.pipelines.selecting.pool import most_rows
from dataflex.pipelines.summary import TRAINED, write_summary
from dataflex.rows import Rows
from dataflex.schedule import Round
from dataflex.trainers.directing import DirectedTrainer
from dataflex.trainers.rounds import DecidedRound

log = logging.getLogger(__name__)


def directed(settings: Settings, trainer: DirectedTrainer, checkpoint: str | None) -> SelectingDirector:
    """Put a training with a selector together, once its trainer exists; call it on every rank.

    Raises:
        DataflexError: the run cannot come to a good end, as far as is known before anything is computed.
    """
    run = open_run(settings, trainer, SelectingDirector.verb, trainer.rounds, checkpoint is not None)
    wanted = max((round.steps for round in run.updates), default=0) * trainer.global_batch
    most = most_rows(run)
    largest = wanted if settings.schedule.update_step > 0 else min(wanted, most)
    behind = "" if run.prefilter is None else " behind dataflex.prefilter, whose keep can be raised"
    too_many = (
        f"update_step: an update needs {largest} rows ({largest // trainer.global_batch} steps of "
        f"{trainer.global_batch}), found {most} that can be chosen{behind}; lower update_step or the batch size"
    )
    return SelectingDirector(begin(run, checkpoint, largest, too_many))


class SelectingDirector:
    """A `dataflex.trainers.directing.RoundDirector`; those of `featurize` and `select` stop at the first update.

    Args:
        begun: the run, and where it starts.
    """

    verb = "train"
    weighing = None
    own_step = None
    acts_from = 0

    def __init__(self, begun: Begun):
        self.run, self.warm, self.start = begun.run, begun.warm, begun.start
        self.settings = begun.run.settings
        self.updates: list[dict[str, Any]] = []
        self._keep_texts_of_earlier()

    @property
    def rounds(self) -> Sequence[Round]:
        """The rounds that are run."""
        return self.run.rounds

    def decide(self, round: Round) -> DecidedRound | None:
        """Return the round on every rank, recorded before its first batch."""
        self.warm.release()
        recorded = distributed.broadcast(self._recorded(round) if distributed.is_main() else None)
        if recorded is not None:
            log.info("%s, from the journal", _line(recorded, self.run.rows))
            self._diagnosed(recorded)
            return recorded
        if round.kind == "warmup":
            decided = warmup.draw(self.run, round)
        else:
            if self.settings.dataflex.keep_warmup:
                self.warm.keep(round)
            decided = update.decide(self.run, round)
            self.updates.append(
                {"round": round.number, **{k: decided.info[k] for k in ("computed", "reused", "seconds")}}
            )
        decided = distributed.broadcast(decided)
        if round.kind == "warmup" and self.verb == "train":
            keep(self.run, decided)
        if distributed.is_main():
            self.run.journal.write(decided, self.run.rows)
        log.info("%s", _line(decided, self.run.rows))
        self._diagnosed(decided)
        return decided

    def _keep_texts_of_earlier(self) -> None:
        """Keep what the rows of rounds say that were begun elsewhere: they come with a kept state, without texts."""
        run = self.run
        if self.verb != "train" or not distributed.is_main() or not self.settings.dataflex.keep_texts:
            return
        known = {round.number: round for round in self.rounds}
        for number in run.journal.numbers():
            if number in known and not run.journal.texts(number).exists():
                found = run.journal.read(known[number], run.rows.keys, run.trainer.global_batch)
                pool = run.journal.read_pool(number)
                if found is not None:
                    keep(run, found, None if pool is None else pool[0])

    def _diagnosed(self, decided: DecidedRound) -> None:
        """Show what an update came to: in one line and, if it begins now, to whoever follows the training's log."""
        found = Diagnostics(**decided.info.get("diagnostics", {}))
        if text := str(found):
            log.info("update %d: %s", decided.round.update, text)
        metrics, trainer = found.metrics() | _work(decided), self.run.trainer
        if metrics and decided.round.first_step == trainer.state.global_step:
            trainer.log(metrics)

    def saved(self, checkpoint: str) -> dict[str, Any]:
        """Add the rounds so far, and the moments by parameter name, to a checkpoint."""
        trainer, moments = self.run.trainer, None
        if trainer.args.save_only_model:
            said = "left out: save_only_model"
        else:
            try:
                moments, said = self.run.state.moments(), MOMENTS_FILE
            except DataflexError as error:  # an optimizer that is not Adam trains all the same
                said = f"none: {error}"
        if distributed.is_main():
            (Path(checkpoint) / FOLDER).mkdir(exist_ok=True)
            if moments is not None:
                moments.save(Path(checkpoint) / MOMENTS_FILE)
            numbers = [r.number for r in self.rounds if r.first_step < trainer.state.global_step]
            # What rows say goes with a checkpoint in the run's own folder, and into no store with a kept state.
            has_texts = Path(checkpoint).name.startswith(PREFIX_CHECKPOINT_DIR)
            self.run.journal.copy_to(Path(checkpoint) / FOLDER / "rounds", numbers, has_texts)
        return {"global_step": trainer.state.global_step, "moments": said, **self.run.mark()}

    @property
    def steps_kept(self) -> int:
        """Steps whose end state is kept beside the features: they need no checkpoint."""
        return self.warm.reached

    def finish(self) -> None:
        """Write the run's summary."""
        trainer = self.run.trainer
        self.warm.release()
        self.summarise(trainer.output_dir / TRAINED, steps=trainer.state.global_step)

    def summarise(self, path: Path, **more: Any) -> None:
        """Write what the run came to. Collective."""
        about = {
            "started_from": self.warm.lineage if self.warm.loaded else None,
            "updates": self.updates,
            "diagnostics": self.diagnostics() if distributed.is_main() else [],
            **more,
        }
        write_summary(path, self.verb, self.run, about)
        if distributed.is_main():
            self.run.access.record.finish()

    def diagnostics(self) -> list[dict[str, Any]]:
        """Return the record of every update that was trained on, those before a resumption among them."""
        run, step = self.run, self.run.trainer.state.global_step
        begun = [round for round in run.updates if round.first_step < step]
        found = [run.journal.read(round, run.rows.keys, run.trainer.global_batch) for round in begun]
        kept = [decided for decided in found if decided is not None and "diagnostics" in decided.info]
        return [{"round": decided.round.number, **decided.info["diagnostics"]} for decided in kept]

    def _recorded(self, round: Round) -> DecidedRound | None:
        """Return a journaled round: always if it was begun, else only if it was decided alike."""
        found = self.run.journal.read(round, self.run.rows.keys, self.run.trainer.global_batch)
        begun = round.first_step < self.run.trainer.state.global_step
        if found is None and begun:
            raise CoverageError(f"{self.run.journal.path(round.number)}: missing; the checkpoint was trained on it")
        return found if found is not None and (begun or found.info.get("identity") == self.run.identity) else None


def _work(decided: DecidedRound) -> dict[str, float]:
    """Return what a round took, and how old the features behind it are, for a training log."""
    found: dict[str, float] = {
        name: decided.info[name] for name in ("computed", "reused", "seconds") if name in decided.info
    }
    ages = decided.ages[decided.ages >= 0]
    if len(ages):
        found |= {"age_mean": float(ages.mean()), "age_most": int(ages.max())}
    return {f"dataflex/{name}": value for name, value in found.items()}


def _line(decided: DecidedRound, rows: Rows) -> str:
    """Describe a round in one line."""
    round, info = decided.round, decided.info
    what = f"update {round.update}" if round.kind == "update" else "warm-up"
    steps = f"steps {round.first_step + 1}-{round.first_step + round.steps}"
    text = f"round {round.number} ({what}, {steps}): {len(decided.rows)} rows"
    counts = np.bincount(rows.dataset[decided.rows], minlength=int(rows.dataset.max()) + 1)
    if (counts > 0).sum() > 1:
        text += " (" + ", ".join(f"{rows.names[i]} {count}" for i, count in enumerate(counts) if count) + ")"
    if "computed" in info:
        text += f"; features computed {info['computed']}, reused {info['reused']}, {info['seconds']} s"
    return text
