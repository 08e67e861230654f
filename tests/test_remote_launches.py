"""Launches that share a store on an object store: together they compute every row about once, and commit it once."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.launches import launched, synthetic
from dataflex.access.grid import SMALLEST
from dataflex.stores.root import StoreRoot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize(
    ("launches", "apart", "cells", "leases", "most"),
    [(2, 0.0, 100, True, 1.03), (4, 0.3, 100, True, 1.06), (2, 0.0, 200, False, 1.06)],
)
def test_launches_share_the_work(
    launches: int, apart: float, cells: int, leases: bool, most: float, bucket: str
) -> None:
    url = f"s3://{bucket}/root"
    rows = launched(url, launches, cells, 0.05, leases, apart)
    assert cells * SMALLEST <= sum(rows) <= most * cells * SMALLEST, rows
    (store,) = StoreRoot(url).stores()
    assert store.rows == cells * SMALLEST
    assert len(store.committed_fragments()) == cells
    assert store.contains(np.unique(synthetic(cells * SMALLEST).keys)).all()
    assert store.files.names(f"{store.folder}/tmp") == []
