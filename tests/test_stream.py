"""A mixture is made of the rows that counting by hand gives."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.trainers.stream import Exhaustion, MixtureStream

NAMES = ("a", "b", "c")
MEMBERS = [np.arange(0, 10), np.arange(10, 30), np.arange(30, 130)]


def domains(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted([10, 30, 130], rows, side="right")


def megatron(shares: np.ndarray, count: int) -> list[int]:
    """Assign slots as Megatron-LM blends datasets: to the largest error at max(n, 1), ties to the first."""
    counts, found = np.zeros(len(shares)), []
    for n in range(count):
        found.append(int(np.argmax(shares * (n + 1) - counts)))
        counts[found[-1]] += 1
    return found


@given(st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_greedy_shares_are_exact_to_one_row(weights: list[int], count: int) -> None:
    shares = np.array(weights) / sum(weights)
    found = domains(MixtureStream(NAMES, MEMBERS, seed=0).take(shares, count))
    assert set(found) <= set(np.flatnonzero(shares))
    for n in range(1, count + 1):
        counts = np.bincount(found[:n], minlength=3)
        assert np.abs(counts - n * shares).max() < 2  # with three domains the largest lead can exceed one


def test_constant_greedy_shares_are_those_of_megatron() -> None:
    shares = np.array([0.55, 0.3, 0.15])
    assert domains(MixtureStream(NAMES, MEMBERS, seed=0).take(shares, 400)).tolist() == megatron(shares, 400)


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_moving_shares_are_followed(history: list[list[float]]) -> None:
    """The rows of a domain stay within a slot or two of the sum of its shares over all slots."""
    stream, mass = MixtureStream(NAMES, MEMBERS, seed=3), np.zeros(3)
    for weights in history:
        shares = np.array(weights) / sum(weights)
        stream.take(shares, 7)
        mass += 7 * shares
        assert np.abs(stream.served - mass).max() < 2


def test_random_draws_have_the_probabilities_asked_for_and_belong_to_their_slot() -> None:
    shares = np.array([0.5, 0.2, 0.3])
    rows = MixtureStream(NAMES, MEMBERS, seed=1, draws="random").take(shares, 20_000)
    counts = np.bincount(domains(rows))
    np.testing.assert_allclose(counts / 20_000, shares, atol=4 * np.sqrt(0.25 / 20_000))
    assert not np.array_equal(rows, MixtureStream(NAMES, MEMBERS, seed=2, draws="random").take(shares, 20_000))
    # Other shares before do not move a slot's number.
    one, two = (MixtureStream(NAMES, MEMBERS, seed=1, draws="random") for _ in range(2))
    one.take(np.array([1.0, 0.0, 0.0]), 50)
    two.take(np.array([0.0, 0.0, 1.0]), 50)
    assert domains(one.take(shares, 300)).tolist() == domains(two.take(shares, 300)).tolist()


@pytest.mark.parametrize("draws", ["greedy", "random"])
@pytest.mark.parametrize("group", [1, 4])
def test_every_pass_is_a_permutation_and_another_one(draws: Any, group: int) -> None:
    stream = MixtureStream(NAMES, MEMBERS, seed=5, draws=draws, group=group)
    rows = stream.take(np.array([0.4, 0.3, 0.3]), 400)
    passes = [rows[rows < 10][start : start + 10].tolist() for start in range(0, 100, 10)]
    for each in passes[:-1]:
        assert sorted(each) == list(range(10))
    assert len({tuple(each) for each in passes[:-1]}) > 1
    if group > 1:
        assert all(len(set(domains(part))) == 1 for part in rows.reshape(-1, group))


def test_the_order_of_a_domain_is_its_own() -> None:
    """It follows from the seed and the domain's name, not from the other domains or the shares."""
    alone = MixtureStream(["b"], [MEMBERS[1]], seed=7).take(np.ones(1), 40)
    mixed = MixtureStream(NAMES, MEMBERS, seed=7, draws="random").take(np.array([0.2, 0.5, 0.3]), 200)
    within = mixed[(mixed >= 10) & (mixed < 30)][:40]
    assert within.tolist() == alone.tolist()


@given(st.integers(0, 120), st.sampled_from(["greedy", "random"]))
@settings(max_examples=30, deadline=None)
def test_it_goes_on_where_it_stopped(cut: int, draws: Any) -> None:
    shares = np.array([0.5, 0.25, 0.25])
    whole = MixtureStream(NAMES, MEMBERS, seed=9, draws=draws).take(shares, 120)
    first = MixtureStream(NAMES, MEMBERS, seed=9, draws=draws)
    before = first.take(shares, cut)
    second = MixtureStream(NAMES, MEMBERS, seed=9, draws=draws)
    second.restore(json.loads(json.dumps(first.state())))
    assert np.concatenate([before, second.take(shares, 120 - cut)]).tolist() == whole.tolist()


def test_exhaustion() -> None:
    shares = np.array([0.8, 0.1, 0.1])
    cycled = MixtureStream(NAMES, MEMBERS, seed=0).take(shares, 50)
    assert Counter(cycled[cycled < 10].tolist()).most_common(1)[0][1] == 4
    stream = MixtureStream(NAMES, MEMBERS, seed=0, exhaustion=Exhaustion("renormalise", 1.5))
    rows = stream.take(shares, 150)
    assert np.bincount(domains(rows))[0] == 15
    assert stream.room(np.ones(3, dtype=bool)) == 15 + 30 + 150 - 150
    assert stream.room(np.array([True, False, False])) == 0
    assert len(stream.take(shares, 100)) == 45
    assert len(stream.take(shares, 100)) == 0
    stopped = MixtureStream(NAMES, MEMBERS, seed=0, exhaustion=Exhaustion("stop", 1.0)).take(shares, 100)
    assert np.bincount(domains(stopped)).tolist()[0] == 10
    assert len(stopped) < 15
    grouped = MixtureStream(NAMES, MEMBERS, 0, group=4, exhaustion=Exhaustion("renormalise", 1.0)).take(shares, 100)
    assert np.bincount(domains(grouped))[0] == 8  # the last two rows make no slot
