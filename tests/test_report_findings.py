"""A report points out what went wrong in a run, and has a page for what is torn, old or not finished."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataflex.pipelines.reporting.arrays import Arrays
from dataflex.pipelines.reporting.facts import facts
from dataflex.results.folder import RunFolder
from tests.command import run
from tests.run_folders import make_run, rows_of
from tests.test_report import written


def changed(folder: Path, number: int, **info: Any) -> None:
    """Change what a round recorded beside its rows."""
    path = folder / "rounds" / f"round-{number:05d}.parquet"
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"dataflex"]) | info
    pq.write_table(table.replace_schema_metadata({b"dataflex": json.dumps(about)}), path)


def test_features_that_were_not_finite_are_a_status(tmp_path: Path) -> None:
    """And rows that the rule never draws are not: they have no preference, and a score all the same."""
    folder = make_run(tmp_path / "run", rows_of(50), prefers=lambda scores: np.where(scores > 0.5, -np.inf, scores))
    assert not any("NaN" in text for text in facts("x", Arrays(RunFolder(folder))).looks)
    changed(folder, 3, nonfinite=2)
    about = facts("x", Arrays(RunFolder(folder)))
    assert ("nonfinite", "features NaN or infinite at the last update", 2) in about.statuses
    assert sum(count for _, _, count in about.statuses) == 51
    assert any("The features of 2 of 51 rows" in text for text in about.looks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length_correlation": -0.7}, "scores go with the row's length (rank correlation -0.70)"),
        ({"norm_correlation": 0.61}, "scores go with the gradient's norm"),
        ({"scored": 100, "below_zero": 99, "common_direction": {"gradient": 0.7}}, "99 of 100 scores have one sign"),
        ({"lost": 0.4, "tail": 10}, "The prefilter keeps about 40% of the choice from the method (mean of 1 updates)"),
        ({"overlap": 0.97}, "chose 97% of the rows of the update before"),
        ({"sources": {"words": 99, "letters": 1}}, "99% of the rows are of one source, words; the pool has 3"),
    ],
)
def test_what_the_diagnostics_found_is_pointed_out(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = make_run(tmp_path / "run", rows_of(60))
    for harmless in (True, False):
        changed(folder, 3, diagnostics={} if harmless else change)
        looks = facts("x", Arrays(RunFolder(folder))).looks
        assert any(said in text for text in looks) is not harmless


def test_a_training_that_did_not_end_or_went_wrong_is_pointed_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows_of(30), chosen=8)
    (folder / "status.json").write_text(json.dumps({"state": "interrupted", "message": "SIGTERM"}))
    with (folder / "trainer_log.jsonl").open("a") as log:
        log.write('{"current_steps": 17, "loss": NaN}\n{"current_steps": 17, "eval_loss": 2.5}\n')
    looks = facts("x", Arrays(RunFolder(folder))).looks
    assert looks[0].startswith("The training has not finished (interrupted: SIGTERM)")
    assert "The training loss was not a number at 1 steps, first at step 17." in looks
    assert "The evaluation loss rose, from 2.000 to 2.500." in looks


def test_what_another_training_left_is_not_taken_for_this_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other = make_run(tmp_path / "run", rows_of(60)), make_run(tmp_path / "other", rows_of(30), chosen=8)
    (folder / "dataflex_rows.parquet").write_bytes((other / "dataflex_rows.parquet").read_bytes())
    for verb in ("show", "report"):
        code, _, err = run(capsys, verb, str(folder), *(["-o", str(tmp_path / "r.html")] if verb == "report" else []))
        assert code == 4
        assert "training rows, 30 in dataflex_rows.parquet" in err
        assert len(err.splitlines()) <= 3


def test_a_torn_line_of_a_log_is_left_out_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows_of(30), chosen=8)
    log = folder / "trainer_log.jsonl"
    log.write_bytes(b'{"current_steps": 1, "lo\n\xff\xfe\n' + log.read_bytes())
    (folder / "rounds" / "round-copy.parquet").write_bytes(b"")
    about = facts("x", Arrays(RunFolder(folder)))
    assert about.looks[-1] == (
        "2 lines of its logs cannot be read and are left out: trainer_log.jsonl, line 1, trainer_log.jsonl, line 2."
    )
    assert len(written(tmp_path / "r.html", folder)) > 1000


def test_a_pool_at_some_updates_alone_is_no_obstacle(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows_of(30), chosen=8)
    (folder / "rounds" / "pool-00003.parquet").unlink()
    assert "Why: their scores" in written(tmp_path / "r.html", folder)


def test_a_training_that_was_killed_is_said_to_be(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows_of(30), chosen=8)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for pid, said in ((int(ended.stdout), "was killed"), (os.getpid(), "has not finished (running)")):
        status = {"state": "running", "host": socket.gethostname(), "pid": pid, "message": None}
        (folder / "status.json").write_text(json.dumps(status))
        assert said in facts("x", Arrays(RunFolder(folder))).looks[0]


def test_a_run_of_an_older_version_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows_of(30), chosen=8)
    for name in ("dataflex_run.json", "dataflex_rows.parquet", "trainer_log.jsonl", "status.json"):
        (folder / name).unlink()
    for path in (folder / "rounds").glob("texts-*"):
        path.unlink()
    assert "Its text was not kept." in written(tmp_path / "r.html", folder)
