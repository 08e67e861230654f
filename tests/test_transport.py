"""KNN-Uniform and KNN-KDE are what a linear program and plain loops give, and stay sane whatever the numbers."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from dataflex.errors import ConfigError, CoverageError, MismatchError
from dataflex.selectors.parts.transport import clipped, kde_plan, kernel_density, knn_kde, knn_uniform, uniform_plan


def drawn(seed: int, queries: int, size: int, most: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points at random: neighbours (M, L), their distances, and a density (N,) at random for each candidate."""
    rng = np.random.default_rng(seed)
    points, targets = rng.standard_normal((size, 2)), rng.standard_normal((queries, 2))
    distances = np.linalg.norm(targets[:, None] - points[None], axis=2)
    neighbours = np.argsort(distances, axis=1, kind="stable")[:, :most]
    return neighbours, np.take_along_axis(distances, neighbours, axis=1), 1 + 3 * rng.random(size)


def objective(weights: np.ndarray, d: np.ndarray, density: np.ndarray, alpha: float, scale: float) -> float:
    """What the paper minimises; all (M, N) in the order of the candidates."""
    reference = (1 / density) / (len(d) * (1 / density).sum())
    return alpha / scale * float((weights * d).sum()) + (1 - alpha) * len(d) * float(
        (density * np.abs(weights - reference)).max()
    )


def best_objective(d: np.ndarray, density: np.ndarray, alpha: float, scale: float) -> float:
    """The smallest value, by a linear program over the plan and the largest deviation."""
    queries, size = d.shape
    reference = np.tile((1 / density) / (queries * (1 / density).sum()), queries)
    weight = np.tile(density, queries)
    costs = np.append(alpha / scale * d.ravel(), (1 - alpha) * queries)
    deviation = -np.ones((queries * size, 1))
    upper = np.block([[np.diag(weight), deviation], [-np.diag(weight), deviation]])
    limits = np.concatenate([weight * reference, -weight * reference])
    rows = np.hstack([np.kron(np.eye(queries), np.ones(size)), np.zeros((queries, 1))])
    found = linprog(costs, upper, limits, rows, np.full(queries, 1 / queries), method="highs")
    assert found.status == 0
    return float(found.fun)


def by_candidate(values: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    out = np.zeros_like(values)
    np.put_along_axis(out, neighbours, values, axis=1)
    return out


@pytest.mark.parametrize("kernel", ["uniform", "kde"])
def test_plans_are_optimal_where_the_paper_is_exact_and_never_better(kernel: str) -> None:
    """Beyond s = sum(1 / r) / 2 a plan may miss the optimum, as deviations below the reference then count too."""
    exact, beyond, missed = 0, 0, 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        queries, size = int(rng.integers(1, 4)), int(rng.integers(4, 15))
        alpha, scale = float(rng.uniform(0.2, 0.95)), float(rng.choice([0.3, 1.0, 3.0]))
        neighbours, distances, density = drawn(seed, queries, size)
        if kernel == "uniform":
            density, plan = np.ones(size), uniform_plan(distances, alpha, scale)
        else:
            plan = kde_plan(distances, density[neighbours], alpha, scale)
        d = by_candidate(distances, neighbours)
        found = objective(by_candidate(plan.weights, neighbours), d, density, alpha, scale)
        best = best_objective(d, density, alpha, scale)
        assert found > best - 1e-8
        if plan.spread <= (1 / density).sum() / 2:
            exact += 1
            assert found == pytest.approx(best, rel=1e-7)
        else:
            beyond += 1
            missed += found > best * (1 + 1e-6)
    assert exact > 50
    assert beyond > 10
    assert missed > 0


def heap_sweep(
    neighbours: np.ndarray, d: np.ndarray, density: np.ndarray, size: int, alpha: float, scale: float
) -> np.ndarray:
    """The sweep of the paper with a heap, in plain Python; out of neighbours, the next is infinitely far."""
    queries, most = d.shape
    heap = [(1 / density[i][0], 0, i) for i in range(queries)]
    heapq.heapify(heap)
    cost, taken, s = [0.0] * queries, [0] * queries, 0.0
    while True:
        s, k, i = heapq.heappop(heap)
        if k + 1 == most:
            break
        cost[i] = d[i][k + 1] * s - sum(d[i][t] / density[i][t] for t in range(k + 1))
        if alpha / scale * sum(cost) >= (1 - alpha) * queries:
            break
        taken[i] = k + 1
        heapq.heappush(heap, (s + 1 / density[i][k + 1], k + 1, i))
    p = np.zeros(size)
    for i in range(queries):
        parts = [1 / (queries * s * density[i][t]) for t in range(taken[i])]
        for t, part in enumerate(parts):
            p[neighbours[i][t]] += part
        p[neighbours[i][taken[i]]] += 1 / queries - sum(parts)
    return p


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 30), st.floats(0, 0.98), st.floats(0.05, 20))
def test_the_sweep_equals_one_with_a_heap(seed: int, queries: int, most: int, alpha: float, scale: float) -> None:
    neighbours, distances, density = drawn(seed, queries, 40, most)
    found = knn_kde(neighbours, distances, density[np.unique(neighbours)], 40, alpha, scale)
    expected = heap_sweep(neighbours, distances, density[neighbours], 40, alpha, scale)
    np.testing.assert_allclose(found.p, expected, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 30), st.floats(0, 1), st.floats(0.05, 20))
def test_density_one_is_uniform(seed: int, queries: int, most: int, alpha: float, scale: float) -> None:
    neighbours, distances, _ = drawn(seed, queries, 40, most)
    one = knn_kde(neighbours, distances, np.ones(len(np.unique(neighbours))), 40, alpha, scale)
    two = knn_uniform(neighbours, distances, 40, alpha, scale)
    np.testing.assert_allclose(one.p, two.p, atol=1e-12)
    plans = kde_plan(distances, np.ones_like(distances), alpha, scale), uniform_plan(distances, alpha, scale)
    assert plans[0].spread == plans[1].spread


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 20), st.floats(0, 1), st.booleans())
def test_what_always_holds(seed: int, queries: int, most: int, alpha: float, is_kde: bool) -> None:
    neighbours, distances, density = drawn(seed, queries, 30, most)

    def p(neighbours: np.ndarray, distances: np.ndarray, scale: float):
        if is_kde:
            return knn_kde(neighbours, distances, density[np.unique(neighbours)], 30, alpha, scale)
        return knn_uniform(neighbours, distances, 30, alpha, scale)

    found = p(neighbours, distances, 1.0)
    assert found.p.dtype == np.float64
    assert abs(found.p.sum() - 1) < 1e-15 * 30
    assert (found.p >= 0).all()
    assert not found.p[np.setdiff1d(np.arange(30), neighbours)].any()
    assert found.support == np.count_nonzero(found.p)
    assert 1 <= found.neighbourhood <= most
    # A power of two, so that rounding does not move the place where the sweep stops.
    np.testing.assert_allclose(p(neighbours, distances * 8, 8.0).p, found.p, atol=1e-14)
    twice = p(np.concatenate([neighbours] * 2), np.concatenate([distances] * 2), 1.0)
    np.testing.assert_allclose(twice.p, found.p, atol=1e-12)


def test_a_target_row_that_comes_twice_weighs_double() -> None:
    neighbours, distances, _ = drawn(1, 2, 20, 6)
    rows = [0, 0, 1]
    found = knn_uniform(neighbours[rows], distances[rows], 20, 1.0, 1.0)
    expected = np.bincount(neighbours[rows, 0], minlength=20) / 3
    np.testing.assert_allclose(found.p, expected, atol=1e-15)


def test_alpha_one_is_the_nearest_alone_and_alpha_zero_all_that_are_prefetched() -> None:
    neighbours, distances, density = drawn(3, 4, 20, 6)
    nearest = np.bincount(neighbours[:, 0], minlength=20) / 4
    everyone = np.bincount(neighbours.ravel(), minlength=20) / 24
    known = density[np.unique(neighbours)]
    np.testing.assert_allclose(knn_uniform(neighbours, distances, 20, 1, 1.0).p, nearest, atol=1e-15)
    np.testing.assert_allclose(knn_kde(neighbours, distances, known, 20, 1, 1.0).p, nearest, atol=1e-15)
    spread = knn_uniform(neighbours, distances, 20, 0, 1.0)
    np.testing.assert_allclose(spread.p, everyone, atol=1e-15)
    assert spread.neighbourhood == 6


def test_equal_distances_go_by_the_order_given() -> None:
    found = knn_uniform(np.array([[4, 1, 2]]), np.array([[1.0, 1.0, 5.0]]), 6, 1.0, 1.0)
    assert found.p.tolist() == [0, 0, 0, 0, 1, 0]
    # All alike: spreading costs nothing, so it goes as far as it can.
    found = knn_uniform(np.array([[4, 1, 2]]), np.array([[1.0, 1.0, 1.0]]), 6, 0.5, 1.0)
    np.testing.assert_allclose(found.p, [0, 1 / 3, 1 / 3, 0, 1 / 3, 0])


@pytest.mark.parametrize(("alpha", "k"), [(0.05, 4), (0.3, 2), (0.6, 1)])
def test_a_worked_example(alpha: float, k: int) -> None:
    """Distances 0, 1, 2, 3: widening past K costs K (K + 1) / 2 and has to reach (1 - alpha) / alpha."""
    found = knn_uniform(np.array([[3, 2, 1, 0]]), np.array([[0.0, 1.0, 2.0, 3.0]]), 5, alpha, 1.0)
    assert found.p.tolist() == pytest.approx([0.0] * (4 - k) + [1 / k] * k + [0.0])
    assert (found.neighbourhood, found.support) == (k, k)


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_a_candidate_share_its_part(copies: int) -> None:
    rng = np.random.default_rng(0)
    single, target = rng.standard_normal((30, 3)) * 5, rng.standard_normal((1, 3))
    shares = []
    for times in (1, copies):
        points = np.concatenate([single, np.repeat(single[:1], times - 1, axis=0)])
        d = np.linalg.norm(points - target, axis=1)
        neighbours = np.argsort(d, kind="stable")[None]
        density = kernel_density(points[np.unique(neighbours)], 0.5, 20)
        assert density[0] == pytest.approx(times)
        found = knn_kde(neighbours, d[neighbours], density, len(points), 0.02, 1.0)
        plain = knn_uniform(neighbours, d[neighbours], len(points), 0.02, 1.0)
        same = [0, *range(30, len(points))]
        shares.append((found.p[same].sum(), plain.p[same].sum()))
        np.testing.assert_allclose(found.p[same], found.p[0], rtol=1e-9)
    assert shares[1][0] == pytest.approx(shares[0][0], rel=1e-9)
    assert shares[1][1] > 1.5 * shares[0][1]


@pytest.mark.parametrize(("kde_k", "sigma"), [(1, 1.0), (4, 1.0), (100, 1.0), (7, 3.0), (60, 0.0)])
def test_density_equals_a_plain_loop(kde_k: int, sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflex.selectors.parts.transport._BLOCK", 600)  # ten vectors at a time
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((60, 3)).astype(np.float32)
    vectors[:4] = vectors[4]
    expected = []
    for one in vectors.astype(np.float64):
        squared = sorted(float(((one - other) ** 2).sum()) for other in vectors.astype(np.float64))[:kde_k]
        expected.append(sum(max(0.0, 1 - d / sigma**2) for d in squared) if sigma else 1.0)
    found = kernel_density(vectors, sigma, kde_k)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_every_vector_is_near_itself_however_far_from_the_origin() -> None:
    vectors = np.random.default_rng(5).standard_normal((50, 33)) + 1e6
    assert kernel_density(vectors, 1e-3, 4).tolist() == [1.0] * 50


def test_numbers_of_neighbours_are_clipped_to_a_tenth() -> None:
    assert clipped(5000, 1000, 20_000) == (2000, 1000)
    assert clipped(5000, 1000, 100_000) == (5000, 1000)
    assert clipped(5000, 1000, 20) == (2, 2)
    with pytest.raises(CoverageError, match="expected 20 or more"):
        clipped(5000, 1000, 19)
    with pytest.raises(ConfigError, match="max_k is 1"):
        clipped(1, 1000, 100)


def test_what_makes_no_sense_is_refused() -> None:
    neighbours, distances, density = drawn(0, 2, 10, 4)
    for alpha, scale in ((-0.1, 1.0), (1.1, 1.0), (0.5, 0.0), (float("nan"), 1.0), (0.5, float("inf"))):
        with pytest.raises(ConfigError, match="expected 0 to 1 and a positive length"):
            knn_uniform(neighbours, distances, 10, alpha, scale)
    with pytest.raises(MismatchError, match="L > 1"):
        knn_uniform(neighbours[:, :1], distances[:, :1], 10, 0.5, 1.0)
    with pytest.raises(MismatchError, match="expected 0 to 9"):
        knn_uniform(np.where(neighbours == neighbours[0, 0], -1, neighbours), distances, 10, 0.5, 1.0)
    with pytest.raises(MismatchError, match="ascending"):
        knn_uniform(neighbours, distances[:, ::-1], 10, 0.5, 1.0)
    with pytest.raises(MismatchError, match="positive numbers"):
        knn_kde(neighbours, distances, density[:2], 10, 0.5, 1.0)
    with pytest.raises(ConfigError, match="sigma is -1"):
        kernel_density(np.ones((3, 2)), -1.0, 3)
