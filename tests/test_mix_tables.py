"""Tables of finished runs, and goals for them, are read as meant; all that is wrong in them is said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex.errors import ConfigError
from dataflex.fitting.goal import read_goal
from dataflex.fitting.table import read_runs

GOOD = "run,mix.a,mix.b,metric.m\nx,1,3,2.0\ny,2,2,2.5\nz,3,1,2.25\n"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_read_and_normalised(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"runs.{suffix}"
    if suffix == "csv":
        path.write_text("\ufeff" + GOOD.replace("\n", "\r\n") + "\r\n", "utf-8")
    else:
        columns = {"run": ["x", "y", "z"], "mix.a": [1, 2, 3], "mix.b": [3, 2, 1], "metric.m": [2.0, 2.5, 2.25]}
        pq.write_table(pa.table(columns), path)
    runs = read_runs(path)
    assert (runs.domains, runs.metrics, runs.unused) == (("a", "b"), ("m",), ("run",))
    np.testing.assert_array_equal(runs.mixtures, [[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]])
    np.testing.assert_array_equal(runs.values[:, 0], [2.0, 2.5, 2.25])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "mix.a,mix.b,metric.m\n,1,2\n-1,1,2\nnan,1,inf\n0,0,x\n",
            (
                "2: mix.a: found nothing",
                "3: mix.a: found '-1'",
                "4: mix.a: found 'nan'",
                "4: metric.m: found 'inf'",
                "5: metric.m: found 'x'",
                "5: mix.*: found no weight above 0",
            ),
        ),
        ("mix.a,metric.m\n1,2\n", ("mix.*: found 1 columns",)),
        ("mix.a,mix.b,loss\n1,1,2\n", ("metric.*: found no column",)),
        ("mix.a,mix.a,mix.b,metric.m\n1,1,1,1\n", ("mix.a: found 2 columns",)),
        ("mix.,mix.b,metric.m\n1,1,1\n", ("mix.: found a column without a name",)),
        ("mix.a,mix.b,metric.m\n1,1\n1,1,1,1\n", ("2: found 2 cells; expected 3", "3: found 4 cells")),
        ("mix.a,mix.b,metric.m\n", ("found 0 lines with 0 different mixtures",)),
        ("mix.a,mix.b,metric.m\n1,2,1\n2,4,2\n2,1,3\n", ("found 3 lines with 2 different mixtures",)),
        (
            "mix.a,mix.b,mix.c,metric.m\n1,2,0,1\n2,2,0,1\n3,2,0,1\n",
            ("mix.c: found 0 in every line", "metric.m: found 1 in every line"),
        ),
        ("", ("empty file",)),
    ],
)
def test_all_that_is_wrong_in_a_table_is_said_at_once(tmp_path: Path, text: str, said: tuple[str, ...]) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_runs(path)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["none.csv", "none.parquet", "text.parquet", "latin.csv"])
def test_what_is_no_table_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.parquet").write_text(GOOD)
    (tmp_path / "latin.csv").write_bytes(b"mix.\xe9,mix.b\n")
    with pytest.raises(ConfigError, match=name):
        read_runs(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, ("--prior: found no prior",)),
        ({"kl": -1, "cap": 0, "tokens": float("nan")}, ("--kl", "--cap", "--tokens")),
        ({"prior": "uniform", "kl": 0}, ("--prior: found a prior that --kl 0",)),
        ({"prior": "natural"}, ("found 'natural' without --sizes",)),
        ({"prior": "uniform", "tokens": 5}, ("--sizes, --tokens",)),
        ({"prior": "uniform", "sizes": {"a": 1, "b": 2}}, ("--sizes, --tokens",)),
        ({"prior": "uniform", "cap": 2}, ("--cap: found 2",)),
        ({"sizes": {"a": 1, "bb": 2}}, ("bb: found an unknown domain", "did you mean 'b'", "b: found nothing")),
        ({"sizes": {"a": -1, "b": True}}, ("a: found -1", "b: found true")),
        ({"sizes": {"a": 0, "b": 0}}, ("found 0 for every domain",)),
        ({"sizes": {"a": 1e308, "b": 1e308}}, ("found numbers too large to add up",)),
        ({"sizes": {"a": 10**400, "b": 1}}, ("a: found 1000", "expected a finite number")),
        ({"sizes": [1, 2]}, ("found list; expected a mapping",)),
        ({"prior": "nowhere.json"}, ("nowhere.json",)),
        ({"sizes": {"a": 1, "b": 2}, "tokens": 13}, ("found 13 tokens; expected at most 12, which is 4 epochs",)),
        ({"prior": "uniform", "weights": "n=1,m=x"}, ("found 'n=1'", "--weights m: found 'x'")),
        ({"prior": "uniform", "weights": "m=0"}, ("--weights: found 'm=0'; expected a weight above 0",)),
    ],
    ids=str,
)
def test_goals_that_cannot_be_met_are_refused(tmp_path: Path, given: dict[str, Any], said: tuple[str, ...]) -> None:
    table = tmp_path / "runs.csv"
    table.write_text(GOOD)
    if "sizes" in given:
        (tmp_path / "sizes.json").write_text(json.dumps(given["sizes"]))
        given = given | {"sizes": tmp_path / "sizes.json"}
    runs = read_runs(table)
    with pytest.raises(ConfigError) as caught:
        read_goal(runs, **given)
    for part in said:
        assert part in str(caught.value)
