"""Storage types of less than a byte a number: how they are packed, what that loses, and what a search makes of it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn

from dataflex.errors import DataflexError, MismatchError
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.foreseen import FileSizes
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.record import seal, unseal
from dataflex.stores.root import StoreRoot, folder_name
from dataflex.stores.rounding import STORAGES, decode, encode, unpacked
from dataflex.stores.search.topk import top_k
from dataflex.stores.upkeep.inspection import inspect, refuse, repair
from dataflex.stores.values import Layout, Values

pytestmark = pytest.mark.usefixtures("unsynced")

PACKED = ["int4", "int1"]


def rounded(vectors: np.ndarray, storage: str) -> np.ndarray:
    return decode(*encode(vectors, storage), storage, vectors.shape[1])


def filled(
    folder: Path, storage: str, vectors: np.ndarray, status: np.ndarray | None = None
) -> tuple[ParquetStore, Values]:
    layout, rng = Layout({}, vectors.shape[1], storage), np.random.default_rng(1)
    store = StoreRoot(folder).open("gradient", {"storage": storage}, layout)
    keys = np.frombuffer(rng.bytes(16 * len(vectors)), KEY_DTYPE)
    status = np.zeros(len(vectors), np.uint8) if status is None else status
    store.append("f0", Values(keys, status, {}, vectors))
    return store, store.read(keys)


def test_the_layout_of_a_byte_is_as_documented() -> None:
    """Written down by hand from docs/stores.md."""
    row = np.array([[7, -7, 1, -1, 0, -0.0, 3.4, -3.6, 7]], np.float32)
    codes, scale = encode(row, "int4")
    assert codes.tolist() == [[0x97, 0xF1, 0x00, 0xC3, 0x07]]
    assert scale is not None
    assert scale.tolist() == [7]
    assert codes.dtype == np.dtype(np.uint8)
    codes, scale = encode(row, "int1")
    assert codes.tolist() == [[0b10001010, 0]]
    assert scale is not None
    assert scale[0] == np.float32(np.abs(row.astype(np.float64)).mean())
    np.testing.assert_array_equal(rounded(row, "int1")[0] / scale[0], [1, -1, 1, -1, 1, 1, 1, -1, 1])


@pytest.mark.parametrize("storage", PACKED)
@given(
    drawn.arrays(
        np.float32,
        st.tuples(st.integers(1, 20), st.integers(1, 40)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
@example(np.full((3, 5), -2, np.float32))
@example(np.zeros((2, 7), np.float32))
@settings(max_examples=60, deadline=None)
def test_codes_come_back_as_they_were_packed(storage: str, vectors: np.ndarray) -> None:
    codes, scale = encode(vectors, storage)
    assert scale is not None
    width = vectors.shape[1]
    assert codes.shape == (len(vectors), -(-width * (4 if storage == "int4" else 1) // 8))
    by = scale[:, None].astype(np.float64)
    if storage == "int4":
        exact = np.divide(vectors, scale[:, None], out=np.zeros_like(vectors), where=scale[:, None] > 0)
        plain = np.rint(exact * np.float32(7))
        assert np.abs(plain).max() <= 7
    else:
        plain = np.where(vectors < 0, -1, 1)
    np.testing.assert_array_equal(unpacked(codes, storage, width), plain)
    most = STORAGES[storage].most
    least = most * float(
        np.finfo(np.float32).smallest_subnormal
    )  # what a factor below the normal numbers is rounded by
    np.testing.assert_allclose(decode(codes, scale, storage, width), plain * by / most, rtol=2e-7, atol=least)
    assert not codes[~vectors.any(axis=1)].any()
    assert not decode(codes, scale, storage, width)[~vectors.any(axis=1)].any()
    spare = np.unpackbits(codes, axis=1, bitorder="little")[:, width * (4 if storage == "int4" else 1) :]
    assert not spare.any()


@pytest.mark.parametrize("storage", PACKED)
@pytest.mark.parametrize("width", [1, 7, 1000, 70000])
def test_a_row_is_rounded_alike_whatever_stands_beside_it(storage: str, width: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((9, width), np.float32) * np.float32(3e-5)
    codes, scale = encode(vectors, storage)
    assert scale is not None
    order = np.random.default_rng(1).permutation(9)
    for some in (order, order[:1], slice(3, 8)):
        again, by = encode(np.asfortranarray(vectors[some]), storage)
        assert again.tobytes() == codes[some].tobytes()
        assert by is not None
        assert by.tobytes() == scale[some].tobytes()
        np.testing.assert_array_equal(
            decode(codes[some], scale[some], storage, width), decode(codes, scale, storage, width)[some]
        )


@pytest.mark.parametrize("storage", PACKED)
@pytest.mark.parametrize("width", [4096, 4097])
def test_taking_apart_needs_no_memory_but_for_what_comes_out(storage: str, width: int) -> None:
    codes, scale = encode(np.ones((1024, width), np.float32), storage)
    for work in (lambda: decode(codes, scale, storage, width), lambda: unpacked(codes, storage, width)):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.2 * 1024 * width * 4


def test_errors_are_those_of_theory() -> None:
    """Of normal numbers 1 bit keeps 2/π of the square; an even step s costs s²/12 of it."""
    vectors = np.random.default_rng(0).standard_normal((400, 4096), np.float32)
    squares = (vectors.astype(np.float64) ** 2).sum(axis=1)
    for storage in PACKED:
        found = rounded(vectors, storage).astype(np.float64)
        lost = ((vectors - found) ** 2).sum(axis=1) / squares
        step = np.abs(vectors).max(axis=1) / 7
        expected = 1 - 2 / np.pi if storage == "int1" else float((step**2 / 12).mean())
        assert lost.mean() == pytest.approx(expected, rel=0.02)
    one_bit = rounded(vectors, "int1").astype(np.float64)
    lost = vectors - one_bit  # nearest in least squares: what is lost is orthogonal to what is kept
    np.testing.assert_allclose((lost * one_bit).sum(axis=1) / squares, 0, atol=1e-6)


def test_cosines_with_an_unrounded_target_keep_their_order() -> None:
    rng = np.random.default_rng(2)
    target = rng.standard_normal(8192)
    share = np.linspace(0, 0.9, 60)[:, None]
    rows = (share * target + np.sqrt(1 - share**2) * rng.standard_normal((60, 8192))).astype(np.float32)

    def cosines(vectors: np.ndarray) -> np.ndarray:
        return vectors @ target / np.linalg.norm(vectors, axis=1) / np.linalg.norm(target)

    exact = cosines(rows.astype(np.float64))
    one_bit, four_bits = (cosines(rounded(rows, storage).astype(np.float64)) for storage in ("int1", "int4"))
    np.testing.assert_allclose(one_bit, np.sqrt(2 / np.pi) * exact, atol=4 / np.sqrt(8192))
    np.testing.assert_allclose(four_bits, exact / np.sqrt(1 + (0.57**2) / 12), atol=0.02)
    # Distances too, of rows of any length: a scale that kept each row's norm would put short rows first.
    mixed = (rows * rng.uniform(0.2, 1, (60, 1))).astype(np.float32)
    square = float((target**2).sum())
    found, wanted = (((target - v) ** 2).sum(axis=1) - square for v in (rounded(mixed, "int1"), mixed))
    np.testing.assert_allclose(found, 2 / np.pi * wanted, atol=0.04 * square)


@pytest.mark.parametrize("storage", PACKED)
def test_rows_without_a_value_and_rows_of_zeros(tmp_path: Path, storage: str) -> None:
    vectors = np.random.default_rng(3).standard_normal((8, 13), np.float32)
    vectors[2], vectors[5], vectors[6] = np.nan, 0, -np.abs(vectors[6])
    status = np.array([0, 0, Status.NONFINITE, 0, Status.NO_LABELS, 0, 0, 0], np.uint8)
    store, found = filled(tmp_path, storage, vectors, status)
    assert found.vectors is not None
    assert found.status.tolist() == status.tolist()
    assert not found.vectors[[2, 4, 5]].any()
    assert (found.vectors[6] <= 0).all()
    # A row of zeros points nowhere: its cosine is 0, although one bit cannot write a zero.
    scores, keys = top_k(store, np.ones((1, 13), np.float32), 6, unit_rows=True)
    assert scores[0][keys[0] == found.keys[5]].tolist() == [0]
    vectors[0] = np.inf
    with pytest.raises(DataflexError, match="not finite"):
        filled(tmp_path / "other", storage, vectors, status)


@pytest.mark.parametrize("storage", PACKED)
@pytest.mark.parametrize("width", [1, 2, 9, 8192])
def test_files_are_as_small_as_foreseen(tmp_path: Path, storage: str, width: int) -> None:
    vectors = np.random.default_rng(4).standard_normal((300, width), np.float32)
    store, _ = filled(tmp_path, storage, vectors)
    size = store.bytes
    log = sum(path.stat().st_size for path in Path(store.path, "log").iterdir())
    assert FileSizes(Layout({}, width, storage)).fragment(300) == pytest.approx(size + log, rel=0.01)
    if width == 8192:
        assert size / 300 == pytest.approx(width * (0.5 if storage == "int4" else 0.125), rel=0.03)


def test_a_type_that_this_version_does_not_have_is_named_and_left_alone(tmp_path: Path) -> None:
    """As an older DataFlex meets a store of ours."""
    store, _ = filled(tmp_path, "int1", np.ones((3, 5), np.float32))
    recipe = {"storage": "int3"}
    folder = tmp_path / folder_name("gradient", recipe)
    Path(store.path).rename(folder)
    document = unseal((folder / "recipe.json").read_bytes(), "recipe")
    body = {name: document[name] for name in ("kind", "layout", "libraries")}
    body["layout"] = {**body["layout"], "storage": "int3"}
    (folder / "recipe.json").write_bytes(seal({**body, "recipe": recipe}))
    root = StoreRoot(tmp_path)
    for look in (lambda: root.find("gradient", recipe), lambda: root.open("gradient", recipe, Layout({}, 5, "int1"))):
        with pytest.raises(MismatchError, match=r"recipe.json: .*'int3'.*one of float32, .*newer DataFlex"):
            look()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    parts = [*inspect(root.files), *repair(root.files)]
    with pytest.raises(MismatchError, match="int3"):
        refuse(parts)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert json.loads((folder / "recipe.json").read_text("utf-8"))["layout"]["storage"] == "int3"
