"""NEAR, RDS+, TSDS, Cluster-LESS and Influence Distillation choose what plain computations over held vectors choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.errors import CoverageError, MismatchError
from dataflex.features.spec import EmbeddingSpec, FeatureSpec, GradientSpec
from dataflex.rows import Status
from dataflex.selectors.cluster_less import ClusterLess
from dataflex.selectors.embedding import Embedding, RdsPlus
from dataflex.selectors.less import Less
from dataflex.selectors.near import Near
from dataflex.selectors.parts.clustering import chosen, clusters
from dataflex.selectors.parts.regression import kernel_ridge
from dataflex.selectors.propagated import InfluenceDistillation
from dataflex.selectors.tsds import Tsds
from tests.held import Held, context, pool

RNG = np.random.default_rng(2)
EMBEDDED, GRADIENTS = RNG.standard_normal((30, 6)), RNG.standard_normal((30, 8))
TARGETS = {"x": (RNG.standard_normal((3, 6)), RNG.standard_normal((3, 8))), "y": (EMBEDDED[:1], GRADIENTS[:1])}


def select(selector: Any, k: int, status: np.ndarray | None = None, size: int = 30, **more: Any) -> Any:
    asked: list[tuple[str, str | None]] = []

    def features(spec: FeatureSpec, target: str | None, state: str | None) -> Held:
        which = 0 if isinstance(spec, EmbeddingSpec) else 1
        asked.append((spec.kind, target))
        vectors = TARGETS[target][which] if target else (EMBEDDED, GRADIENTS)[which][:size]
        return Held(vectors, status if target is None else None)

    supervised = None if status is None else (status == Status.OK).astype(np.int32)
    return selector.select(None, 0, k, context=context(pool(size, supervised), list(TARGETS), features, **more))


def near(**params: Any) -> Near:
    return Near(Near.Params.model_validate(params))


def walk() -> list[int]:
    """All rows in the order of NEAR: every target row's nearest first, by brute force."""
    queries = np.concatenate([vectors for vectors, _ in TARGETS.values()])
    cosines = queries @ EMBEDDED.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(EMBEDDED, axis=1)
    order = np.argsort(-cosines, axis=1)
    return list(dict.fromkeys(order.T.ravel().tolist()))


def test_near_walks_and_goes_on() -> None:
    expected = walk()
    assert select(near(), 7).rows.tolist() == expected[:7]
    history = [np.array(expected[:7])]
    assert select(near(), 7, update=1, history=history).rows.tolist() == expected[7:14]
    assert select(near(repeat=True), 7, update=1, history=history).rows.tolist() == expected[:7]
    rest = [row for row in expected if row >= 28]
    again = [row for row in expected if row not in rest]
    assert select(near(), 7, history=[np.arange(28)]).rows.tolist() == [*rest, *again[:5]]
    assert select(RdsPlus(RdsPlus.Params()), 7).rows.tolist() == expected[:7]


def test_near_with_one_target_is_plain_top_k() -> None:
    both = dict(TARGETS)
    try:
        del TARGETS["x"]
        nearest = select(near(), 9).rows.tolist()
        assert nearest == select(Embedding(Embedding.Params()), 9).rows.tolist()
        assert nearest[0] == 0  # the target row is row 0 of the pool
    finally:
        TARGETS.update(both)


def test_near_leaves_unusable_rows_out_and_refuses_too_many() -> None:
    status = np.zeros(30, np.uint8)
    status[walk()[:4]] = Status.NO_LABELS
    assert select(near(), 5, status).rows.tolist() == [row for row in walk() if status[row] == 0][:5]
    with pytest.raises(CoverageError, match="27 rows wanted at one update, found 26"):
        select(near(), 27, status)


def test_near_takes_precomputed_neighbours(tmp_path: Path) -> None:
    path = str(tmp_path / "top_indices.npy")
    np.save(path, np.array([[4, 2, 9], [4, 7, 2]]))
    assert near(indices_path=path).needs() == []
    assert select(near(indices_path=path), 4).rows.tolist() == [4, 2, 7, 9]
    with pytest.raises(CoverageError, match="5 rows wanted at one update, found 4"):
        select(near(indices_path=path), 5)
    status = np.zeros(30, np.uint8)
    status[[4, 2]] = Status.NO_LABELS  # not in the file's own words
    assert select(near(indices_path=path), 2, status).rows.tolist() == [7, 9]
    np.save(path, np.array([[4, 30]]))
    with pytest.raises(MismatchError, match="found positions 4 to 30; the training set has rows 0 to 29"):
        select(near(indices_path=path), 1)
    np.save(path, np.array([[0.5]]))
    with pytest.raises(MismatchError, match="expected whole numbers"):
        select(near(indices_path=path), 1)


def test_tsds_draws_near_the_targets_only() -> None:
    """With alpha 1 all mass is on each target row's nearest."""
    tsds = Tsds(Tsds.Params.model_validate({"alpha": 1.0, "max_K": 3, "density": "uniform"}))
    assert sorted(select(tsds, 4).rows.tolist()) == sorted(set(walk()[:4]))
    wide = Tsds(Tsds.Params.model_validate({"alpha": 0.0, "max_K": 3}))
    first = select(wide, 3).rows.tolist()
    assert first == select(wide, 3).rows.tolist()
    assert any(select(wide, 3, update=u).rows.tolist() != first for u in range(1, 5))
    with pytest.raises(CoverageError, match=r"found .* that can be drawn"):
        select(wide, 29)


def test_tsds_takes_precomputed_probabilities(tmp_path: Path) -> None:
    path = str(tmp_path / "tsds_probs.npy")
    p = np.zeros(30)
    p[[3, 8, 11]] = 0.2, 0.3, 0.5
    np.save(path, p)
    tsds = Tsds(Tsds.Params.model_validate({"probs_path": path}))
    assert tsds.needs() == []
    assert sorted(select(tsds, 3).rows.tolist()) == [3, 8, 11]
    with pytest.raises(CoverageError, match="4 rows wanted"):
        select(tsds, 4)
    np.save(path, p[:5])
    with pytest.raises(MismatchError, match="expected 30 finite numbers"):
        select(tsds, 1)
    np.save(path, np.array([object()]), allow_pickle=True)
    with pytest.raises(MismatchError, match="no NumPy array"):
        select(tsds, 1)


@pytest.mark.parametrize("aggregation", ["max", "mean", "round_robin"])
def test_clusters_of_one_row_are_less(aggregation: str) -> None:
    one = {"cluster_size": 1, "samples_per_cluster": 1, "aggregation": aggregation}
    less = select(Less(Less.Params.model_validate({"aggregation": aggregation})), 6)
    found = select(ClusterLess(ClusterLess.Params.model_validate(one)), 6)
    assert found.rows.tolist() == less.rows.tolist()
    np.testing.assert_allclose(found.pool, less.pool)


def test_a_whole_cluster_scores_the_cosine_of_its_mean_direction() -> None:
    params = ClusterLess.Params.model_validate({"num_clusters": 4, "samples_per_cluster": 30, "seed": 1})
    found = select(ClusterLess(params), 30)
    scores = np.unique(found.pool)  # rows of a cluster have its score
    assert len(scores) == 4
    units = GRADIENTS / np.linalg.norm(GRADIENTS, axis=1, keepdims=True)
    for score in scores:
        rows = found.pool == score
        mean = units[rows].mean(axis=0)
        best = -np.inf
        for _, target in TARGETS.values():
            cosines = [mean @ t / np.linalg.norm(mean) / np.linalg.norm(t) for t in target]
            best = max(best, float(np.mean(cosines)))
        assert score == pytest.approx(best, rel=1e-5)
    # Within a cluster, the best representative comes first.
    first = np.flatnonzero(found.pool == found.pool[found.rows[0]])
    per_row = np.max(
        [np.mean([units @ t / np.linalg.norm(t) for t in target], axis=0) for _, target in TARGETS.values()], 0
    )
    assert found.rows[0] == first[np.argmax(per_row[first])]


def test_unusable_rows_are_in_no_cluster() -> None:
    status = np.zeros(30, np.uint8)
    status[[0, 5]] = Status.NO_LABELS
    for carry in ("inherit", "regress"):
        params = {"cluster_size": 4, "samples_per_cluster": 2, "carry_over": carry}
        rows = select(ClusterLess(ClusterLess.Params.model_validate(params)), 28, status).rows
        assert sorted(rows.tolist()) == [i for i in range(30) if i not in (0, 5)]


@pytest.mark.parametrize(("strategy", "expected"), [("nearest", [4, 2]), ("farthest", [9, 1]), ("mixed", [4, 9])])
def test_representatives_by_distance(strategy: Any, expected: list[int]) -> None:
    """Their centroid is 2.4; by distance: 4, 2, 1, 9."""
    members, vectors = np.array([1, 2, 4, 9]), np.array([[0.0], [1.5], [2.5], [5.6]])
    rng = np.random.default_rng(0)
    far = ((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1)
    assert chosen(members, far, 2, strategy, rng).tolist() == expected
    drawn = [tuple(chosen(members, None, 2, "random", rng)) for _ in range(20)]
    assert len(set(drawn)) > 1


def test_a_walk_over_live_vectors_repeats_no_row_before_all_were_chosen() -> None:
    """The order changes between updates; what was chosen in this pass is passed over."""
    first = select(near(), 20).rows
    keys = list(TARGETS)
    kept = dict(TARGETS)
    try:
        TARGETS[keys[0]] = (-kept[keys[0]][0], kept[keys[0]][1])  # the targets' vectors moved
        second = select(near(), 10, update=1, history=[first]).rows
    finally:
        TARGETS.update(kept)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(30))


@pytest.mark.parametrize("method", ["kmeans", "spherical_kmeans", "farthest_first"])
def test_clusters_find_well_separated_groups(method: Any) -> None:
    centres = np.eye(4)
    truth = RNG.integers(0, 4, 200)
    vectors = (centres[truth] + 0.05 * RNG.standard_normal((200, 4))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    best = max(
        (clusters(vectors, 4, method, 20, seed) for seed in range(5)), key=lambda ids: len(np.unique(ids))
    )  # k-means may fall into a poor optimum from one seed
    assert all(len(np.unique(truth[best == c])) == 1 for c in range(4))
    again = clusters(vectors, 4, method, 20, 0)
    assert (again == clusters(vectors, 4, method, 20, 0)).all()


def test_all_rows_as_landmarks_give_nearly_their_own_scores() -> None:
    params = {"landmarks": 30, "damping": 1e-9, "adam_variant": "pytorch"}
    found = select(InfluenceDistillation(InfluenceDistillation.Params.model_validate(params)), 6)
    less = select(Less(Less.Params.model_validate({"aggregation": "round_robin"})), 6)
    assert found.rows.tolist() == less.rows.tolist()


def test_kernel_ridge_equals_its_closed_form() -> None:
    known, values, new = RNG.standard_normal((7, 3)), RNG.standard_normal((7, 2)), RNG.standard_normal((4, 3))
    distances = [np.linalg.norm(known[i] - known[j]) for i in range(7) for j in range(i + 1, 7)]
    width = np.median(distances)
    kernel = [[np.exp(-(np.linalg.norm(a - b) ** 2) / (2 * width**2)) for b in known] for a in known]
    weights = np.linalg.inv(np.array(kernel) + 0.1 * np.eye(7)) @ (values - values.mean(axis=0))
    across = np.array([[np.exp(-(np.linalg.norm(a - b) ** 2) / (2 * width**2)) for b in known] for a in new])
    np.testing.assert_allclose(kernel_ridge(known, values, 0.1)(new), across @ weights + values.mean(axis=0))


def test_landmarks_alone_have_gradients_computed() -> None:
    taken: list[int] = []
    params = InfluenceDistillation.Params.model_validate({"landmarks": 5})

    def features(spec: FeatureSpec, target: str | None, state: str | None) -> Held:
        which = 0 if isinstance(spec, EmbeddingSpec) else 1
        held = Held(TARGETS[target][which] if target else (EMBEDDED, GRADIENTS)[which])
        if isinstance(spec, GradientSpec) and target is None:
            kept = held.take
            held.take = lambda rows: taken.extend(rows.tolist()) or kept(rows)  # type: ignore[method-assign, func-returns-value]
        return held

    for update in range(2):
        selector = InfluenceDistillation(params)
        selector.select(None, 0, 4, context=context(pool(30), list(TARGETS), features, update=update))
    assert len(set(taken[:5])) == 5
    assert taken[:5] == taken[5:]
