"""The page of the evidence: its tables are those of the kept runs, and differences pair runs of one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence
from dataflex.pipelines.comparing.kept import KeptLine


def line(arm: str, seed: int | None, loss: float, target: str | None = None, **more: Any) -> KeptLine:
    """A run on the test set of one source."""
    values: dict[str, Any] = {
        "target_seed": None, "test": "evidence_test_one", "reward": None, "rows": 40, "tokens": 400, "scored": None,
        "steps": 25, "seconds": 10.0, "feature_seconds": 0.0, "computed": 0, "reused": 0, "gradients": 0,
        "gradients_per_chosen_row": 0.0, "chosen": 100, "choice_seconds": 2.0, "choice_feature_seconds": 0.0,
        "choice_computed": 0, "choice_reused": 0, "choice_gradients": 0, "wall_seconds": None, "device": "cpu",
        "threads": 1, "processes": 1, "versions": {}, "time": "2026-01-01", "identity": "0" * 32, "parts": {},
    }  # fmt: skip
    return KeptLine(**{**values, "arm": arm, "seed": seed, "loss": loss, "target": target, **more})


def test_differences_are_from_random_rows_under_the_same_seed() -> None:
    lines = [
        *(line("random", seed, loss) for seed, loss in ((1, 3.0), (2, 5.0))),
        *(line("less", seed, loss, "evidence_one") for seed, loss in ((2, 4.5), (1, 2.9), (3, 0.0))),
        line("less", 1, 9.0, "evidence_mixed"),  # was shown another target
        line("base", None, 6.0),
    ]
    random, less, base = evidence.arms(lines, "evidence_test_one")
    assert (random.name, random.gain, random.loss and random.loss.mean) == ("random", None, 4.0)
    assert less.loss is not None
    assert less.loss.count == 3
    assert less.loss.mean == pytest.approx(7.4 / 3)
    assert less.gain is not None
    assert less.gain.count == 2
    assert less.gain.mean == pytest.approx(-0.3)
    assert less.gain.half == pytest.approx(12.706 * 0.2, rel=1e-3)  # Student's t of one degree of freedom
    assert base.gain is not None
    assert base.gain.mean == pytest.approx(2.0)


def test_the_first_line_of_a_run_counts_and_another_setting_is_refused(tmp_path: Path) -> None:
    first, again = line("random", 1, 3.0), line("random", 1, 9.0)
    other = again.model_copy(update={"identity": "1" * 32})
    path = tmp_path / "core.jsonl"
    path.write_text("\n".join(each.model_dump_json() for each in (first, again)), "utf-8")
    assert [each.loss for each in evidence.read(path)] == [3.0]
    path.write_text("\n".join(each.model_dump_json() for each in (first, other)), "utf-8")
    with pytest.raises(ValueError, match="under two settings"):
        evidence.read(path)


def test_the_page_has_the_tables_of_the_kept_runs() -> None:
    page = evidence.PAGE.read_text("utf-8")
    tables = {path.stem: evidence.read(path) for path in sorted(evidence.FOLDER.glob("*.jsonl"))}
    assert tables
    assert evidence.filled(page, tables) == page, "run python -m benchmarks.evidence"
    for name in tables:
        assert (evidence.FOLDER / f"{name}.svg").is_file()


def test_a_table_without_a_place_is_named() -> None:
    with pytest.raises(ValueError, match="no place for other"):
        evidence.filled("<!-- core -->\n<!-- end -->\n", {"other": []})
