"""Similarities to target sets are those of loops in float64, and a composition refuses what it cannot use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dataflex.errors import ConfigError, CoverageError
from dataflex.rows import Status
from dataflex.selectors.composed import Composed, Composition
from dataflex.selectors.parts.similarity import WHITENED_MOST, set_scores
from tests.held import Held, context, pool

RNG = np.random.default_rng(0)
TRAIN = RNG.standard_normal((13, 5)).astype(np.float32)
SETS = {"a": RNG.standard_normal((4, 5)).astype(np.float32), "b": RNG.standard_normal((1, 5)).astype(np.float32)}


def one(x: np.ndarray, t: np.ndarray, similarity: str) -> float:
    if similarity == "l2":
        return -sum((float(a) - float(b)) ** 2 for a, b in zip(x, t, strict=True))
    product = sum(float(a) * float(b) for a, b in zip(x, t, strict=True))
    if similarity == "inner_product":
        return product
    return product / float(np.sqrt(sum(float(a) ** 2 for a in x)) * np.sqrt(sum(float(b) ** 2 for b in t)))


@pytest.mark.parametrize("similarity", ["cosine", "inner_product", "l2"])
@pytest.mark.parametrize("within", ["mean", "max"])
def test_every_similarity_and_aggregation(similarity: Any, within: Any) -> None:
    found = set_scores(Held(TRAIN), {k: Held(v) for k, v in SETS.items()}, similarity, within)
    reduce = np.mean if within == "mean" else np.max
    expected = [[reduce([one(x, t, similarity) for t in targets]) for targets in SETS.values()] for x in TRAIN]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_whitened_vectors_have_no_correlation_left() -> None:
    """A linear map of all vectors changes nothing once they are whitened."""
    big = RNG.standard_normal((60, 5)).astype(np.float32)
    skewed = RNG.standard_normal((5, 5)).astype(np.float32)
    plain = set_scores(Held(big), {k: Held(v) for k, v in SETS.items()}, "whitened_cosine", "mean", 1e-5)
    mapped = set_scores(
        Held(big @ skewed + 3), {k: Held(v @ skewed + 3) for k, v in SETS.items()}, "whitened_cosine", "mean", 1e-5
    )
    np.testing.assert_allclose(mapped, plain, atol=2e-3)  # the ridge is small but there
    np.testing.assert_allclose(plain[:, 0], whitened(big, SETS["a"], 0), atol=1e-4)


def whitened(rows: np.ndarray, targets: np.ndarray, ridge: float) -> list[float]:
    """Mean whitened cosine of each row, by the eigenvectors of the rows' covariance."""
    values, vectors = np.linalg.eigh(np.cov(rows.astype(np.float64).T, bias=True))
    values += ridge * values.mean()
    rows, targets = ((x - rows.mean(axis=0, dtype=np.float64)) @ vectors / np.sqrt(values) for x in (rows, targets))
    return [float(np.mean([one(x, t, "cosine") for t in targets])) for x in rows]


def test_the_covariance_is_that_of_usable_training_rows_alone() -> None:
    big = RNG.standard_normal((60, 5)).astype(np.float32)
    far = SETS["a"] + 100
    broken = np.concatenate([big, np.zeros((1, 5), np.float32), np.full((1, 5), np.nan, np.float32)])
    found = set_scores(Held(broken), {"far": Held(far)}, "whitened_cosine", "mean", 0.5)[:, 0]
    np.testing.assert_allclose(found[:60], whitened(big, far, 0.5), rtol=1e-6, atol=1e-9)
    assert not np.isfinite(found[60:]).any()


def test_the_default_ridge_finds_clusters() -> None:
    """Fewer rows than would fill the covariance: whitened to the last direction, noise counts as much as clusters."""
    rng = np.random.default_rng(5)
    centres, labels = rng.standard_normal((8, 256)), np.arange(400) % 8
    rows = Held((centres[labels] + rng.standard_normal((400, 256))).astype(np.float32))

    def precision(similarity: Any, **ridge: float) -> float:
        right = []
        for cluster in range(8):
            targets = (centres[cluster] + rng.standard_normal((10, 256))).astype(np.float32)
            scores = set_scores(rows, {"t": Held(targets)}, similarity, "mean", **ridge)[:, 0]
            right.append((labels[np.argsort(-scores)[:50]] == cluster).mean())
        return float(np.mean(right))

    assert precision("cosine") > 0.99
    assert precision("whitened_cosine") > 0.9
    assert precision("whitened_cosine", ridge=1e-5) < 0.4


def test_whitening_is_refused_where_the_covariance_would_be_too_large() -> None:
    wide = Held(np.ones((2, WHITENED_MOST + 1)))
    with pytest.raises(ConfigError, match="whitened_cosine with 4097 numbers"):
        set_scores(wide, {"a": wide}, "whitened_cosine", "mean")


@pytest.mark.parametrize("similarity", ["cosine", "inner_product", "l2", "whitened_cosine"])
def test_rows_that_cannot_be_compared_never_win(similarity: Any) -> None:
    vectors = TRAIN.copy()
    vectors[2], vectors[3, 1] = 0, np.inf
    status = np.zeros(13, np.uint8)
    status[4] = Status.NONFINITE
    scores = set_scores(Held(vectors, status), {"a": Held(SETS["a"])}, similarity, "mean")[:, 0]
    assert set(np.flatnonzero(~np.isfinite(scores)).tolist()) == {2, 3, 4}


def test_targets_without_a_direction_are_left_out() -> None:
    with_zero = np.concatenate([SETS["a"], np.zeros((1, 5), np.float32)])
    plain = set_scores(Held(TRAIN), {"a": Held(SETS["a"])}, "cosine", "mean")
    np.testing.assert_array_equal(set_scores(Held(TRAIN), {"a": Held(with_zero)}, "cosine", "mean"), plain)
    with pytest.raises(CoverageError, match="target set a: found no usable row"):
        set_scores(Held(TRAIN), {"a": Held(np.zeros((2, 5)))}, "cosine", "mean")


@pytest.mark.parametrize("across", ["max", "mean"])
@pytest.mark.parametrize("within", ["max", "mean"])
def test_sets_are_joined_after_their_rows(across: str, within: str) -> None:
    """Four target rows in two sets: mean of all, maximum of all and maximum of means choose different rows."""
    similar = np.array([[0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]], np.float32)
    train, eye = np.concatenate([similar, np.sqrt(1 - (similar**2).sum(axis=1, keepdims=True))], axis=1), np.eye(5)
    sets = {"x": Held(eye[:2]), "y": Held(eye[2:4])}
    parts = {"representation": {"kind": "embedding"}, "within": within, "across": across}
    composed = Composed(Composition.model_validate(parts))
    held = Held(train)
    rows = composed.select(
        None, 0, 1, context=context(pool(3), ["x", "y"], lambda spec, target, state: sets[target] if target else held)
    ).rows
    expected = {("max", "max"): 0, ("mean", "max"): 1, ("mean", "mean"): 2, ("max", "mean"): 0}[within, across]
    assert rows.tolist() == [expected]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"representation": {"kind": "loss"}, "rule": {"kind": "round_robin"}}, "a rule other than round_robin"),
        ({"representation": {"kind": "loss"}, "within": "max"}, "no within with loss"),
        ({"ridge": 0.5}, "no ridge: it acts with similarity: whitened_cosine alone"),
        ({"rule": {"kind": "round_robin", "repeat": True}}, "no repeat with over: sets"),
        ({"similarity": "whitened_cosine", "rule": {"kind": "knn_kde"}}, "a similarity other than whitened_cosine"),
        (
            {
                "representation": {"kind": "gradient", "checkpoints": ["a", "b"]},
                "rule": {"kind": "round_robin", "over": "rows"},
            },
            "one checkpoint with the rule round_robin",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Composition.model_validate(parts)
