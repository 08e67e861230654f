"""Directs a run with a mixer: every round is drawn from the domains by the proportions in force."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import distributed
from dataflex.config.mixing import dataset_names
from dataflex.config.settings import Settings
from dataflex.errors import CoverageError, DataflexError, MismatchError
from dataflex.fingerprint import digest, keys_digest
from dataflex.mixers.base import LAST_BATCH, MixContext, NativeMixer, Statistics, normalised
from dataflex.pipelines.json_state import kept_by_json
from dataflex.pipelines.mixing.domains import MixtureManager, domains_of
from dataflex.pipelines.mixing.record import MixRecord, by_name, in_order, named
from dataflex.pipelines.mixing.reference import reference_losses
from dataflex.pipelines.mixing.signals import freeze_routers, signals
from dataflex.pipelines.run import Run, open_run
from dataflex.pipelines.summary import write_summary
from dataflex.pipelines.weighing.director import weighter_factor
from dataflex.schedule import Round
from dataflex.trainers.factors import ByDomain
from dataflex.trainers.micro_batch import ROWS, MicroBatch
from dataflex.trainers.observer import Observer
from dataflex.trainers.rounds import DecidedRound, micro_batches
from dataflex.trainers.stream import Exhaustion, MixtureStream
from dataflex.trainers.weighing import Weighing
from dataflex.user_code import code_digest

log = logging.getLogger(__name__)


class MixingDirector:
    """A `dataflex.trainers.round_trainer.RoundDirector`.

    The proportions of a step follow from the statistics of all steps before it: the lag is 0, and a loader's workers
    read ahead within what is decided. The weights of domains in the loss follow in the same way.

    Args:
        settings: the validated run file.
    """

    interrupts = False

    def __init__(self, settings: Settings):
        self.settings = settings
        self.schedule = settings.schedule
        self._begun = time.monotonic()

    def begin(self, trainer: Any, checkpoint: str | None) -> str | None:
        """Put the run together, and take up the state of a checkpoint."""
        self.trainer = trainer
        rows = trainer.row_sets.train
        self._members, self.domains = domains_of(
            rows, dataset_names(self.settings.llamafactory), self.settings.dataflex.mixture.unit
        )
        given = self.settings.keys.init_mixture_proportions
        self.initial = self.domains.natural if given is None else normalised(given)
        self.run: Run = open_run(self.settings, trainer, "train", mixture_manager=self._manager())
        assert isinstance(self.run.method, NativeMixer)
        self.mixer = self.run.method
        self._stream = self._new_stream()
        self._refuse_hopeless(np.ones(len(self.domains), dtype=bool), trainer.args.max_steps)
        self._proportions, self._pending = self.initial, Statistics.zeros(len(self.domains))
        self._round: Round | None = None
        self._restored: Mapping[str, Any] | None = None
        self._last_rows: np.ndarray | None = None
        self._update, self._counted = 0, 0
        self._signals = signals(self.run, self.mixer, self.settings, self._members, self.domains.names)
        self._signals[LAST_BATCH] = self._handed
        if self.settings.keys.freeze_gate:
            freeze_routers(trainer.model)
        self._watch(rows)
        self.record = MixRecord(Path(trainer.args.output_dir))
        if checkpoint is not None:
            self.run.state.require_same_base(checkpoint, is_resumed=True)
            self.run.say_what_has_changed(checkpoint)
            self._restore(Path(checkpoint))
        else:
            self.record.begin()
        self._states()  # what no checkpoint could keep is refused before the first step
        return checkpoint

    def decide(self, trainer: Any, round: Round) -> DecidedRound | None:
        """Return the round's rows; at an update, ask the mixer first."""
        before = self._restored
        if before is not None and before["round"] == round.number:
            self._restored = None  # a round that was begun goes on as it was decided
        else:
            if before is not None:
                # That round is over: the stream goes on behind it.
                self._last_rows = self._draw(trainer.rounds[before["round"]])[-trainer.global_batch :]
                self._restored = None
            self._decide(round)
        self._at_round, self._round = self._stream.state(), round
        rows = self._draw(round)
        steps = len(rows) // trainer.global_batch
        missing = round.steps * trainer.global_batch - len(rows)
        may_end = self.settings.dataflex.mixture.exhausted == "stop" or missing < trainer.global_batch
        if missing and (not may_end or round.first_step + steps == 0):
            raise CoverageError(
                f"dataflex.mixture: the domains with a share are used up after {self._stream.served.sum()} rows, at "
                f"step {round.first_step + steps}; allow more passes, set exhausted: cycle, or train for fewer steps"
            )
        if missing:
            log.warning("a domain has been passed through: the run ends after step %d", round.first_step + steps)
        if steps == 0:
            return None
        cut = round if steps == round.steps else Round(round.number, round.kind, round.first_step, steps, 0, 0)
        rows = rows[: steps * trainer.global_batch]
        return DecidedRound(cut, rows, np.full(len(rows), np.nan), np.full(len(rows), -1, np.int32))

    def _decide(self, round: Round) -> None:
        """Set the proportions of a round that begins now. Collective."""
        self._count(round.first_step)
        if round.kind == "warmup":
            self._proportions = self.initial
            self._log(round)
        else:
            self._proportions = self._mixed(round)
            if self.mixer.interval == 0:  # they stay
                self._refuse_hopeless(self._proportions > 0, self.trainer.args.max_steps - round.first_step)
            self._update += 1
            self._log(round)
            self._pending = Statistics.zeros(len(self.domains))

    def _mixed(self, round: Round) -> np.ndarray:
        """Ask the mixer for proportions. Collective."""
        context = MixContext(
            self.domains,
            self.initial,
            self._proportions,
            self._pending,
            round.first_step,
            self._update,
            self.trainer.args.seed,
            self._signals,
        )
        more = {
            "has_initial": self.settings.keys.init_mixture_proportions is not None,
            "vocabulary": len(self.trainer.processing_class),
            "budget": self.trainer.args.max_steps * self.trainer.global_batch * self._unit_per_row(),
        }
        found = self.mixer.mix(self.trainer.model_wrapped, round.first_step, context=context, **more)
        name = self.settings.component_name
        try:
            shares = normalised(found)
        except ValueError as error:
            raise DataflexError(f"{name}: {error} at step {round.first_step}") from error
        if shares.shape != self.initial.shape:
            raise DataflexError(
                f"{name}: returned {len(shares)} proportions; expected {len(self.initial)}, one for each of "
                f"{', '.join(self.domains.names)}"
            )
        if len(set(distributed.gather(digest([shares.tolist(), self._weights_now()])))) > 1:
            raise DataflexError(f"{name}: the processes have come to different proportions at step {round.first_step}")
        return shares

    def _weights_now(self) -> list[float] | None:
        found = self.mixer.loss_weights()
        return None if found is None else [float(w) for w in found]

    def _handed(self) -> dict[str, Any]:
        """Return what the classic interface passes beside: the last micro-batch of this rank and its domains."""
        trainer, args = self.trainer, self.trainer.args
        if trainer.last_batch is None and self._last_rows is not None:  # trained on before this run was resumed
            parts = micro_batches(
                self._last_rows, 1, args.gradient_accumulation_steps, args.world_size, args.process_index
            )
            trainer.last_batch = trainer.data_collator([trainer.train_dataset[row] for row in parts[-1]])
        batch = dict(trainer._prepare_inputs(trainer.last_batch)) if trainer.last_batch else {}
        rows = batch.pop(ROWS, None)
        return {
            "batch": batch or None,
            "domain_ids": None if rows is None else self._observer.domains[rows],
            "data_collator": trainer.data_collator,
            "dataset": trainer.train_dataset,
            "output_dir": trainer.args.output_dir,
        }

    def _draw(self, round: Round) -> np.ndarray:
        """Draw a round's rows; the stream moves on."""
        shares = self._proportions
        if self.domains.unit == "tokens":  # a row counts as many tokens as its domain has on average
            shares = normalised(shares / np.maximum(1, self.domains.tokens) * self.domains.rows)
        return self._stream.take(shares, round.steps * self.trainer.global_batch)

    def _new_stream(self) -> MixtureStream:
        keys, args = self.settings.dataflex.mixture, self.trainer.args
        passes = keys.passes if keys.exhausted == "cycle" else keys.passes or 1.0
        group = args.per_device_train_batch_size if self.mixer.whole_batches else 1
        draws = keys.draws or self.mixer.draws
        policy = Exhaustion(keys.exhausted, passes)
        return MixtureStream(self.domains.names, self._members, args.seed, draws, group, policy)

    def _refuse_hopeless(self, drawn: np.ndarray, steps: int) -> None:
        """Refuse steps that are more than the rows are enough for.

        Args:
            drawn: (K,) bool, domains that may have a share.
            steps: from here on.

        Raises:
            CoverageError: the domains hold too few.
        """
        keys = self.settings.dataflex.mixture
        wanted, found = steps * self.trainer.global_batch, self._stream.room(drawn)
        if keys.exhausted == "renormalise" and wanted - found >= self.trainer.global_batch:
            raise CoverageError(
                f"dataflex.mixture: {wanted} rows wanted, found {found:g} within {keys.passes or 1:g} passes; raise "
                "passes, set exhausted: cycle, or train for fewer steps"
            )

    def _watch(self, rows: Any) -> None:
        """Have the trainer's loss observed and weighted, as far as mixer and weighter ask for it."""
        trainer, mixer = self.trainer, self.mixer
        number = np.full(len(rows), -1, np.int64)
        for domain, members in enumerate(self._members):
            number[members] = domain
        reference = reference_losses(self.run, mixer)
        self._observer = Observer(number, len(self.domains), trainer.args.device, reference)
        factors: list[Any] = []
        before = beside = None
        if mixer.loss_form is not None:
            before = self._ahead if mixer.looks_ahead else None
            by_domain = ByDomain(self._observer.domains, mixer.loss_weights, mixer.loss_form, before)
            factors.append(by_domain)
            beside = by_domain.of
        acts_from, wants_states = self.settings.keys.warmup_step, False
        if self.run.weighter is not None:
            factors.append(weighter_factor(self.run, self.run.weighter, acts_from, beside))
            wants_states = self.run.weighter.wants_states
        if mixer.watches or factors:
            # Where a step's losses are seen before it is trained on, they are not seen again.
            observers = [self._observer] if mixer.watches and before is None else []
            prefetch = None if reference is None else reference.prefetch
            trainer.weighing = Weighing(factors, observers, wants_states, acts_from, prefetch)

    def _ahead(self, batches: Sequence[MicroBatch]) -> None:
        """Move the mixer's weights by a step's losses before the step is trained on. Collective."""
        for batch in batches:
            self._observer.observe(batch)
        self._pending = self._collected(1)
        assert self._round is not None
        self._mixed(self._round)
        self._pending = Statistics.zeros(len(self.domains))

    def _count(self, step: int) -> None:
        """Add what all ranks have seen since the last time. Collective."""
        weighing = self.trainer.weighing
        if weighing is None or not weighing.observers or step == self._counted:
            return
        self._pending += self._collected(step - self._counted)
        self._counted = step

    def _collected(self, steps: int) -> Statistics:
        """Return what all ranks have seen of so many steps. Collective."""
        seen = self._observer.collect(steps)
        if seen.nonfinite.any():
            log.warning("%d token losses were NaN or infinite and left out", int(seen.nonfinite.sum()))
        return seen

    def saved(self, trainer: Any, checkpoint: str) -> dict[str, Any]:
        """Add the state of mixture, mixer and weighter to a checkpoint. Collective."""
        step = trainer.state.global_step
        self._count(step)
        assert self._round is not None
        names = self.domains.names
        state = {
            **self._identity,
            "step": step,
            "round": self._round.number,
            "first_step": self._round.first_step,
            "update": self._update,
            "proportions": named(names, self._proportions),
            "stream": self._at_round,
            "pending": by_name(names, self._pending.state()),
            **self._states(),
        }
        if trainer.args.should_save:
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
            "rows at a time": self._stream.group,
        }

    def _restore(self, checkpoint: Path) -> None:
        """Take up the state that `saved` wrote."""
        state = self.record.restore(checkpoint, self._identity)
        self._restored, self._counted, self._update = state, int(state["step"]), int(state["update"])
        rounds, number = self.trainer.rounds, int(state["round"])
        if number >= len(rounds) or rounds[number].first_step != state["first_step"]:
            raise MismatchError(
                f"{checkpoint}: its shares were set at step {state['first_step']}, where this run sets none; resume "
                "with the warmup_step and update_step the run was begun with, or start anew with another output_dir"
            )
        self._round, self._at_round = rounds[number], state["stream"]
        names = self.domains.names
        self._proportions = np.array(in_order(names, state["proportions"]))
        self._stream.restore(state["stream"])
        self._pending = Statistics.restored(in_order(names, state["pending"]))
        self.mixer.restore(in_order(names, state["mixer"]))
        if self.run.weighter is not None:
            self.run.weighter.restore(state["weighter"])

    def finish(self, trainer: Any, stopped: bool) -> None:
        """Write what came out: proportions for a later run, and the shares that were realised."""
        self._count(trainer.state.global_step)
        if self.mixer.loss_form is not None:  # what comes out counts the last step as well
            end = Round(-1, "update", trainer.state.global_step, 0, 0, 0)
            if self._pending.steps:
                self._mixed(end)
            self._log(end)
        if self._round is not None:  # it may have been broken off: what was drawn behind that step was not trained on
            trained = trainer.state.global_step - self._round.first_step
            self._stream.restore(self._at_round)
            self._draw(replace(self._round, steps=min(trained, self._round.steps)))
        served, names = self._stream.served, self.domains.names
        outcome = self.mixer.outcome()
        about = {
            "steps": trainer.state.global_step,
            "unit": self.domains.unit,
            "proportions": named(names, self._proportions),
            "realised_rows": named(names, served),
            "passes": named(names, served / self.domains.rows),
        }
        write_summary(
            Path(trainer.args.output_dir) / "dataflex_summary.json",
            "train",
            self.run,
            time.monotonic() - self._begun,
            about,
        )
        shown = ", ".join(f"{n} {s / max(1, served.sum()):.1%}" for n, s in zip(names, served, strict=True))
        log.info("rows trained on: %s", shown)
        if outcome is not None:
            self.record.outcome(
                names, outcome, self.domains.unit, trainer.state.global_step, self.settings.component_name or ""
            )
        if distributed.is_main():
            self.run.access.record.finish()

    def _log(self, round: Round) -> None:
        """Append what was decided to the run's log."""
        names = self.domains.names
        line: dict[str, Any] = {
            "step": round.first_step,
            "steps": round.steps,
            "kind": round.kind,
            "unit": self.domains.unit,
            "proportions": named(names, self._proportions),
            "rows_before": named(names, self._stream.served),
        }
        if self._pending.steps:
            mean = self._pending.mean_loss.tolist()
            line["loss"] = {name: None if np.isnan(x) else x for name, x in zip(names, mean, strict=True)}
            line["tokens"] = named(names, self._pending.tokens)
            line["nonfinite_tokens"] = named(names, self._pending.nonfinite)
        for key, value in self.mixer.record().items():
            is_by_domain = isinstance(value, list) and len(value) == len(names)
            line[key] = named(names, value) if is_by_domain else value
        self.record.add(line)
        if round.number == 0 or self.schedule.update_step >= 100:
            shown = ", ".join(f"{n} {p:.3f}" for n, p in zip(names, self._proportions, strict=True))
            log.info("step %d: proportions %s", round.first_step, shown)

    def _unit_per_row(self) -> float:
        return 1.0 if self.domains.unit == "rows" else float(self.domains.tokens.sum() / self.domains.rows.sum())

    def _manager(self) -> Any:
        return MixtureManager(self.trainer.train_dataset, self.domains, self._members, self.initial)
