"""One update: its features are brought about, the selector chooses, the choice becomes a round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dataflex import distributed
from dataflex.access.views import Mixed, StoreView
from dataflex.draws import generator, stream
from dataflex.errors import CoverageError
from dataflex.features.need import StateName
from dataflex.features.spec import FeatureSpec
from dataflex.pipelines.run import Run
from dataflex.pipelines.selecting.diagnostics import Diagnostics, diagnose, gradient_norms
from dataflex.pipelines.selecting.kept_texts import Views, keep
from dataflex.pipelines.selecting.refresh import anchors, first, moved, rest
from dataflex.rows import Rows, Status
from dataflex.schedule import Round
from dataflex.selectors.base import BASE, Context, Need, Selection, View
from dataflex.stores.parquet import ParquetStore
from dataflex.trainers.rounds import DecidedRound


def decide(run: Run, round: Round) -> DecidedRound:
    """Choose the rows of a round. Collective."""
    begun, tally = time.monotonic(), run.access.tally
    before = tally.computed, tally.reused, tally.seconds
    wanted = round.steps * run.trainer.global_batch
    # update_step 0: one selection holds for the rest of the epoch, so it is passed over as often as needed.
    count = wanted if run.settings.schedule.update_step > 0 else min(wanted, len(run.eligible))
    chosen = choose(run, round, count)
    selection = chosen.selection
    if selection.pool is not None and distributed.is_main():
        judged = selection.pool if selection.judged is None else selection.judged
        run.journal.write_pool(round.number, selection.pool, chosen.updated, judged, chosen.norms)
    seed = run.trainer.args.seed
    order = _order(run, round, selection.rows)
    if wanted > count:
        order = np.concatenate([order, stream(order, 0, wanted - count, seed, "again", round.number)])
    scores = np.full(count, np.nan) if selection.scores is None else np.asarray(selection.scores, dtype=np.float64)
    ages = np.full(count, -1) if selection.ages is None else np.asarray(selection.ages)
    info = {
        "method": run.settings.component_name,
        "identity": run.identity,
        "computed": tally.computed - before[0],
        "reused": tally.reused - before[1],
        "seconds": round_seconds(time.monotonic() - begun),
        "feature_seconds": round_seconds(tally.seconds - before[2]),
        "nonfinite": chosen.nonfinite,
        "recipes": [run.access.recipe(need.spec) for need in run.live_needs],
        "diagnostics": chosen.diagnostics.plain(),
    }
    decided = DecidedRound(round, selection.rows[order], scores[order], ages[order].astype(np.int32), info)
    keep(run, decided, selection.pool, chosen.views)
    return decided


@dataclass(frozen=True)
class Chosen:
    """What an update came to.

    Attributes:
        selection: the rows.
        updated: (N,) int32, the update at which the features of each training row were computed.
        diagnostics: what the update looks like as a whole.
        views: the features that were asked for.
        norms: (N,) the norm of every training row's gradient, NaN where the update had none.
        nonfinite: training rows of which a feature was NaN or infinite.
    """

    selection: Selection
    updated: np.ndarray
    diagnostics: Diagnostics
    views: Views
    norms: np.ndarray
    nonfinite: int


def choose(run: Run, round: Round, count: int) -> Chosen:
    """Let the selector choose `count` rows, the same on every rank. Collective."""
    features = UpdateFeatures(run, round)
    selection = _ask(run, round, count, features)
    if features.waiting and selection.pool is not None:
        features.refresh(selection.pool, selection.rows)
        selection = _ask(run, round, count, features)
    run.check(selection.rows, count)
    earlier = [r for r in run.updates if r.number < round.number]
    last = run.decided(earlier[-1]).rows if earlier else None
    norms = gradient_norms(features.of_training_rows, len(run.rows))
    found = diagnose(run.rows, selection, features.of_training_rows, last, norms)
    is_lost = np.zeros(len(run.rows), bool)
    for _, view in features.of_training_rows:
        is_lost |= np.asarray(view.status) == Status.NONFINITE
    return Chosen(selection, features.updated, found, features.views, norms, int(is_lost.sum()))


def _ask(run: Run, round: Round, count: int, features: UpdateFeatures) -> Selection:
    """Return the selector's answer, the same on every rank. Collective."""
    trainer = run.trainer
    history = [run.decided(r).rows for r in run.updates if r.number < round.number]
    updates = sum(r.epoch == round.epoch for r in run.updates)
    context = Context(run.rows, run.targets, features.get, round, features.update, updates, history, trainer.args.seed)
    # It may ask for features and score its share of the rows, so it is called everywhere; rank 0's answer counts.
    found = run.selector.select(
        trainer.model_wrapped,
        step_id=round.first_step,
        num_samples=count,
        context=context,
        optimizer_state=trainer.optimizer.state,
        scheduler_state=trainer.lr_scheduler.state_dict(),
        current_update_times=round.update,
        update_times=run.settings.schedule.update_times,
        tokenizer=trainer.processing_class,
    )
    if run.selector.leaves_gradients:
        trainer.model.zero_grad()
    with distributed.together():
        answer = found if isinstance(found, Selection) else Selection(_flat(found, run.settings.component_name or ""))
    return distributed.broadcast(answer)


def ensure_base(run: Run) -> None:
    """Bring about the declared features of the base model. Collective."""
    for of, sets in (("train", [run.rows]), ("targets", list(run.targets.values()))):
        specs = list(dict.fromkeys(need.spec for need in run.needs if (need.of, need.state) == (of, BASE)))
        for rows in sets if specs else []:
            run.access.ensure(specs, rows, BASE)


@dataclass
class UpdateFeatures:
    """The features of one update, every declared one brought about when it is made. Making it is collective."""

    run: Run
    round: Round

    def __post_init__(self) -> None:
        run = self.run
        self.update = run.update_number(self.round)
        self.updated = np.full(len(run.rows), self.update, dtype=np.int32)
        self._views: dict[tuple[FeatureSpec, str | None, StateName], View] = {}
        self._refresh = run.settings.dataflex.refresh
        last = self._last_updated()
        if last is not None:
            fresh = first(self._refresh, self.update, last)
            self.updated = np.where(fresh, self.update, last).astype(np.int32)
        has_stale = any(need.of == "train" for need in run.live_needs) and bool((self.updated != self.update).any())
        self.waiting = self._refresh.policy == "rotating" and has_stale
        groups = [
            ([need for need in run.needs if (need.of, need.state) == (of, state)], name)
            for of, state in dict.fromkeys((need.of, need.state) for need in run.needs)
            for name in (run.targets if of == "targets" else [None])
        ]
        passes = sum(run.access.passes([need.spec for need in needs], self._rows(name)) for needs, name in groups)
        with run.access.progress.showing(passes):
            for needs, name in groups:
                for need, view in zip(needs, self._together(needs, name), strict=True):
                    self._views[need.spec, name, need.state] = view

    def refresh(self, scores: np.ndarray, selected: np.ndarray) -> None:
        """Compute the rest of the share, given scores (N,) by reused values and the rows (k,) selected. Collective."""
        access = self.run.access
        needs = [need for need in self.run.live_needs if need.of == "train"]
        asked = access.tally.computed + access.tally.reused
        self.updated[rest(self._refresh, self.updated == self.update, scores, selected)] = self.update
        with access.progress.showing(access.passes([need.spec for need in needs], self.run.rows)):
            for need, view in zip(needs, self._together(needs, None), strict=True):
                self._views[need.spec, None, None] = view
        access.tally.reused = asked - access.tally.computed  # each row counts once, as what it was in the end

    def get(
        self, spec: FeatureSpec, target: str | None = None, state: StateName = None, rows: np.ndarray | None = None
    ) -> View:
        """Give a selector a feature, computed now if it was not declared. Collective."""
        asked = (spec, target, state)
        if rows is None and asked in self._views:
            return self._views[asked]
        whole = self._rows(target)
        wanted = whole if rows is None else whole.take(rows)
        (store,) = self.run.access.ensure([spec], wanted, state, among=whole)
        view = self.run.access.view(spec, wanted, store, is_target=target is not None)
        if rows is None:
            self._views[asked] = view
        return view

    @property
    def views(self) -> Views:
        """All features that were asked for so far."""
        return self._views

    @property
    def of_training_rows(self) -> list[tuple[FeatureSpec, View]]:
        """The features of all training rows that were asked for so far, each with what it is."""
        return [(spec, view) for (spec, target, _), view in self._views.items() if target is None]

    def _rows(self, target: str | None) -> Rows:
        return self.run.rows if target is None else self.run.targets[target]

    def _together(self, needs: list[Need], name: str | None) -> list[View]:
        """Give several features of the same rows and state, computed in one pass."""
        access, state = self.run.access, needs[0].state
        rows = self._rows(name)
        if state is None and name is not None and self._refresh.policy == "static" and self.update > 0:
            access.progress.skip(access.passes([need.spec for need in needs], rows))
            return [access.view(need.spec, rows, self._earlier(0, need), self.update, is_target=True) for need in needs]
        if state is None and name is None and (self.updated != self.update).any():
            return self._joined(needs)
        stores = access.ensure([need.spec for need in needs], rows, state)
        is_target = name is not None
        return [access.view(n.spec, rows, store, is_target=is_target) for n, store in zip(needs, stores, strict=True)]

    def _joined(self, needs: list[Need]) -> list[View]:
        """Give several features of the training rows, each joined from several updates and moved to this one."""
        access, specs = self.run.access, [need.spec for need in needs]
        parts: list[list[tuple[np.ndarray, StoreView]]] = [[] for _ in needs]
        for update in np.unique(self.updated).tolist():
            at = np.flatnonzero(self.updated == update)
            some = self.run.rows.take(at)
            if update == self.update:
                stores = access.ensure(specs, some, among=self.run.rows)
            else:
                stores = [self._earlier(update, need) for need in needs]
                access.tally.reused += len(needs) * len(np.unique(some.keys))
                access.progress.skip(access.passes(specs, some))
            for part, spec, store in zip(parts, specs, stores, strict=True):
                part.append((at, access.view(spec, some, store, self.update - update)))
        if self._refresh.policy == "rotating":
            self._move(needs, parts)
        return [Mixed.of(part, len(self.run.rows)) for part in parts]

    def _move(self, needs: list[Need], parts: list[list[tuple[np.ndarray, StoreView]]]) -> None:
        """Move the vectors of earlier updates by what the anchors' have moved."""
        fixed = self.run.rows.take(anchors(self._refresh, len(self.run.rows)))
        for need, part in zip(needs, parts, strict=True):
            if not need.spec.has_vectors:
                continue
            values = [self.run.access.view(need.spec, fixed, view.store).dense() for _, view in part]
            part[:] = [
                (at, view if view.ages[0] == 0 else replace(view, shift=moved(values[-1], before)))
                for (at, view), before in zip(part, values, strict=True)
            ]

    def _earlier(self, update: int, need: Need) -> ParquetStore:
        """Open the store that an earlier update of this run used."""
        run = self.run
        round = run.updates[update]
        recipe = run.decided(round).info["recipes"][run.live_needs.index(need)]
        store = run.access.root.find(need.spec.kind, recipe)
        if store is None:
            raise CoverageError(
                f"the {need.spec.kind} store of round {round.number} is gone from {run.access.url}; start anew"
            )
        return store

    def _last_updated(self) -> np.ndarray | None:
        """Return the update of each row's last value, (N,); None where everything is computed anew."""
        run = self.run
        if self.update == 0 or self._refresh.policy == "full" or not run.live_needs:
            return None
        last = run.updates[self.update - 1]
        found = distributed.broadcast(run.journal.read_pool(last.number) if distributed.is_main() else None)
        if found is None:
            raise CoverageError(
                f"refresh policy {self._refresh.policy}: round {last.number} recorded no scores of the pool; the "
                "policy needs a selector that returns them (Selection.pool). Use dataflex.refresh.policy: full"
            )
        return found[1]


def round_seconds(seconds: float) -> float:
    """Round seconds for people."""
    return float(f"{seconds:.2f}")


def _order(run: Run, round: Round, rows: np.ndarray) -> np.ndarray:
    """Return the order in which chosen rows are trained on, as positions in `rows`, (k,)."""
    args = run.trainer.args
    if run.trainer.finetuning_args.disable_shuffling or args.train_sampling_strategy == "sequential":
        return np.arange(len(rows))
    order = generator(args.seed, "order", round.number).permutation(len(rows))
    if args.train_sampling_strategy == "group_by_length":
        from transformers.trainer_pt_utils import get_length_grouped_indices

        draw = torch.Generator().manual_seed(args.seed + round.number)
        lengths = run.rows.length[rows[order]].tolist()
        order = order[get_length_grouped_indices(lengths, run.trainer.global_batch, generator=draw)]
    return order


def _flat(rows: Any, name: str) -> np.ndarray:
    """Return row positions, (k,) int64, from a list, an array, or, of the classic interface, a list of one list.

    Raises:
        CoverageError: it is no list of whole numbers.
    """
    try:
        given = [i for part in rows for i in (part if isinstance(part, Sequence | np.ndarray) else [part])]
        found = np.asarray([int(i) for i in given], dtype=np.int64)
        if any(i != whole for i, whole in zip(given, found.tolist(), strict=True)):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise CoverageError(
            f"{name}: select returned {rows!r:.80}; expected positions of rows, a list or an array of whole numbers"
        ) from error
    return found
