"""What a run will ask of the stores, in order; it follows from what its methods declare and from the schedule."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dataflex.features.need import Need, StateName
from dataflex.features.spec import BASE, FeatureSpec
from dataflex.pipelines.run import Run
from dataflex.pipelines.selecting.prefilter import counts
from dataflex.pipelines.selecting.refresh import share_of


@dataclass(frozen=True)
class Ask:
    """Features of the same rows and state, which are brought about together.

    Attributes:
        specs: the features.
        target: the target set whose rows they are of; None: the training rows.
        state: of the model; None is the live one.
        step: optimizer steps behind which the live model is then.
        update: number of the update, from 0; None: before the first step.
        fresh: which rows are of the live model of now: all; some, `count` of them; none, the rest being reused.
        count: see `fresh`.
        kept: distinct rows that the prefilter lets through, of which the features are; None: all.
    """

    specs: tuple[FeatureSpec, ...]
    target: str | None
    state: StateName
    step: int = 0
    update: int | None = None
    fresh: Literal["all", "some", "none"] = "all"
    count: int = 0
    kept: int | None = None


def of_train(run: Run, skipped: Collection[int] = ()) -> list[Ask]:
    """Return what `dataflex train` asks.

    Args:
        run: the run.
        skipped: numbers of rounds that are not decided any more.
    """
    if run.settings.train_type != "dynamic_select":
        return [Ask((need.spec,), None, need.state) for need in run.needs]
    found = [] if run.state.has_adapter else _of_base(run)
    for number, round in enumerate(run.updates):
        if round.number not in skipped:
            asked = [Ask(*about, round.first_step, number) for about in _together(run, _before(run))]
            for about in _together(run, run.needs):
                asked += _at_update(run, Ask(*about, round.first_step, number))
            found += asked
    return found


def of_featurize(run: Run) -> list[Ask]:
    """Return what `dataflex featurize` asks: the first update's features, and those that the run file names besides."""
    states: list[StateName] = list(dict.fromkeys(need.state for need in run.declared))
    if all(state == BASE for state in states):
        states.append(None)
    first = run.rounds[0] if run.rounds else None
    step = first.steps if run.is_live and first is not None and first.kind == "warmup" else 0
    number = 0 if run.settings.train_type == "dynamic_select" else None
    found = [] if run.state.has_adapter else _of_base(run)
    found += [Ask(*about, step, number) for about in _together(run, _before(run))]
    kept = None if run.prefilter is None else sum(kept_rows(run))
    for state in states:
        more = () if state == BASE else run.settings.dataflex.features
        for of in ("train", "targets"):
            needed = [need.spec for need in run.needs if need.state == state and need.of == of]
            some = kept is not None and of == "train"
            if some and needed:
                found.append(Ask(tuple(needed), None, state, step, number, kept=kept))
            specs = tuple(dict.fromkeys([*(() if some else needed), *more]))
            found += [Ask(specs, target, state, step, number) for target in _sets(run, of) if specs]
    return found


def kept_rows(run: Run) -> tuple[int, int]:
    """Return how many distinct rows a prefilter keeps, and how many are drawn from the others."""
    options = run.settings.dataflex.prefilter
    assert options is not None
    return counts(options.keep, options.tail, len(np.unique(run.rows.keys[run.eligible])))


def _of_base(run: Run) -> list[Ask]:
    """Return what is asked before the first step: features of a base that is at hand only then."""
    found = []
    for of in ("train", "targets"):
        specs = tuple(dict.fromkeys(need.spec for need in run.declared if (need.of, need.state) == (of, BASE)))
        found += [Ask(specs, target, BASE) for target in _sets(run, of) if specs]
    return found


def _at_update(run: Run, ask: Ask) -> list[Ask]:
    """Return what becomes of an ask under the run's refresh policy."""
    refresh = run.settings.dataflex.refresh
    head, tail = (len(run.rows), 0) if run.prefilter is None else kept_rows(run)
    if run.prefilter is not None and ask.target is None:
        ask = replace(ask, kept=head + tail)
    if ask.state is not None or not ask.update or refresh.policy == "full":
        return [ask]
    if refresh.policy == "rotating":
        return [ask if ask.target is not None else replace(ask, fresh="some", count=share_of(refresh, head) + tail)]
    return [replace(ask, fresh="none")] if ask.target is None else []  # of the targets the first update's are read


def _before(run: Run) -> Sequence[Need]:
    """Return what the prefilter declares."""
    return () if run.prefilter is None else run.prefilter.needs()


def _together(run: Run, needs: Sequence[Need]) -> list[tuple[tuple[FeatureSpec, ...], str | None, StateName]]:
    """Return features, the set whose rows they are of, and the state: those that are brought about together."""
    found: list[tuple[tuple[FeatureSpec, ...], str | None, StateName]] = []
    for of, state in dict.fromkeys((need.of, need.state) for need in needs):
        specs = tuple(need.spec for need in needs if (need.of, need.state) == (of, state))
        found += [(specs, target, state) for target in _sets(run, of)]
    return found


def _sets(run: Run, of: str) -> Sequence[str | None]:
    return [None] if of == "train" else list(run.targets)
