"""Dynamic mixing by expert loads follows an executed vector and a plain loop; what it cannot do is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dataflex.errors import ConfigError, DataflexError
from dataflex.mixers.base import Domains, MixContext, Statistics
from dataflex.mixers.dynamic_moe import DynamicMoe, deltas

LOADS = [[4, 2, 1, 1], [1, 1, 1, 5], [2, 2, 2, 2]]


def mixer(**params: Any) -> DynamicMoe:
    return DynamicMoe(DynamicMoe.Params(**params))


def context(loads: Sequence[Sequence[float]] | None, initial: Sequence[float] | None = None) -> MixContext:
    count = 3 if loads is None else len(loads)
    sizes = np.full(count, 5)
    domains = Domains([f"d{i}" for i in range(count)], sizes, sizes)
    start = domains.natural if initial is None else np.array(initial)
    ask = {} if loads is None else {"expert_loads": lambda: np.array(loads, np.float64)}
    return MixContext(domains, start, start, Statistics.zeros(count), 0, 0, 0, ask)


def plain(loads: Sequence[Sequence[float]], criterion: str, distance: str) -> list[float]:
    shares = [[v / sum(row) for v in row] if sum(row) else None for row in loads]
    found = []
    for i, one in enumerate(shares):
        apart = []
        for k, other in enumerate(shares):
            if one is None or other is None or (i == k and criterion != "mean"):
                continue
            if distance == "l2":
                apart.append(math.dist(one, other))
            else:
                product = sum(a * b for a, b in zip(one, other, strict=True))
                apart.append(1 - product / (math.hypot(*one) * math.hypot(*other)))
        if not apart:
            found.append(0.0)
        else:
            found.append({"mean": sum(apart) / len(apart), "min": min(apart), "max": max(apart)}[criterion])
    return found


def test_equals_the_vector():
    moe = mixer()
    found = moe.mix(None, 0, context=context(LOADS))
    np.testing.assert_allclose(moe.record()["delta"], [0.314521219, 0.3567967137, 0.2463996399], atol=1e-9)
    np.testing.assert_allclose(found, [0.3299744973, 0.4948246269, 0.1752008758], atol=1e-9)


@pytest.mark.parametrize("criterion", ["mean", "min", "max"])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_distances_equal_loops(criterion, distance):
    loads = np.random.default_rng(2).integers(0, 50, (5, 7)).astype(float)
    loads[3] = 0
    expected = plain(loads.tolist(), criterion, distance)
    np.testing.assert_allclose(deltas(loads, criterion, distance), expected, atol=1e-12)
    assert expected[3] == 0
    assert min(expected[i] for i in (0, 1, 2, 4)) > 0


def test_updates_go_on_from_the_last_weights_and_resume_exactly():
    whole, first, second = mixer(eta=3, c=0.1), mixer(eta=3, c=0.1), mixer(eta=3, c=0.1)
    weights = np.array([0.2, 0.3, 0.5])
    for _ in range(3):
        raised = weights * np.exp(3 * deltas(np.array(LOADS, float), "mean", "l2"))
        weights = 0.9 * raised / raised.sum() + 0.1 / 3
        np.testing.assert_allclose(whole.mix(None, 0, context=context(LOADS, (0.2, 0.3, 0.5))), weights, rtol=1e-12)
    first.mix(None, 0, context=context(LOADS, (0.2, 0.3, 0.5)))
    second.restore(json.loads(json.dumps(first.state())))
    for _ in range(2):
        second.mix(None, 0, context=context(LOADS))
    assert second.state() == whole.state()


def test_scale_and_order_of_loads_do_not_matter():
    found = mixer().mix(None, 0, context=context(LOADS))
    scaled = [[v * 10**i for v in row] for i, row in enumerate(LOADS)]
    np.testing.assert_allclose(mixer().mix(None, 0, context=context(scaled)), found, rtol=1e-12)
    turned = mixer().mix(None, 0, context=context(LOADS[::-1]))
    np.testing.assert_allclose(turned, found[::-1], rtol=1e-12)


def test_a_domain_without_load_stays_apart():
    moe = mixer(c=0)
    found = moe.mix(None, 0, context=context([*LOADS, [0, 0, 0, 0]]))
    np.testing.assert_allclose(moe.record()["delta"], [0.314521219, 0.3567967137, 0.2463996399, 0], atol=1e-9)
    three = mixer(c=0).mix(None, 0, context=context(LOADS))
    np.testing.assert_allclose(found[:3] / found[:3].sum(), three, rtol=1e-12)


def test_one_domain():
    assert mixer().mix(None, 0, context=context([[1, 2]])).tolist() == [1.0]


@pytest.mark.parametrize("initial", [(0.0, 0.4, 0.6), None])
@pytest.mark.parametrize("c", [0.0, 0.05])
def test_proportions_are_a_distribution_above_the_floor(initial, c):
    found = mixer(c=c, eta=2000).mix(None, 0, context=context(LOADS, initial))
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found.min() >= c / 3 * (1 - 1e-12)


def test_without_the_signal_it_refuses():
    with pytest.raises(ConfigError, match="expert loads"):
        mixer().mix(None, 0, context=context(None))


@pytest.mark.parametrize(
    ("loads", "match"),
    [
        ([[0, 0], [0, 0], [1, 2]], "d0, d1"),
        ([[1, math.nan], [1, 1]], "finite"),
        ([[1, -1], [1, 1]], "0 or more"),
    ],
)
def test_loads_that_tell_nothing_are_refused(loads, match):
    with pytest.raises(DataflexError, match=match):
        mixer().mix(None, 0, context=context(loads))
