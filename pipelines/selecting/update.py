"""One update: its features are brought about, the selector chooses, the choice becomes a round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dataflex import distributed
from dataflex.config.keys import Refresh
from dataflex.draws import generator, stream
from dataflex.errors import CoverageError
from dataflex.pipelines.run import Run
from dataflex.pipelines.selecting.diagnostics import Diagnostics, behind_prefilter, diagnose, gradient_norms
from dataflex.pipelines.selecting.features import UpdateFeatures
from dataflex.pipelines.selecting.kept_texts import Views, keep
from dataflex.pipelines.selecting.pool import Pool
from dataflex.pipelines.selecting.prefilter import candidates
from dataflex.rows import Status
from dataflex.schedule import Round
from dataflex.selectors.base import BASE, Context, NativeSelector, Selection
from dataflex.trainers.rounds import DecidedRound


def decide(run: Run, round: Round) -> DecidedRound:
    """Choose the rows of a round. Collective."""
    begun, tally = time.monotonic(), run.access.tally
    before = tally.computed, tally.reused, tally.seconds
    wanted = round.steps * run.trainer.global_batch
    # update_step 0: one selection holds for the rest of the epoch, so it is passed over as often as needed.
    chosen = choose(run, round, wanted, is_at_most=run.settings.schedule.update_step == 0)
    selection, count = chosen.selection, len(chosen.selection.rows)
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
    keep(run, decided, selection.pool, chosen.views, chosen.pool)
    return decided


@dataclass(frozen=True)
class Chosen:
    """What an update came to.

    Attributes:
        selection: the rows.
        updated: (N,) int32, the update at which the features of each training row were computed, -1 of a row that was
            not looked at.
        diagnostics: what the update looks like as a whole.
        views: the features that were asked for, of the rows that were looked at.
        pool: these rows.
        norms: (N,) the norm of every training row's gradient, NaN where the update had none.
        nonfinite: training rows of which a feature was NaN or infinite.
    """

    selection: Selection
    updated: np.ndarray
    diagnostics: Diagnostics
    views: Views
    pool: Pool
    norms: np.ndarray
    nonfinite: int


def choose(run: Run, round: Round, count: int, is_at_most: bool = False) -> Chosen:
    """Let the selector choose rows, the same on every rank. Collective.

    Args:
        run: the run.
        round: to be filled.
        count: rows wanted.
        is_at_most: whether it may be fewer, where there are not so many.
    """
    pool = looked_at(run, round)
    count = min(count, int((pool.rows.supervised > 0).sum())) if is_at_most else count
    features = UpdateFeatures(run, round, pool, run.needs, run.settings.dataflex.refresh)
    name = run.settings.component_name or ""
    selection = _ask(run, run.selector, name, count, features)
    if features.waiting and selection.pool is not None:
        features.refresh(selection.pool, selection.rows)
        selection = _ask(run, run.selector, name, count, features)
    run.check(selection.rows, count, pool.rows)
    earlier = [r for r in run.updates if r.number < round.number]
    last = pool.place(run.decided(earlier[-1]).rows) if earlier else None
    norms = gradient_norms(features.of_training_rows, len(pool.rows))
    found = diagnose(pool.rows, selection, features.of_training_rows, last, norms)
    if pool.picked is not None:
        found = behind_prefilter(found, pool.picked, selection.rows)
    is_lost = np.zeros(len(pool.rows), bool)
    for _, view in features.of_training_rows:
        is_lost |= np.asarray(view.status) == Status.NONFINITE
    updated, norms = pool.whole(features.updated, -1), pool.whole(norms, np.nan)
    return Chosen(pool.of_all(selection), updated, found, features.views, pool, norms, int(is_lost.sum()))


def looked_at(run: Run, round: Round) -> Pool:
    """Return the training rows that the selector looks at: all, or what the prefilter lets through. Collective.

    Raises:
        CoverageError: the prefilter gave no scores, or no row has a finite one.
    """
    options, selector, whole = run.settings.dataflex.prefilter, run.prefilter, Pool.of(run.rows)
    if options is None or selector is None:
        return whole
    update, needs = run.update_number(round), selector.needs()
    # What looks at the base model alone ranks rows alike at every update; as at the first, even if it looks at more.
    is_fixed = all(need.state is not None for need in needs)
    features = UpdateFeatures(run, run.updates[0] if is_fixed else round, whole, needs, Refresh())
    try:
        found = _ask(run, selector, options.method, 1, features, ())
    except CoverageError as error:
        raise CoverageError(f"dataflex.prefilter.method: {options.method}: {error}") from error
    if found.pool is None:
        raise CoverageError(
            f"dataflex.prefilter.method: {options.method} returned no scores of the training rows (Selection.pool), by "
            "which the best are kept"
        )
    drawn = 0 if run.settings.dataflex.refresh.policy == "static" else update  # whose features are the first update's
    rng = generator(run.trainer.args.seed, "tail", drawn)
    able = run.rows.supervised > 0
    scores = np.asarray(found.pool, dtype=np.float64)
    picked = candidates(scores, run.rows.keys, able, options.keep, options.tail, rng)
    if not len(picked.rows):
        raise CoverageError(
            f"dataflex.prefilter.method: {options.method} gave none of {len(run.rows)} rows a finite score, so none "
            f"goes on to {run.settings.component_name}; take other params, or another method"
        )
    return Pool.of(run.rows, picked)


def _ask(
    run: Run,
    selector: NativeSelector,
    name: str,
    count: int,
    features: UpdateFeatures,
    history: Sequence[np.ndarray] | None = None,
) -> Selection:
    """Return a selector's answer, the same on every rank. Collective."""
    trainer, round, pool = run.trainer, features.round, features.pool
    if history is None:
        places = [pool.place(run.decided(r).rows) for r in run.updates if r.number < round.number]
        history = [rows[rows >= 0] for rows in places]
    updates = sum(r.epoch == round.epoch for r in run.updates)
    context = Context(pool.rows, run.targets, features.get, round, features.update, updates, history, trainer.args.seed)
    # It may ask for features and score its share of the rows, so it is called everywhere; rank 0's answer counts.
    found = selector.select(
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
    if selector.leaves_gradients:
        trainer.model.zero_grad()
    with distributed.together():
        answer = found if isinstance(found, Selection) else Selection(_flat(found, name))
    return distributed.broadcast(answer)


def ensure_base(run: Run) -> None:
    """Bring about the declared features of the base model. Collective."""
    for of, sets in (("train", [run.rows]), ("targets", list(run.targets.values()))):
        specs = list(dict.fromkeys(need.spec for need in run.declared if (need.of, need.state) == (of, BASE)))
        for rows in sets if specs else []:
            run.access.ensure(specs, rows, BASE)


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
