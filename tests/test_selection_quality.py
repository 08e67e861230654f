"""LESS finds the rows of a target's source in a pool of real data whose sources are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.selection_quality import easy, line

SHARED = Path(__file__).parents[2] / "shared"


@pytest.mark.skipif(not (SHARED / "data" / "sft").is_dir(), reason="../shared/data is not there: real data with labels")
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_less_finds_the_rows_of_a_targets_source(tmp_path: Path) -> None:
    """Above chance, and later targets compute their own rows only."""
    targets = ["wikisql", "banking77"]
    study = easy(SHARED / "data", SHARED / "tiny_model", tmp_path, rows=120, targets=targets)
    chance = 1 / 8
    for method, least in (("less", 3 * chance), ("embedding", 6 * chance), ("ifd", 0.0)):
        found = study.precision(method)
        print(f"\n{line(method, [found], targets)}")
        assert sum(found.share.values()) / 2 >= least
        if method == "less":
            assert found.cost.computed <= 120 + 2 * 48
