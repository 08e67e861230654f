"""Random selection draws anew at every update, by row keys, and only rows with labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dataflex.errors import CoverageError
from dataflex.selectors.random import Random
from tests.held import Held, context, pool

LABELS = np.array([1] * 18 + [0, 0], np.int32)


def draw(k: int, update: int = 0, seed: int = 1, **params: Any) -> list[int]:
    def features(*asked: object) -> Held:
        raise AssertionError("random needs no feature")

    given = context(pool(20, LABELS), [], features, update=update, seed=seed)
    return Random(Random.Params(**params)).select(None, 0, k, context=given).rows.tolist()


def test_draws_are_distinct_labelled_rows_and_new_at_every_update() -> None:
    draws = [draw(6, update) for update in range(4)]
    assert all(len(set(rows)) == 6 and max(rows) < 18 for rows in draws)
    assert len({tuple(rows) for rows in draws}) == 4
    assert draw(6) == draws[0]
    assert draw(6, seed=2) != draws[0]
    assert sorted(draw(18)) == list(range(18))


def test_more_than_there_are_takes_replacement() -> None:
    with pytest.raises(CoverageError, match="19 rows wanted"):
        draw(19)
    rows = draw(200, replacement=True)
    assert set(rows) == set(range(18))
