"""A FAISS index finds what brute force finds, and is built anew whenever its cache cannot be trusted."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from dataflex.errors import ConfigError, CoverageError, MismatchError
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.files import LocalFiles
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.record import seal, unseal
from dataflex.stores.root import StoreRoot
from dataflex.stores.search import faiss_cache, faiss_index
from dataflex.stores.search.faiss_cache import load_or_build
from dataflex.stores.search.faiss_index import build
from dataflex.stores.search.topk import top_k
from dataflex.stores.values import Layout, Values
from tests.looked_at import problems

WIDTH = 12
LAYOUT = Layout({}, WIDTH, "float16")


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fragment(number: int, rows: int = 200) -> Values:
    rng = np.random.default_rng(number)
    status = np.where(np.arange(rows) % 9 == 4, Status.NO_LABELS, Status.OK).astype(np.uint8)
    vectors = rng.standard_normal((rows, WIDTH), np.float32)
    return Values(np.frombuffer(rng.bytes(16 * rows), KEY_DTYPE), status, {}, vectors)


@pytest.fixture
def store(tmp_path: Path) -> ParquetStore:
    made = StoreRoot(tmp_path / "root").open("embedding", {"m": 1}, LAYOUT)
    for n in range(2):
        made.append(f"f{n}", fragment(n))
    return made


QUERIES = np.random.default_rng(5).standard_normal((7, WIDTH), np.float32)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_flat_equals_brute_force(store: ParquetStore, metric: str) -> None:
    scores, keys = build(store, metric, "flat").search(QUERIES, 20)  # type: ignore[arg-type]
    parts = [block for block in store.scan()]
    usable = np.concatenate([block.status for block in parts]) == Status.OK
    vectors = np.concatenate([block.vectors for block in parts if block.vectors is not None])[usable]
    all_keys = np.concatenate([block.keys for block in parts])[usable]
    if metric == "l2":
        expected = -((QUERIES[:, None] - vectors[None]) ** 2).sum(axis=2)
    else:
        expected = QUERIES @ vectors.T
    if metric == "cosine":
        expected /= np.linalg.norm(QUERIES, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :20]
    found = -scores if metric == "l2" else scores
    np.testing.assert_allclose(found, np.take_along_axis(expected, order, axis=1), rtol=1e-4, atol=1e-5)
    assert keys.tobytes() == all_keys[order].tobytes()


def test_flat_equals_the_streaming_top_k(store: ParquetStore) -> None:
    unit = QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True)
    scores, keys = build(store, "cosine", "flat").search(QUERIES, 10)
    exact, exact_keys = top_k(store, unit, 10, unit_rows=True)
    np.testing.assert_allclose(scores, exact, rtol=1e-5)
    assert keys.tobytes() == exact_keys.tobytes()


def test_ivf_never_returns_fewer_than_asked(tmp_path: Path) -> None:
    store = StoreRoot(tmp_path / "root").open("embedding", {"m": 1}, LAYOUT)
    store.append("f0", fragment(0, 4000))
    approximate, exact = build(store, "l2", "ivf"), build(store, "l2", "flat")
    assert approximate.index.nlist > 30
    found = [index.search(QUERIES, 10)[1] for index in (approximate, exact)]
    recall = np.mean([len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(*found, strict=True)])
    assert 0.2 < recall <= 1
    scores, keys = approximate.search(QUERIES, len(approximate.keys))
    assert np.isfinite(scores).all()
    assert [len(set(row.tolist())) for row in keys] == [len(approximate.keys)] * len(QUERIES)


def test_auto_takes_an_inverted_file_from_the_stated_size(store: ParquetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(store).kind == "flat"
    monkeypatch.setattr(faiss_index, "IVF_ROWS", 100)
    assert build(store).kind == "ivf"


def test_zero_vectors_are_no_nan(tmp_path: Path) -> None:
    store = StoreRoot(tmp_path / "root").open("embedding", {"m": 1}, LAYOUT)
    values = fragment(0, 10)
    assert values.vectors is not None
    values.vectors[0] = 0
    store.append("f0", values)
    scores, _ = build(store).search(QUERIES, 8)
    assert np.isfinite(scores).all()


def test_what_cannot_be_answered_is_refused(store: ParquetStore, tmp_path: Path) -> None:
    index = build(store)
    with pytest.raises(CoverageError, match="neighbours wanted, 356 rows"):
        index.search(QUERIES, 357)
    with pytest.raises(MismatchError, match="expected finite"):
        index.search(QUERIES[:, :3], 1)
    with pytest.raises(ConfigError, match="cosine, ip or l2"):
        build(store, "dot")  # type: ignore[arg-type]
    empty = StoreRoot(tmp_path / "empty").open("embedding", {"m": 1}, LAYOUT)
    with pytest.raises(CoverageError, match="no usable row"):
        build(empty)
    loss = StoreRoot(tmp_path / "empty").open("loss", {}, Layout({"loss_sum": "float64"}))
    with pytest.raises(MismatchError, match="no vectors"):
        build(loss)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stores that an index was built for, in order."""
    done: list[str] = []

    def counted(store, metric, kind):
        done.append(store.folder)
        return build(store, metric, kind)

    monkeypatch.setattr(faiss_cache, "build", counted)
    return done


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_kept_index_answers_as_the_built_one(store: ParquetStore, builds: list[str], kind: str) -> None:
    built = load_or_build(store, "ip", kind)  # type: ignore[arg-type]
    loaded = load_or_build(store, "ip", kind)  # type: ignore[arg-type]
    assert (len(builds), loaded.kind) == (1, kind)
    for one, two in zip(built.search(QUERIES, 5), loaded.search(QUERIES, 5), strict=True):
        assert one.tobytes() == two.tobytes()


def test_a_stale_index_is_built_anew(store: ParquetStore, builds: list[str]) -> None:
    load_or_build(store)
    store.append("f2", fragment(2))
    assert len(load_or_build(store).keys) == 534
    assert len(builds) == 2
    load_or_build(store)
    assert len(builds) == 2


@pytest.mark.parametrize("suffix", ["faiss", "keys", "json"])
def test_a_damaged_index_is_built_anew(store: ParquetStore, builds: list[str], suffix: str) -> None:
    path = Path(store.path, "derived", "faiss", f"cosine-auto.{suffix}")
    expected = load_or_build(store).search(QUERIES, 5)[1]
    intact = path.read_bytes()
    rng = np.random.default_rng(0)
    # White space in the JSON is the only place where a flip changes nothing.
    places = [
        int(i)
        for i in rng.choice(len(intact), 25, replace=False)
        if suffix != "json" or not intact[i : i + 1].isspace()
    ]
    harmed = [intact[:i] + bytes([intact[i] ^ 1]) + intact[i + 1 :] for i in places]
    for count, data in enumerate([*harmed, b"", intact[: len(intact) // 2]], 2):
        path.write_bytes(data)
        assert load_or_build(store).search(QUERIES, 5)[1].tobytes() == expected.tobytes()
        assert len(builds) == count
    path.unlink()
    load_or_build(store)
    load_or_build(store)
    assert len(builds) == count + 1


def test_a_foreign_index_is_never_loaded(
    store: ParquetStore,
    tmp_path: Path,
    builds: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Somebody hands us a store with an index beside it; all its own digests are right, the signature is not ours."""
    load_or_build(store)
    path = Path(store.path, "derived", "faiss", "cosine-auto.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other user"))
    record = unseal(path.read_bytes(), "it")
    opened: list[str] = []
    monkeypatch.setattr(LocalFiles, "open", _watched(opened))
    for signature in (record["signature"], "", 7, None):
        path.write_bytes(seal({**record, "signature": signature}))
        load_or_build(store)
        assert "was not built by this user" in caplog.text
        caplog.clear()
    assert len(builds) == 5
    assert not [name for name in opened if name.endswith(".faiss")]


def _watched(opened: list[str]):
    original = LocalFiles.open

    def watched(self, path):
        opened.append(path)
        return original(self, path)

    return watched


def test_everything_derived_can_be_deleted(store: ParquetStore, builds: list[str]) -> None:
    load_or_build(store)
    shutil.rmtree(Path(store.path, "derived"))
    load_or_build(store)
    assert len(builds) == 2
    assert problems(store) == []


class ReadOnly(LocalFiles):
    # As root, whom no permission stops, would not see it.
    def _make_folder(self, folder: Path) -> None:
        if "root" in folder.parts:
            raise OSError(30, "Read-only file system")
        super()._make_folder(folder)


def test_a_read_only_store_is_searched_without_keeping_the_index(
    store: ParquetStore, caplog: pytest.LogCaptureFixture
) -> None:
    found = StoreRoot(ReadOnly(store.files.url)).find("embedding", {"m": 1})
    assert found is not None
    assert len(load_or_build(found).keys) == 356
    assert "not kept" in caplog.text
    assert not Path(store.path, "derived").exists()


def test_works_on_a_remote_store(builds: list[str]) -> None:
    store = StoreRoot("memory://faiss").open("embedding", {"m": 1}, LAYOUT)
    store.append("f0", fragment(0))
    expected = load_or_build(store).search(QUERIES, 3)[1]
    assert load_or_build(store).search(QUERIES, 3)[1].tobytes() == expected.tobytes()
    assert len(builds) == 1


def test_missing_and_double_installations_are_explained(store: ParquetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[cpu\]'"):
            build(store)
    monkeypatch.setattr(
        faiss_index, "version", lambda name: "1" if "cu1" not in name else importlib.metadata.version(name)
    )
    with pytest.raises(ConfigError, match=r"faiss-cpu and faiss-gpu.* are both installed"):
        build(store)
