"""Rules turn scores into the same rows whatever the order of the pool, and never choose what has no score."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.draws import generator, stream
from dataflex.errors import CoverageError
from dataflex.rows import KEY_DTYPE
from dataflex.selectors.parts.rules import ranking, round_robin, top_k


def keys_of(*numbers: int) -> np.ndarray:
    return np.frombuffer(b"".join(n.to_bytes(16, "big") for n in numbers), dtype=KEY_DTYPE)


def test_ties_go_by_key_then_position() -> None:
    keys = keys_of(9, 3, 3, 1)
    assert top_k(np.array([1.0, 1.0, 1.0, 0.0]), keys, 4).tolist() == [1, 2, 0, 3]


def test_nan_and_infinity_never_win() -> None:
    scores = np.array([np.nan, -np.inf, np.inf, -5.0, -6.0])
    assert ranking(scores, keys_of(*range(5))).tolist() == [3, 4]
    with pytest.raises(CoverageError, match="3 rows wanted at one update, found 2"):
        top_k(scores, keys_of(*range(5)), 3)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.randoms())
def test_top_k_does_not_depend_on_the_order_of_the_pool(scores: list[int], random) -> None:
    keys = [random.randrange(5) for _ in scores]
    order = list(range(len(scores)))
    random.shuffle(order)
    k = 1 + random.randrange(len(scores))
    a = top_k(np.array(scores, float), keys_of(*keys), k)
    b = top_k(np.array(scores, float)[order], keys_of(*[keys[i] for i in order]), k)
    assert sorted((scores[i], keys[i]) for i in a) == sorted((scores[order[i]], keys[order[i]]) for i in b)


def test_round_robin_takes_turns_and_skips_what_is_taken() -> None:
    scores = np.array([[9.0, 9.0], [8.0, 1.0], [7.0, 2.0], [0.0, 8.0]])
    assert round_robin(scores, keys_of(*range(4)), 4).tolist() == [0, 3, 1, 2]


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 1000))
def test_round_robin_is_a_prefix_of_itself_and_equals_a_plain_loop(sets: int, rows: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 4, (rows, sets)).astype(float)
    keys = keys_of(*range(rows))
    whole = round_robin(scores, keys, rows).tolist()
    left, plain = set(range(rows)), []
    while left:
        for j in range(sets):
            if left:
                best = min(left, key=lambda i: (-scores[i, j], i))
                left.remove(best)
                plain.append(best)
    assert whole == plain
    assert round_robin(scores, keys, (rows + 1) // 2).tolist() == whole[: (rows + 1) // 2]


@given(st.integers(1, 12), st.integers(0, 40), st.integers(1, 40))
def test_stream_is_one_endless_sequence_of_permutations(size: int, start: int, count: int) -> None:
    rows = np.arange(size) * 10
    whole = stream(rows, 0, start + count, 7, "x")
    assert stream(rows, start, count, 7, "x").tolist() == whole[start:].tolist()
    for number in range(len(whole) // size):
        assert sorted(whole[number * size : (number + 1) * size]) == rows.tolist()


def test_generators_are_functions_of_their_names() -> None:
    draws = {
        tuple(generator(*args).integers(1 << 30, size=2).tolist())
        for args in ((1,), (2,), (1, "a"), (1, "b"), (1, "a", 0), (1, "a", 1))
    }
    assert len(draws) == 6
    assert generator(3, "random", 2).integers(1000, size=3).tolist() == [169, 909, 284]
