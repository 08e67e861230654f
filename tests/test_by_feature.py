"""The weighter `feature` weighs by stored numbers and by files as plain loops do; what does not fit is refused."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from dataflex.errors import ConfigError, MismatchError
from dataflex.features.spec import BASE, EmbeddingSpec
from dataflex.rows import Rows
from dataflex.weighters.feature import ByFeature
from tests.held import Held
from tests.held import pool as rows_of
from tests.weighed import NAN, by_feature, group


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        ({}, [3, 1, 2, 0, 0]),
        ({"function": "exp", "temperature": 0.5}, [math.exp(6), math.exp(2), math.exp(4), 0, 1]),
        ({"function": "exp", "favour": "low"}, [math.exp(-3), math.exp(-1), math.exp(-2), 0, 1]),
        ({"function": "rank"}, [4, 2, 3, 0, 1]),
        ({"function": "rank", "favour": "low"}, [1, 3, 2, 0, 4]),
        ({"function": "threshold", "threshold": 2}, [1, 0, 1, 0, 0]),
        ({"function": "threshold", "threshold": 2, "favour": "low"}, [0, 1, 1, 0, 1]),
    ],
)
def test_feature_functions(params, shape):
    expected = np.array(shape) * 5 / sum(shape)  # the row without a number has a loss, so the mean is over 5
    np.testing.assert_allclose(by_feature(**params).weights(group([1.0] * 5)), expected, rtol=1e-12)


def test_feature_is_read_by_row_and_examples_without_a_loss_do_not_count():
    found = by_feature().weights(group([1.0, NAN, 1.0, 1.0], rows=[2, 0, 1, 1]))
    np.testing.assert_allclose(found, [1.5, 0, 0.75, 0.75], rtol=1e-12)
    assert by_feature().weights(group([1.0, 1.0], rows=[3, 4])).tolist() == [0, 0]
    assert by_feature(function="rank").weights(group([1.0] * 5)).dtype == torch.float64


def test_ranks_of_ties_are_shared():
    found = by_feature(np.array([1.0, 1.0, 5.0, 0.0]), function="rank").weights(group([1.0] * 4))
    np.testing.assert_allclose(found, np.array([2.5, 2.5, 4, 1]) * 0.4, rtol=1e-12)


def test_excess_is_what_the_live_model_has_above_the_reference():
    found = by_feature(excess=True).weights(group([3.5, 0.5, 3.5, 9.0, NAN]))
    np.testing.assert_allclose(found, [1, 0, 3, 0, 0], rtol=1e-12)
    soft = by_feature(excess=True, function="exp").weights(group([3.5, 0.5, 3.5, 9.0, NAN]))
    expected = np.array([math.exp(0.5), math.exp(-0.5), math.exp(1.5), 0, 0])
    np.testing.assert_allclose(soft, expected * 4 / expected.sum(), rtol=1e-12)


def test_rows_without_a_number_are_counted_once(caplog):
    with caplog.at_level(logging.WARNING):
        by_feature()
    assert [r.getMessage() for r in caplog.records] == [
        "weighter feature: 1 of 5 rows have no number and weigh 0 (feature loss)"
    ]


def test_needs_name_the_state(tmp_path):
    assert by_feature().needs()[0].state == BASE
    assert by_feature(state="saves/reference").needs()[0].state == "saves/reference"
    path = write(tmp_path, index=[0], score=[1.0])
    assert list(ByFeature(ByFeature.Params(path=path)).needs()) == []


def test_the_number_beside_a_vector():
    weighter = ByFeature(ByFeature.Params(feature=EmbeddingSpec()))
    weighter.prepare({weighter.needs()[0]: Held(scalars={"norm": np.array([1, 3], np.float32)})}, rows=rows_of(2))
    assert weighter.weights(group([1.0, 1.0])).tolist() == [0.5, 1.5]


def write(folder: Path, **columns: Any) -> str:
    kinds = {"row_key": pa.binary(16)}
    path = folder / "scores.parquet"
    pq.write_table(pa.table({name: pa.array(v, kinds.get(name)) for name, v in columns.items()}), path)
    return str(path)


def from_file(path: str, rows: Rows, **params: Any) -> list[float]:
    weighter = ByFeature(ByFeature.Params(path=path, **params))
    weighter.prepare({}, rows=rows)
    return weighter.weights(group([1.0] * len(rows))).tolist()


def test_file_by_position_or_by_key(tmp_path):
    rows = rows_of(3)
    keys = [rows.keys[i].tobytes() for i in (2, 0)]
    assert from_file(write(tmp_path, index=[2, 0], score=[4, 2]), rows) == [1, 0, 2]
    assert from_file(write(tmp_path, index=[0, 1], row_key=keys, quality=[4.0, 2.0]), rows, column="quality") == [
        1,
        0,
        2,
    ]
    twins = rows.take(np.array([0, 0, 2]))
    assert from_file(write(tmp_path, row_key=keys, score=[4.0, 1.0]), twins) == [0.5, 0.5, 2]
    more = [*keys, bytes(16)]
    assert from_file(write(tmp_path, row_key=more, score=[4.0, None, 1.0]), rows) == [0, 0, 3]


@pytest.mark.parametrize(
    ("columns", "error", "match"),
    [
        ({"index": [0], "quality": [1.0]}, ConfigError, "parameter `column`"),
        ({"score": [1.0]}, ConfigError, "row_key or index"),
        ({"index": [5], "score": [1.0]}, MismatchError, "rows 0 to 2"),
        ({"index": [0, 0], "score": [1.0, 2.0]}, ConfigError, "1 and 2 for the row 0"),
        ({"row_key": [bytes(16)], "score": [1.0]}, MismatchError, "none of the 3"),
        ({"index": [0], "score": [-1.0]}, ConfigError, "0 or more"),
        ({"index": [0], "score": [None]}, MismatchError, "none of the 3"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, columns, error, match):
    path = write(tmp_path, **columns)
    with pytest.raises(error, match=match):
        from_file(path, rows_of(3))


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "scores.parquet").write_text("index,score\n0,1\n")
    with pytest.raises(ConfigError, match="no Parquet"):
        from_file(str(tmp_path / "scores.parquet"), rows_of(3))


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({}, "one of feature and path"),
        ({"path": "none.parquet"}, "a file that exists"),
        ({"feature": {"kind": "embedding"}, "excess": True}, "with excess"),
        ({"feature": {"kind": "loss", "given": "nothing"}, "excess": True}, "with excess"),
        ({"feature": {"kind": "loss"}, "column": "tokens"}, "no column"),
        ({"feature": {"kind": "loss"}, "temperature": 2}, "no temperature"),
        ({"feature": {"kind": "loss"}, "function": "threshold"}, "threshold with function"),
        ({"feature": {"kind": "loss"}, "threshold": 1}, "threshold with function"),
        ({"feature": {"kind": "loss"}, "favour": "low"}, "no favour"),
    ],
)
def test_feature_parameters_that_cannot_act_are_refused(params, match):
    with pytest.raises(ValidationError, match=match):
        ByFeature.Params(**params)
