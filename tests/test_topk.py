"""Streaming top-k finds what brute force over everything at once finds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dataflex.errors import CoverageError, DataflexError, MismatchError
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot
from dataflex.stores.rounding import STORAGES
from dataflex.stores.search.topk import top_k
from dataflex.stores.values import Layout, Values


def made(folder: Path, vectors: np.ndarray, storage: str, seed: int = 0) -> tuple[ParquetStore, Values]:
    """A store of three fragments, every seventh row not usable."""
    rng = np.random.default_rng(seed)
    store = StoreRoot(folder).open("gradient", {"s": storage}, Layout({"norm": "float32"}, vectors.shape[1], storage))
    status = np.where(np.arange(len(vectors)) % 7 == 3, Status.NONFINITE, Status.OK).astype(np.uint8)
    norm = rng.random(len(vectors), np.float32)
    keys = np.frombuffer(rng.bytes(16 * len(vectors)), KEY_DTYPE)
    for i, part in enumerate(np.array_split(np.arange(len(vectors)), 3)):
        store.append(f"f{i}", Values(keys[part], status[part], {"norm": norm[part]}, vectors[part]))
    return store, store.read(keys)


def brute(values: Values, queries: np.ndarray, k: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert values.vectors is not None
    usable = values.status == Status.OK
    scores = (queries.astype(np.float64) @ values.vectors[usable].T.astype(np.float64)) * weights[usable]
    keys = values.keys[usable]
    rank = np.argsort(np.argsort(keys.view("S16")))
    order = np.stack([np.lexsort((rank, -row))[:k] for row in scores])
    return np.take_along_axis(scores, order, axis=1), keys[order]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("k", [1, 5, 300])
@pytest.mark.parametrize("block_rows", [1, 37, 4096])
def test_equals_brute_force(tmp_path: Path, storage: str, k: int, block_rows: int) -> None:
    rng = np.random.default_rng(k)
    store, values = made(tmp_path, rng.standard_normal((400, 16), np.float32), storage)
    queries = rng.standard_normal((6, 16), np.float32)
    scores, keys = top_k(store, queries, k, block_rows=block_rows)
    expected, expected_keys = brute(values, queries, k, np.ones(400))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert (keys == expected_keys).mean() > 0.99  # scores closer than float32 rounding may swap
    assert scores.dtype == np.float32
    assert scores.shape == keys.shape == (6, k)


@pytest.mark.parametrize("block_rows", [1, 10, 64, 1000])
@pytest.mark.parametrize("k", [3, 50])
def test_ties_go_to_the_smaller_key_however_the_rows_are_blocked(tmp_path: Path, block_rows: int, k: int) -> None:
    rng = np.random.default_rng(0)
    store, values = made(tmp_path, rng.integers(-1, 2, (200, 4)).astype(np.float32), "float32")
    queries = rng.integers(-1, 2, (5, 4)).astype(np.float32)
    scores, keys = top_k(store, queries, k, block_rows=block_rows)
    expected, expected_keys = brute(values, queries, k, np.ones(200))
    assert scores.tolist() == expected.tolist()
    assert keys.tobytes() == expected_keys.tobytes()


@pytest.mark.parametrize("storage", ["float32", "int8", "int4", "int1"])
def test_unit_rows_and_a_weight_column(tmp_path: Path, storage: str) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((100, 8), np.float32)
    vectors[:5] = 0
    store, values = made(tmp_path, vectors, storage)
    queries = rng.standard_normal((3, 8), np.float32)
    assert values.vectors is not None
    norms = np.linalg.norm(values.vectors, axis=1)
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    for unit_rows, weight, weights in [
        (True, None, inverse),
        (False, "norm", values.scalars["norm"]),
        (True, "norm", inverse * values.scalars["norm"]),
    ]:
        scores, _ = top_k(store, queries, 80, unit_rows=unit_rows, weight=weight)
        np.testing.assert_allclose(scores, brute(values, queries, 80, weights)[0], rtol=1e-4, atol=1e-5)


def test_stays_within_the_keys_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    store, values = made(tmp_path, rng.standard_normal((100, 8), np.float32), "float16")
    within = values.keys[:20]
    _, keys = top_k(store, rng.standard_normal((2, 8), np.float32), 10, keys=within)
    assert np.isin(keys.view("S16"), within.view("S16")).all()


def test_a_row_whose_score_overflows_is_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vectors = np.ones((10, 2), np.float32)
    vectors[0] = 3e38
    store, values = made(tmp_path, vectors, "float32")
    _, keys = top_k(store, np.ones((1, 2), np.float32), 8)
    assert values.keys[0].tobytes() not in {key.tobytes() for key in keys[0]}
    assert "1 rows" in caplog.text


def test_what_cannot_be_answered_is_refused(tmp_path: Path) -> None:
    store, _ = made(tmp_path, np.ones((20, 2), np.float32), "float16")
    with pytest.raises(CoverageError, match=r"18 rows wanted of .*, 17 are usable"):
        top_k(store, np.ones((1, 2), np.float32), 18)
    with pytest.raises(MismatchError, match=r"takes \(M > 0, 2\)"):
        top_k(store, np.ones((1, 3), np.float32), 1)
    with pytest.raises(MismatchError, match="k is 0"):
        top_k(store, np.ones((1, 2), np.float32), 0)
    with pytest.raises(DataflexError, match="NaN"):
        top_k(store, np.full((1, 2), np.nan, np.float32), 1)
    loss = StoreRoot(tmp_path).open("loss", {}, Layout({"loss_sum": "float64"}))
    with pytest.raises(MismatchError, match="no vectors"):
        top_k(loss, np.ones((1, 2), np.float32), 1)


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    layout = Layout({}, 512, "int8")
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((4, 512), np.float32)
    peaks = []
    for fragments in (4, 16):
        store = StoreRoot(tmp_path / str(fragments)).open("gradient", {}, layout)
        for n in range(fragments):
            keys = np.frombuffer(rng.bytes(16 * 1000), KEY_DTYPE)
            store.append(
                f"f{n}", Values(keys, np.zeros(1000, np.uint8), {}, rng.standard_normal((1000, 512), np.float32))
            )
        store.contains(keys)
        tracemalloc.start()
        top_k(store, queries, 10, block_rows=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
