"""What rows of a round say, and the target rows nearest to them, kept beside the round for whoever looks later."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

import numpy as np

from dataflex import distributed
from dataflex.features.need import StateName, View
from dataflex.features.spec import EmbeddingSpec, FeatureSpec, GradientSpec
from dataflex.pipelines.run import Run
from dataflex.pipelines.selecting.pool import Pool
from dataflex.results import texts
from dataflex.trainers.rounds import DecidedRound

log = logging.getLogger(__name__)

_NEAREST = 3
_BLOCK = 512
Views = Mapping[tuple[FeatureSpec, str | None, StateName], View]
"""Features by what they are, of which target set (None: training rows), at which state."""


def keep(
    run: Run,
    decided: DecidedRound,
    pool: np.ndarray | None = None,
    views: Views | None = None,
    looked_at: Pool | None = None,
) -> None:
    """Write the texts of a round, on rank 0. A training does not end because it cannot be done.

    Args:
        run: the run.
        decided: the round.
        pool: (N,) the score of every training row, not finite where it cannot be chosen, or None.
        views: the features that it was decided by; None: what is near is not known.
        looked_at: the training rows that these are of; None: all.
    """
    most = run.settings.dataflex.keep_texts
    if not distributed.is_main() or not most:
        return
    path = run.journal.texts(decided.round.number)
    try:
        kept = texts.worth_keeping(most, run.rows.dataset, decided.rows, decided.scores, pool)
        near = None if views is None else nearest_targets(kept, views, looked_at)
        texts.write(path, run.rows, run.targets, kept, near)
    except (OSError, ValueError) as error:  # a disk that is full, a text that cannot be written (Arrow's are such too)
        log.warning("%s is not written, so `dataflex show` has no texts of this round: %s", path, error)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def nearest_targets(kept: np.ndarray, views: Views, looked_at: Pool | None = None) -> texts.Near | None:
    """Return the target rows whose feature has the largest cosine with that of some training rows.

    The feature is the one that training rows and targets were last asked for alike: of several checkpoints, the last.

    Args:
        kept: (k,) the training rows.
        views: features.
        looked_at: the training rows that these are of; None: all.

    Returns:
        What is nearest to those of them that have a direction, or None: the method compares rows with no target.
    """
    pair = _pair(views)
    if pair is None:
        return None
    of_rows, of_targets = pair
    if looked_at is not None:
        kept = kept[looked_at.place(kept) >= 0]
    asked = list(_units(of_rows.take(kept if looked_at is None else looked_at.place(kept))))
    if not asked:
        return None
    usable, queries = (np.concatenate(each) for each in zip(*asked, strict=True))
    cosine: np.ndarray = np.empty((len(usable), 0))
    at: np.ndarray = np.empty((len(usable), 0), np.int64)
    index: np.ndarray = np.empty((len(usable), 0), np.int64)
    for number, view in enumerate(of_targets.values()):
        for rows, units in _units(view):
            cosine = np.concatenate([cosine, queries @ units.T], axis=1)
            at = np.concatenate([at, np.full((len(usable), len(rows)), number)], axis=1)
            index = np.concatenate([index, np.broadcast_to(rows, (len(usable), len(rows)))], axis=1)
            best = np.lexsort((index, at, -cosine), axis=1)[:, :_NEAREST]
            cosine, at, index = (np.take_along_axis(each, best, axis=1) for each in (cosine, at, index))
    return texts.Near(kept[usable], list(of_targets), at, index, cosine) if cosine.size else None


def _pair(views: Views) -> tuple[View, dict[str, View]] | None:
    """Return a feature of training rows, and the one of every target set that can be compared with it."""
    for (spec, name, state), view in reversed(list(views.items())):
        if name is not None or (space := _space(spec)) is None:
            continue
        found = {t: v for (s, t, at), v in views.items() if t is not None and at == state and _space(s) == space}
        if found:
            return view, found
    return None


def _space(spec: FeatureSpec) -> object | None:
    """Return what two features must share for the angle between them to mean something; None of others.

    A gradient and Adam's step on it point into one space, and the gradient of a reward does too.
    """
    if isinstance(spec, EmbeddingSpec):
        return spec
    gradient = spec.gradient
    return gradient.projection if isinstance(gradient, GradientSpec) else None


def _units(view: View) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows and their directions, those of rows that have one."""
    for rows, vectors in view.blocks(_BLOCK):
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        has = np.isfinite(norms) & (norms > 0)
        yield rows[has], (vectors[has] / norms[has, None]).astype(np.float32)
