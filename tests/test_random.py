"""Random selection draws anew at every update, by row keys, and only rows with labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex.errors import ConfigError, CoverageError
from dataflex.selectors.random import Random
from tests.held import Held, context, pool

LABELS = np.array([1] * 18 + [0, 0], np.int32)


def no_features(*asked: object) -> Held:
    raise AssertionError("random needs no feature")


def draw(k: int, update: int = 0, seed: int = 1, **params: Any) -> list[int]:
    given = context(pool(20, LABELS), [], no_features, update=update, seed=seed)
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


LENGTHS = np.random.default_rng(3).integers(5, 400, 300).astype(np.int32)


def lengths_file(folder: Path, *updates: np.ndarray) -> str:
    path = folder / "lengths.parquet"
    table = {
        "update": np.repeat(np.arange(len(updates)), [len(each) for each in updates]),
        "tokens": np.concatenate(updates),
    }
    pq.write_table(pa.table(table), path)
    return str(path)


def drawn(path: str, count: int, update: int = 0, seed: int = 1, **more: Any) -> np.ndarray:
    rows = replace(pool(300, np.arange(300) % 10), length=LENGTHS)
    selector = Random(Random.Params(lengths=path, **more))
    selection = selector.select(None, 0, count, context=context(rows, [], no_features, update=update, seed=seed))
    return np.asarray(selection.rows)


def test_lengths_are_those_of_another_choice(tmp_path: Path) -> None:
    """In every one of twenty classes of length as many rows, whatever the other choice was."""
    eligible = np.flatnonzero(np.arange(300) % 10)
    long = eligible[np.argsort(LENGTHS[eligible], kind="stable")[-40:]]
    path = lengths_file(tmp_path, LENGTHS[long], LENGTHS[eligible[:40]])
    edges = [np.quantile(LENGTHS[eligible], k / 20) for k in range(1, 20)]

    def classes(lengths: np.ndarray) -> list[int]:
        return sorted(sum(length > edge for edge in edges) for length in lengths.tolist())

    for update, of in ((0, long), (1, eligible[:40])):
        for seed in range(3):
            rows = drawn(path, 40, update, seed)
            assert classes(LENGTHS[rows]) == classes(LENGTHS[of])
            assert len(set(rows.tolist())) == 40
            assert set(rows.tolist()) <= set(eligible.tolist())
    assert set(drawn(path, 40, 1, 0).tolist()) != set(drawn(path, 40, 1, 1).tolist())
    # Within a class every row is as likely: all of those that are there come up in 300 draws, and no other.
    seen = set(np.concatenate([drawn(path, 40, 1, seed) for seed in range(300)]).tolist())
    there = set(classes(LENGTHS[eligible[:40]]))
    assert seen == {row for row in eligible.tolist() if classes(LENGTHS[[row]])[0] in there}


def test_lengths_that_the_pool_does_not_have_are_refused(tmp_path: Path) -> None:
    longest = np.full(40, LENGTHS.max())
    path = lengths_file(tmp_path, longest)
    with pytest.raises(CoverageError, match=r"40 rows wanted at one update in class 20 of 20 .* found 1\d that can"):
        drawn(path, 40)
    assert len(drawn(path, 40, replacement=True)) == 40
    with pytest.raises(CoverageError, match="lengths of 40 rows for update 1; expected 41"):
        drawn(path, 41)
    with pytest.raises(CoverageError, match="lengths of 0 rows for update 2"):
        drawn(path, 40, update=1)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"update": [0], "tokens": ["long"]}), other)
    with pytest.raises(ConfigError, match="no Parquet with whole numbers"):
        drawn(str(other), 1)
