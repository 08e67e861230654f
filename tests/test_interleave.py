"""Lists of neighbours take turns as in a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.selectors.parts.interleave import interleaved


def lists(seed: int, queries: int, most: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(30)[:most] for _ in range(queries)])


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 30), st.integers(1, 40))
def test_equals_a_plain_loop(seed: int, queries: int, most: int, k: int) -> None:
    rows = lists(seed, queries, most)
    plain: list[int] = []
    for column in range(most):
        for query in range(queries):
            if rows[query, column] not in plain and len(plain) < k:
                plain.append(int(rows[query, column]))
    chosen, exhausted = interleaved(rows, k)
    assert chosen.dtype == np.int64
    assert (chosen.tolist(), exhausted) == (plain, len(plain) < k)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 29), st.integers(1, 30))
def test_fewer_rows_and_fewer_neighbours_give_a_prefix(seed: int, queries: int, most: int, k: int) -> None:
    rows = lists(seed, queries, 30)
    whole, exhausted = interleaved(rows, 30)
    assert not exhausted
    assert interleaved(rows, k)[0].tolist() == whole[:k].tolist()
    some, _ = interleaved(rows[:, :most], 30)
    assert some.tolist() == whole[: len(some)].tolist()


@pytest.mark.parametrize("copies", [1, 3])
def test_queries_that_are_alike_count_once(copies: int) -> None:
    rows = np.repeat([[4, 2, 9, 7]], copies, axis=0)
    assert interleaved(rows, 3)[0].tolist() == [4, 2, 9]
    chosen, exhausted = interleaved(rows, 5)
    assert (chosen.tolist(), exhausted) == ([4, 2, 9, 7], True)


def test_rows_that_are_not_allowed_are_passed_over() -> None:
    rows, allowed = lists(3, 4, 30), np.arange(30) % 3 != 1
    kept = [row for row in interleaved(rows, 30)[0].tolist() if allowed[row]]
    assert interleaved(rows, 30, allowed)[0].tolist() == kept
