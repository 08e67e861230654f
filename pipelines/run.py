"""What one run works with, put together once its trainer exists."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex import distributed
from dataflex.access.feature_access import FeatureAccess
from dataflex.checkpoints.marks import recorded
from dataflex.config.idle import idle_note, known_steps
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError, CoverageError
from dataflex.features.need import Need
from dataflex.features.spec import BASE, LossSpec
from dataflex.fingerprint import difference, digest
from dataflex.live.state import ModelState
from dataflex.method import Method
from dataflex.pipelines.identity import run_identity
from dataflex.pipelines.mixing.reference_losses import check_reference
from dataflex.pipelines.recording import record as write_down
from dataflex.rows import Rows
from dataflex.schedule import Round, Schedule
from dataflex.selectors.base import NativeSelector
from dataflex.stores.root import StoreRoot
from dataflex.stores.runs import RunRecord
from dataflex.trainers.directing import DirectedTrainer
from dataflex.trainers.journal import Journal
from dataflex.trainers.rounds import DecidedRound
from dataflex.weighters.base import NativeWeighter

log = logging.getLogger(__name__)

_SHOWN = 5
"""Settings that a warning names; the rest is counted."""

_LISTED = 10
"""Dropped records that are named; the rest is counted."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        settings: the validated run file.
        trainer: which trains.
        rounds: those that are run, in order; empty where LLaMA-Factory itself orders the rows.
        rows: training rows.
        targets: target sets by name.
        tests: sets that the model is measured on in the end, by name.
        eligible: training rows with supervised tokens, the only ones that are ever trained on.
        state: names the state of the live model.
        access: gives features.
        journal: rounds of this run.
        method: the selector, mixer or weighter, or None.
        weighter: the one beside a mixer, or None.
        prefilter: the one before a selector, or None.
        identity: digest of everything a decision depends on but the model: a round is replayed only under its own.
        about: what `identity` is the digest of, in clear.
        since: when it was put together, in seconds of `time.monotonic`.
    """

    settings: Settings
    trainer: DirectedTrainer
    rounds: Sequence[Round]
    rows: Rows
    targets: Mapping[str, Rows]
    tests: Mapping[str, Rows]
    eligible: np.ndarray
    state: ModelState
    access: FeatureAccess
    journal: Journal
    method: Method | None
    weighter: NativeWeighter | None
    prefilter: NativeSelector | None
    identity: str
    about: Mapping[str, Any]
    since: float

    @property
    def methods(self) -> Sequence[Method]:
        """The method, and the weighter beside it, as far as there are any."""
        return [each for each in (self.method, self.weighter) if each is not None]

    @property
    def selector(self) -> NativeSelector:
        """The method of a run that selects."""
        assert isinstance(self.method, NativeSelector)
        return self.method

    @property
    def needs(self) -> Sequence[Need]:
        """The features that the methods declare; those of the classic interface declare none."""
        return [need for each in self.methods for need in each.needs()]

    @property
    def declared(self) -> Sequence[Need]:
        """The same, and those that the prefilter declares."""
        return [*self.needs, *(() if self.prefilter is None else self.prefilter.needs())]

    @property
    def is_live(self) -> bool:
        """Whether any of them is of the model as it is at the update."""
        return any(need.state is None for need in self.declared)

    @property
    def live_needs(self) -> list[Need]:
        """Those of them that are of the model as it is at the update."""
        return [need for need in self.needs if need.state is None]

    @property
    def updates(self) -> list[Round]:
        """The run's updates, in order."""
        return [r for r in self.rounds if r.kind == "update"]

    def update_number(self, round: Round) -> int:
        """Return how many updates come before a round."""
        return sum(r.number < round.number for r in self.updates)

    def mark(self) -> dict[str, Any]:
        """Return what the mark of a checkpoint says of the run."""
        resumable = not self.trainer.args.save_only_model
        return {"base": self.state.base, "run": self.about, "is_resumable": resumable}

    def say_what_has_changed(self, checkpoint: str) -> None:
        """Warn of other settings than those of the run that wrote a checkpoint, which this one goes on from.

        They are not refused, as a run may be prolonged; but what a checkpoint has in itself does not follow them.
        """
        before = recorded(checkpoint).get("run") if distributed.is_main() else None
        changed = difference(self.about, before) if before is not None else []
        if not changed:
            return
        shown = "; ".join(changed[:_SHOWN]) + (f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")
        log.warning(
            "%s was written under other settings (there → here): %s\n"
            "What is decided from here on follows the new ones; learning rates, optimizer and the rounds begun "
            "stay as they are in the checkpoint\n"
            "To train under the new settings from the beginning, name another output_dir",
            checkpoint, shown,
        )  # fmt: skip

    def check(self, rows: np.ndarray, count: int, among: Rows) -> None:
        """Hold a selector's answer against what was asked.

        Args:
            rows: the answer, (k,).
            count: rows that were wanted.
            among: the rows that it could look at.

        Raises:
            CoverageError: it has another number of rows, positions that the training set does not have, or rows without
                a label; the last is a warning for a selector of the classic interface.
        """
        low, high = rows.min(initial=0), rows.max(initial=0)
        unlabelled = int((among.supervised[rows] == 0).sum()) if low >= 0 and high < len(among) else 0
        if unlabelled and not self.selector.may_choose_unlabelled:
            raise CoverageError(
                f"{self.settings.component_name}: {unlabelled} of the chosen rows have no supervised token; there is "
                "nothing to learn from them"
            )
        if unlabelled:
            log.warning("%d of the chosen rows have no supervised token", unlabelled)
        if len(rows) != count or low < 0 or high >= len(among):
            raise CoverageError(
                f"{self.settings.component_name}: returned {len(rows)} rows between {low} and {high}; expected {count} "
                f"rows between 0 and {len(among) - 1}"
            )

    def decided(self, round: Round) -> DecidedRound:
        """Return an earlier round of this run, as rank 0 recorded it. Collective.

        Raises:
            CoverageError: it is not in the journal.
        """
        found = distributed.broadcast(
            self.journal.read(round, self.rows.keys, self.trainer.global_batch) if distributed.is_main() else None
        )
        if found is None:
            raise CoverageError(f"{self.journal.path(round.number)}: missing; a later round builds on it")
        return found


def open_run(
    settings: Settings,
    trainer: DirectedTrainer,
    verb: str,
    rounds: Sequence[Round],
    is_resumed: bool = False,
    **runtime: Any,
) -> Run:
    """Put a run together. Collective.

    Args:
        settings: the run file.
        trainer: of the run.
        verb: which is run.
        rounds: of it.
        is_resumed: whether it goes on from a checkpoint.
        runtime: goes to methods that want objects of the run.

    Raises:
        ConfigError: no training row has a supervised token; gradients are asked for of a quantised base; the code of
            the method stands in no file.
        CorruptionError: a checkpoint that features are asked of is damaged.
        MismatchError: it was trained on another base.
    """
    since, found = time.monotonic(), trainer.row_sets
    eligible = np.flatnonzero(found.train.supervised > 0)
    _report(found.train, found.targets, len(eligible))
    state = ModelState(trainer)
    method, weighter = settings.new_method(), settings.new_weighter()
    prefilter = settings.new_prefilter()
    methods = [each for each in (method, weighter, prefilter) if each is not None]
    for each in methods:
        each._bind(_runtime(trainer, **runtime))
    if verb == "train" and distributed.is_main():
        _say_what_is_idle(settings, trainer, [each for each in methods if each is not prefilter])
    identity = run_identity(settings, trainer, state, methods)
    root, named = StoreRoot(settings.store_root), digest(identity)
    record = RunRecord(root.files, settings.llamafactory["output_dir"], verb, named, settings.component_name or "")
    write_down(verb, settings, trainer, identity, named, is_resumed)
    run = Run(
        settings=settings,
        trainer=trainer,
        rounds=rounds,
        rows=found.train,
        targets=found.targets,
        tests=found.tests,
        eligible=eligible,
        state=state,
        access=FeatureAccess(root, state, settings.dataflex, record, settings.llamafactory.get("cutoff_len", 2048)),
        journal=Journal(trainer.output_dir / "rounds"),
        method=method,
        weighter=weighter,
        prefilter=prefilter,
        identity=named,
        about=identity,
        since=since,
    )
    specs = [need.spec for need in run.declared] + list(settings.dataflex.features)
    if specs or run.tests:
        run.access.reach(settings.dataflex.must_write(settings.schedule, run.is_live))
        state.refuse_quantised(any(spec.gradient for spec in specs))
    check_reference(run)  # its tokenizer first: of another one, the weights would be of another shape too
    for folder in dict.fromkeys(need.state for need in run.declared):
        if folder is not None and folder != BASE:  # refused now, and not after the steps before the first update
            run.state.require_whole(folder)
            run.state.require_same_base(folder)
    sets = {"train": [run.rows], "targets": list(run.targets.values())}
    wanted = [(need.spec, rows) for need in run.declared for rows in sets[need.of]]
    wanted += [(spec, run.rows) for each in methods for spec in each.asked]
    wanted += [(spec, rows) for spec in settings.dataflex.features for some in sets.values() for rows in some]
    wanted += [(LossSpec(), rows) for rows in run.tests.values()]
    run.access.require(wanted)
    responses = settings.dataflex.test_responses
    if responses is not None:
        for name in settings.dataflex.responded_tests:
            if name in run.tests:
                run.access.require_rewards(responses, run.tests[name])
    return run


def _runtime(trainer: DirectedTrainer, **more: Any) -> dict[str, Any]:
    """Return the objects of the run that a class of the classic interface may ask for in its constructor."""
    return {
        "dataset": trainer.train_dataset,
        "eval_dataset": trainer.eval_dataset,
        "accelerator": trainer.accelerator,
        "data_collator": trainer.data_collator,
        "cache_dir": str(trainer.output_dir / "selector_cache"),
        **more,
    }


def _say_what_is_idle(settings: Settings, trainer: DirectedTrainer, methods: Sequence[Method]) -> None:
    """Warn of methods without an effect, where `validate` could not yet know how many steps there are."""
    schedule, args = settings.schedule, trainer.args
    if known_steps(settings.keys, schedule, settings.llamafactory) is not None:
        return
    size = {"rows": len(trainer.row_sets.train), "batch": trainer.global_batch}
    if settings.train_type == "dynamic_weight":
        total = Schedule(num_train_epochs=args.num_train_epochs).total(**size)
    else:
        total = min(schedule.total(**size), schedule.flex_steps(**size))
    beside = settings.dataflex.weighter
    names = [settings.component_name or "", *([beside.name] if beside else [])]
    for name, each in zip(names, methods, strict=True):
        if note := idle_note(name, each, schedule, total):
            log.warning("%s", note)


def _report(rows: Rows, targets: Mapping[str, Rows], eligible: int) -> None:
    """Say what the data came to, and refuse a training set without a usable row."""
    sources = ", ".join(rows.names[i] for i in np.unique(rows.dataset))
    sets = ", ".join(f"{name} ({len(target)})" for name, target in targets.items()) or "none"
    dropped = "an unknown number" if rows.dropped is None else len(rows.dropped)
    truncated = "an unknown number" if rows.truncated is None else int(rows.truncated.sum())
    said = "%d rows of %s: %s dropped, %s truncated by cutoff_len, %d without supervised tokens; targets: %s"
    log.info(said, len(rows), sources, dropped, truncated, len(rows) - eligible, sets)
    if not eligible:
        raise ConfigError("dataset: found no row with a supervised token; check template and cutoff_len")
    if not distributed.is_main():  # the rows are the same on every rank
        return
    for name, some in (("training set", rows), *targets.items()):
        if some.dropped:
            log.warning("%s: LLaMA-Factory dropped %s", name, _listed(some))
    for name, target in targets.items():
        if shared := int(np.isin(rows.keys, target.keys).sum()):
            log.warning(
                "target set %s: %d training rows are identical to rows of it; dataflex.exclude_targets: true leaves "
                "them out",
                name, shared,
            )  # fmt: skip


def _listed(rows: Rows) -> str:
    """Say which records were dropped: the numbers of the first ten, counted from 0 in their dataset."""
    dropped = sorted(rows.dropped or ())
    shown: dict[str, list[str]] = {}
    for dataset, record in dropped[:_LISTED]:
        shown.setdefault(rows.names[dataset], []).append(str(record))
    records = "; ".join(f"{name} {', '.join(numbers)}" for name, numbers in shown.items())
    more = f" and {len(dropped) - _LISTED} more" if len(dropped) > _LISTED else ""
    return f"{len(dropped)} records, which have no prompt or no response in the expected form: {records}{more}"
