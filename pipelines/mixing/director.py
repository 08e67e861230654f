"""Directs a run with a mixer: every round is drawn from the domains by the proportions in force."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import distributed
from dataflex.components.user_code import code_digest
from dataflex.config.mixing import dataset_names
from dataflex.config.settings import Settings
from dataflex.errors import MismatchError
from dataflex.fingerprint import keys_digest
from dataflex.mixers.base import NativeMixer, Statistics, normalised
from dataflex.pipelines.json_state import kept_by_json
from dataflex.pipelines.mixing.domains import MixtureManager, domains_of
from dataflex.pipelines.mixing.drawing import Drawing
from dataflex.pipelines.mixing.mixture_log import MixRecord, by_name, in_order, metrics, named
from dataflex.pipelines.mixing.shares import Shares
from dataflex.pipelines.mixing.signals import freeze_routers, signals
from dataflex.pipelines.mixing.watch import Watch
from dataflex.pipelines.run import open_run
from dataflex.pipelines.summary import TRAINED, write_summary
from dataflex.schedule import Round
from dataflex.trainers.directing import DirectedTrainer
from dataflex.trainers.micro_batch import ROWS
from dataflex.trainers.rounds import DecidedRound, micro_batches

log = logging.getLogger(__name__)


class MixingDirector:
    """A `dataflex.trainers.directing.RoundDirector`, made on every rank when the trainer exists.

    The proportions of a step follow from the statistics of all steps before it: the lag is 0, and a loader's workers
    read ahead within what is decided. The weights of domains in the loss follow in the same way.

    Args:
        settings: the validated run file.
        trainer: which trains.
        checkpoint: to go on from, or None.
    """

    own_step = None
    acts_from = 0
    steps_kept = 0

    def __init__(self, settings: Settings, trainer: DirectedTrainer, checkpoint: str | None):
        self.settings, self.trainer, self.start = settings, trainer, checkpoint
        self.rounds: Sequence[Round] = trainer.rounds
        rows, unit = trainer.row_sets.train, settings.dataflex.mixture.unit
        members, self.domains = domains_of(rows, dataset_names(settings.llamafactory), unit)
        given = settings.keys.init_mixture_proportions
        initial = self.domains.natural if given is None else normalised(given)
        manager = MixtureManager(trainer.train_dataset, self.domains, members, initial)
        self.run = open_run(settings, trainer, "train", trainer.rounds, checkpoint is not None, mixture_manager=manager)
        assert isinstance(self.run.method, NativeMixer)
        self.mixer = self.run.method
        self.drawing = self._drawing(members)
        self.drawing.refuse_hopeless(np.ones(len(self.domains), dtype=bool), trainer.args.max_steps)
        asked = signals(self.run, self.mixer, settings, members, self.domains.names, self._handed)
        self.shares = self._shares(initial, asked)
        if settings.keys.freeze_gate:
            freeze_routers(trainer.model)
        self._last_rows: np.ndarray | None = None
        self._told = -1
        self._resumed: Mapping[str, Any] | None = None
        self.watch = Watch(self.run, self.mixer, members, settings.keys.warmup_step, self._ahead)
        self.weighing = self.watch.weighing
        self.record = MixRecord(trainer.output_dir)
        if checkpoint is not None:
            self.run.state.require_same_base(checkpoint, is_resumed=True)
            self.run.say_what_has_changed(checkpoint)
            self._restore(Path(checkpoint))
        else:
            self.record.begin()
        self._states()  # what no checkpoint could keep is refused before the first step

    def _drawing(self, members: Sequence[np.ndarray]) -> Drawing:
        args, keys = self.trainer.args, self.settings.dataflex.mixture
        group = args.per_device_train_batch_size if self.mixer.whole_batches else 1
        draws = keys.draws or self.mixer.draws
        return Drawing(self.domains, members, keys, args.seed, self.trainer.global_batch, group, draws)

    def _shares(self, initial: np.ndarray, asked: Mapping[str, Callable[[], Any]]) -> Shares:
        rows, tokens = self.domains.rows.sum(), self.domains.tokens.sum()
        per_row = 1.0 if self.domains.unit == "rows" else float(tokens / rows)
        given = {
            "has_initial": self.settings.keys.init_mixture_proportions is not None,
            "vocabulary": len(self.trainer.processing_class),
            "budget": self.trainer.args.max_steps * self.trainer.global_batch * per_row,
        }
        name = self.settings.component_name or ""
        return Shares(name, self.mixer, self.domains, initial, asked, given, self.trainer.args.seed)

    def decide(self, round: Round) -> DecidedRound | None:
        """Return the round's rows; at an update, ask the mixer first."""
        before, self._resumed = self._resumed, None
        if before is None or before["round"] != round.number:
            if before is not None:
                # That round is over: the stream goes on behind it.
                rows = self.drawing.take(self.rounds[before["round"]], self.shares.now)
                self._last_rows = rows[-self.trainer.global_batch :]
            self._decide(round)
        return self.drawing.begin(round, self.shares.now)

    def _decide(self, round: Round) -> None:
        """Set the proportions of a round that begins now. Collective."""
        self._count(round.first_step)
        if round.kind == "warmup":
            self.shares.begin()
            self._log(round)
            return
        self.shares.now = self.shares.move(self.trainer.model_wrapped, round.first_step)
        if self.mixer.interval == 0:  # they stay
            self.drawing.refuse_hopeless(self.shares.now > 0, self.trainer.args.max_steps - round.first_step)
        self._log(round)
        self.shares.forget()

    def _handed(self) -> dict[str, Any]:
        """Return what the classic interface passes beside: the last micro-batch of this rank and its domains."""
        trainer, args = self.trainer, self.trainer.args
        last = trainer.last_batch
        if last is None and self._last_rows is not None:  # trained on before this run was resumed
            parts = micro_batches(
                self._last_rows, 1, args.gradient_accumulation_steps, args.world_size, args.process_index
            )
            last = trainer.data_collator([trainer.train_dataset[row] for row in parts[-1]])
        batch = dict(trainer._prepare_inputs(last)) if last else {}
        rows = batch.pop(ROWS, None)
        return {
            "batch": batch or None,
            "domain_ids": None if rows is None else self.watch.domains[rows],
            "data_collator": trainer.data_collator,
            "dataset": trainer.train_dataset,
            "output_dir": trainer.args.output_dir,
        }

    def _ahead(self, seen: Statistics) -> None:
        """Move the mixer's weights by a step's losses before the step is trained on. Collective."""
        self.shares.pending = seen
        self.shares.move(self.trainer.model_wrapped, self.drawing.round.first_step)
        self.shares.pending = Statistics.zeros(len(self.domains))

    def _count(self, step: int) -> None:
        """Add what all ranks have seen since the last time. Collective."""
        self.shares.pending += self.watch.seen_until(step)

    def saved(self, checkpoint: str) -> dict[str, Any]:
        """Add the state of mixture, mixer and weighter to a checkpoint. Collective."""
        step = self.trainer.state.global_step
        self._count(step)
        state = {
            **self._identity,
            "step": step,
            "round": self.drawing.round.number,
            "first_step": self.drawing.round.first_step,
            **self.shares.state(),
            "stream": self.drawing.state(),
            **self._states(),
        }
        if self.trainer.args.should_save:
            self.record.save(Path(checkpoint), state)
        return {"global_step": step, **self.run.mark()}

    def _states(self) -> dict[str, Any]:
        """Return what mixer and weighter keep.

        Raises:
            DataflexError: JSON would change it.
        """
        weighter = self.run.weighter
        return {
            "mixer": by_name(self.domains.names, kept_by_json(self.mixer.state(), "mixer state")),
            "weighter": kept_by_json(weighter.state(), "weighter state") if weighter is not None else {},
        }

    @property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint of this mixture has in common with the run."""
        names = self.domains.names
        rows = dict(zip(names, self.domains.rows.tolist(), strict=True))
        beside = self.settings.dataflex.weighter
        methods = {"mixer": self.settings.component_name, "weighter": beside and beside.name}
        given = {"mixer": self.settings.params, "weighter": self.settings.weighter_params}
        code = {"mixer": code_digest(self.settings.component), "weighter": code_digest(self.settings.weighter)}
        return {
            "methods": methods,
            "code": {kind: found for kind, found in code.items() if found},
            "parameters": {
                kind: None if some is None else some.model_dump(mode="json") for kind, some in given.items()
            },
            "domains": list(names),
            "rows": rows,
            "content": keys_digest(self.run.rows.keys),
            "global_batch": self.trainer.global_batch,
            "seed": self.trainer.args.seed,
            "mixture": self.settings.dataflex.mixture.model_dump(mode="json"),
            "rows at a time": self.drawing.group,
        }

    def _restore(self, checkpoint: Path) -> None:
        """Take up the state that `saved` wrote."""
        state = self.record.restore(checkpoint, self._identity)
        number = int(state["round"])
        if number >= len(self.rounds) or self.rounds[number].first_step != state["first_step"]:
            raise MismatchError(
                f"{checkpoint}: its shares were set at step {state['first_step']}, where this run sets none; resume "
                "with the warmup_step and update_step the run was begun with, or start anew with another output_dir"
            )
        self._resumed = state
        self.watch.restore(int(state["step"]))
        self.drawing.restore(self.rounds[number], state["stream"])
        self.shares.restore(state)
        self.mixer.restore(in_order(self.domains.names, state["mixer"]))
        if self.run.weighter is not None:
            self.run.weighter.restore(state["weighter"])

    def finish(self) -> None:
        """Write what came out: proportions for a later run, and the shares that were realised."""
        step, names, shares = self.trainer.state.global_step, self.domains.names, self.shares
        self._count(step)
        if self.mixer.loss_form is not None:  # what comes out counts the last step as well
            if shares.pending.steps:
                shares.move(self.trainer.model_wrapped, step)
            self._log(Round(-1, "update", step, 0, 0, 0))
        self.drawing.end_at(step, shares.now)
        served = self.drawing.served
        about = {
            "steps": step,
            "unit": self.domains.unit,
            "proportions": named(names, shares.now),
            "realised_rows": named(names, served),
            "passes": named(names, served / self.domains.rows),
        }
        write_summary(self.trainer.output_dir / TRAINED, "train", self.run, about)
        shown = ", ".join(f"{n} {s / max(1, served.sum()):.1%}" for n, s in zip(names, served, strict=True))
        log.info("rows trained on: %s", shown)
        outcome = self.mixer.outcome()
        if outcome is not None:
            self.record.outcome(names, outcome, self.domains.unit, step, self.settings.component_name or "")
        if distributed.is_main():
            self.run.access.record.finish()

    def _tell(self, round: Round, line: Mapping[str, Any]) -> None:
        """Show what was decided to whoever follows the training, no more often than losses are."""
        step, every = round.first_step, max(1, int(self.trainer.state.logging_steps))
        if round.number >= 0 and step == self.trainer.state.global_step and step // every != self._told // every:
            self._told = step
            self.trainer.log(metrics(line))

    def _log(self, round: Round) -> None:
        """Append what was decided to the run's log."""
        names, shares, pending = self.domains.names, self.shares.now, self.shares.pending
        line: dict[str, Any] = {
            "step": round.first_step,
            "steps": round.steps,
            "kind": round.kind,
            "unit": self.domains.unit,
            "proportions": named(names, shares),
            "rows_before": named(names, self.drawing.served),
        }
        if pending.steps:
            mean = pending.mean_loss.tolist()
            line["loss"] = {name: None if np.isnan(x) else x for name, x in zip(names, mean, strict=True)}
            line["tokens"] = named(names, pending.tokens)
            line["nonfinite_tokens"] = named(names, pending.nonfinite)
        for key, value in self.mixer.record().items():
            is_by_domain = isinstance(value, list) and len(value) == len(names)
            line[key] = named(names, value) if is_by_domain else value
        self.record.add(line)
        self._tell(round, line)
        if round.number == 0 or self.settings.schedule.update_step >= 100:
            text = ", ".join(f"{n} {p:.3f}" for n, p in zip(names, shares, strict=True))
            log.info("step %d: proportions %s", round.first_step, text)
