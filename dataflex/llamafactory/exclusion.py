"""Removal of training rows that are target rows too, before anything sees them (`dataflex.exclude_targets`)."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from dataflex.errors import ConfigError
from dataflex.rows import RowSets

log = logging.getLogger(__name__)


def without_targets(sets: RowSets) -> RowSets:
    """Return the sets without the training rows that are identical to a target row.

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
