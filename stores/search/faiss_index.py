"""Nearest neighbours by FAISS over a store's vectors. R usable rows, D numbers each, M queries, k neighbours."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np

from dataflex.errors import ConfigError, CoverageError, DataflexError, MismatchError
from dataflex.rows import KEY_DTYPE, Status
from dataflex.stores.parquet import ParquetStore

Metric = Literal["cosine", "ip", "l2"]
Kind = Literal["auto", "flat", "ivf"]
IVF_ROWS = 1_000_000
"""Usable rows from which `auto` takes an inverted file instead of exact search."""
HELD_BYTES = 1 << 28
"""Vectors that an index may hold on every rank; a larger store is streamed, which is no slower."""
_DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
_GPU_MOST = 2048  # neighbours that FAISS can return from a GPU
_TRAIN_PER_LIST = 64  # rows per list that k-means sees; FAISS warns below 39 and subsamples above 256


@dataclass
class FaissIndex:
    """An index in memory; got from `build` or from `dataflex.stores.search.faiss_cache.load_or_build`.

    Attributes:
        index: the FAISS index, on the CPU; if FAISS sees a GPU, a copy there answers searches over all rows.
        keys: (R,) row keys of its vectors.
        metric: what it was built for.
        kind: `flat` is exact, `ivf` is not.
    """

    index: Any
    keys: np.ndarray
    metric: Metric
    kind: Literal["flat", "ivf"]

    def __post_init__(self) -> None:
        faiss = load_faiss()
        self._gpu: Any = None
        if getattr(faiss, "get_num_gpus", lambda: 0)() > 0:
            self._resources = faiss.StandardGpuResources()  # must live as long as the copy
            self._gpu = faiss.index_cpu_to_gpu(self._resources, 0, self.index)

    def search(self, queries: np.ndarray, k: int, within: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (M, k) float32 and row keys (M, k), best first.

        Scores are inner products, larger is better, or squared distances under `l2`, smaller is better. Under `cosine`
        queries need not be unit. Lists of an inverted file that hold too few rows are widened to all of them.

        Args:
            queries: (M, D).
            k: neighbours wanted.
            within: (R,) bool, which of `keys` to stay within; all by default, and then a GPU is used if there is one.

        Raises:
            CoverageError: fewer than k rows are indexed.
            MismatchError: the queries do not fit the index.
        """
        faiss = load_faiss()
        if queries.ndim != 2 or queries.shape[1] != self.index.d or not np.isfinite(queries).all():
            raise MismatchError(f"queries are {list(queries.shape)}, expected finite (M, {self.index.d})")
        size = len(self.keys) if within is None else int(within.sum())
        if not 1 <= k <= size:
            raise CoverageError(f"{k} neighbours wanted, {size} rows are indexed")
        vectors = _prepared(queries, self.metric)
        searched, options, params = self.index, {}, None
        if within is not None:
            bits = np.packbits(within, bitorder="little")  # must live as long as the selector
            options = {"sel": faiss.IDSelectorBitmap(bits)}
            params = faiss.SearchParameters(**options)
            if self.kind == "ivf":
                params = faiss.SearchParametersIVF(nprobe=self.index.nprobe, **options)
        elif self._gpu is not None and k <= _GPU_MOST:
            searched = self._gpu
        scores, ids = searched.search(vectors, k, params=params)
        short = (ids < 0).any(axis=1)
        if short.any() and self.kind == "ivf":
            # FAISS fills up with -1 where the lists probed hold fewer than k rows.
            everywhere = faiss.SearchParametersIVF(nprobe=self.index.nlist, **options)
            scores[short], ids[short] = self.index.search(vectors[short], k, params=everywhere)
        if (ids < 0).any():
            raise DataflexError(f"FAISS found fewer than {k} neighbours among {size}: scores are not finite")
        return scores, self.keys[ids]


def build(store: ParquetStore, metric: Metric = "cosine", kind: Kind = "auto", block_rows: int = 4096) -> FaissIndex:
    """Index the vectors of all rows whose status is OK.

    Args:
        store: a store with vectors.
        metric: inner product, of unit vectors for `cosine`, or squared Euclidean distance.
        kind: `flat` is exact; `ivf` searches the nearest 1/16 of about 4 sqrt(R) lists; `auto`: see `IVF_ROWS`.
        block_rows: rows read at a time.

    Raises:
        ConfigError: FAISS is not installed, or installed twice.
        CoverageError: the store has no usable row.
    """
    faiss = load_faiss()
    if metric not in ("cosine", "ip", "l2") or kind not in ("auto", "flat", "ivf"):
        raise ConfigError(f"no FAISS index of metric {metric!r} and kind {kind!r}: cosine, ip or l2; auto, flat or ivf")
    if not store.layout.width:
        raise MismatchError(f"{store.path} has no vectors to index")
    usable = [block.keys[block.status == Status.OK] for block in store.scan(1 << 16, columns=[], vectors=False)]
    # Sorted, so that the sample below does not depend on how the rows fell into fragments.
    keys = np.sort(np.concatenate([np.empty(0, KEY_DTYPE), *usable]).view("S16")).view(KEY_DTYPE)
    if not len(keys):
        raise CoverageError(f"{store.path} has no usable row to index")
    chosen: Literal["flat", "ivf"] = "ivf" if kind == "ivf" or (kind == "auto" and len(keys) >= IVF_ROWS) else "flat"
    measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    if chosen == "flat":
        index = faiss.IndexFlat(store.layout.width, measure)
    else:
        lists = max(1, min(int(4 * len(keys) ** 0.5), len(keys) // _TRAIN_PER_LIST))
        quantizer = faiss.IndexFlat(store.layout.width, measure)
        index = faiss.IndexIVFFlat(quantizer, store.layout.width, lists, measure)
        index.nprobe = max(1, lists // 16)
        sample = keys[np.sort(np.random.default_rng(0).permutation(len(keys))[: lists * _TRAIN_PER_LIST])]
        vectors = store.read(sample, columns=[]).vectors
        assert vectors is not None
        index.train(_prepared(vectors, metric))
    order = []
    for block in store.scan(block_rows, columns=[], keys=keys):
        assert block.vectors is not None
        index.add(_prepared(block.vectors, metric))
        order.append(block.keys)
    return FaissIndex(index, np.concatenate(order), metric, chosen)


def _prepared(vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """Return vectors as FAISS takes them: contiguous float32, of unit length for `cosine`; zero stays zero."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if metric != "cosine":
        return vectors
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return unit


def kind_for(store: ParquetStore, rows: int, approximate_above: int = sys.maxsize) -> Literal["flat", "ivf"] | None:
    """Return the kind of index that a search among some usable rows uses; None: none, it streams the store.

    Args:
        store: what would be indexed, whole.
        rows: how many of its rows are searched.
        approximate_above: how many are searched by an inverted file, however large it is.
    """
    if rows >= approximate_above:
        return "ivf"
    return "flat" if 4 * store.rows * store.layout.width <= HELD_BYTES else None


def load_faiss() -> Any:
    """Import FAISS, or say how to get it."""
    both = [name for name in _DISTRIBUTIONS if _is_installed(name)]
    if len(both) > 1:
        raise ConfigError(
            f"{' and '.join(both)} are both installed and overwrite each other's files: "
            f"`pip uninstall {' '.join(both)}`, then install one: "
            "`pip install -e '.[cpu]'` or `pip install -e '.[gpu]'`"
        )
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"FAISS is needed but cannot be imported ({error}): `pip install -e '.[cpu]'`, or "
            "`pip install -e '.[gpu]'` on a machine with an NVIDIA GPU"
        ) from error
    return faiss


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
