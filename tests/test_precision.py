"""Precision of selections from a pool of real data whose sources are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.precision import prepare, table

SHARED = Path(__file__).parents[2] / "shared"


@pytest.mark.skipif(not (SHARED / "data" / "sft").is_dir(), reason="../shared/data is not there: real data with labels")
@pytest.mark.timeout(400)
def test_less_finds_the_rows_of_a_targets_source(tmp_path: Path) -> None:
    """Above chance, and later targets compute their own rows only."""
    study = prepare(SHARED / "data", SHARED / "tiny_model", tmp_path, rows=160, targets=["wikisql", "banking77"])
    results = list(study.precisions())
    print(f"\n{table(results)}")
    for result in results:
        assert result.found["embedding"] >= 3 * result.chance
    assert sum(r.found["LESS"] for r in results) >= 3 * sum(r.chance for r in results)
    assert results[1].computed < results[0].computed / 2
