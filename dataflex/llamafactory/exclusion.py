"""Rows that may not stand in two sets at once, and target rows that are drawn from their set."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dataflex.draws import generator
from dataflex.errors import ConfigError
from dataflex.rows import Rows, RowSets

log = logging.getLogger(__name__)


def without_targets(sets: RowSets) -> RowSets:
    """Return the sets without the training rows that are identical to a target row (`dataflex.exclude_targets`).

    The training set itself is shorter then, so neither a method nor LLaMA-Factory's own order can come upon them, and
    every identity that is made of its rows follows.

    Raises:
        ConfigError: no training row is left.
    """
    shared = np.zeros(len(sets.train), bool)
    for target in sets.targets.values():
        shared |= np.isin(sets.train.keys, target.keys)
    if shared.all():
        raise ConfigError(
            f"dataflex.exclude_targets: all {len(shared)} training rows are identical to target rows; expected others. "
            "Name other datasets, or leave the key out"
        )
    kept = np.flatnonzero(~shared)
    log.info("%d training rows are identical to target rows and left out (exclude_targets)", int(shared.sum()))
    if len(kept) == len(shared):
        return sets
    module = {**sets.module, "train_dataset": sets.module["train_dataset"].select(kept)}
    return replace(sets, module=module, train=sets.train.take(kept))


def with_tests(sets: RowSets, tests: Mapping[str, Rows]) -> RowSets:
    """Return the sets with those that the run is measured on.

    Raises:
        ConfigError: a row of them is a training row or a target row too, so that the result would say nothing about
            rows that the run has not seen; or one has no row with a supervised token.
    """
    seen = {"the training set": sets.train, **{f"the target set {name}": rows for name, rows in sets.targets.items()}}
    for name, rows in tests.items():
        if not (rows.supervised > 0).any():
            raise ConfigError(
                f"dataflex.test_dataset: found no row with a supervised token in {name}; check its answers, the "
                "template and cutoff_len"
            )
        for what, others in seen.items():
            if len(shared := np.flatnonzero(np.isin(rows.keys, others.keys))):
                raise ConfigError(
                    f"dataflex.test_dataset: found {len(shared)} of the {len(rows)} rows of {name} in {what} as well, "
                    f"the first of them record {rows.index[shared[0]]}; expected none, as a model may know by heart "
                    "what it has seen. Take them out of one of the two"
                )
    return replace(sets, tests=dict(tests))


def drawn_targets(sets: RowSets, count: int, seed: int) -> RowSets:
    """Return the sets with `count` rows of each target set, in their order, whatever the seed of the training.

    Raises:
        ConfigError: a target set has fewer.
    """
    drawn = {}
    for name, rows in sets.targets.items():
        if len(rows) < count:
            raise ConfigError(f"dataflex.target_rows: found {count}; expected at most {len(rows)}, the rows of {name}")
        order = generator(seed, "targets", name).permutation(len(rows))
        drawn[name] = rows.take(np.sort(order[:count]))
    return replace(sets, targets=drawn)
