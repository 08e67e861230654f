"""Feature access: the stores first, the engine for the rest, and everything computed is written back.

Values are always read back from the store, so a run that computes and a run that reuses choose alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataflex import distributed
from dataflex.errors import CoverageError, DataflexError
from dataflex.features.batching import count_batches
from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import EmbeddingSpec, FeatureSpec, GradientSpec, LossSpec
from dataflex.fingerprint import keys_digest
from dataflex.pipelines.progress import Progress
from dataflex.pipelines.state import ModelState
from dataflex.rows import Rows, Status
from dataflex.stores.base import Layout, Values
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot

log = logging.getLogger(__name__)

@dataclass
class Tally:
    """What the accesses of one stage came to: distinct rows, summed over features."""

    computed: int = 0
    reused: int = 0
    tokens: int = 0
    batches: int = 0
    bytes: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A feature of some rows in one store: a `dataflex.selectors.base.View`."""

    store: ParquetStore
    keys: np.ndarray
    status: np.ndarray
    ages: np.ndarray

    def scalar(self, name: str) -> np.ndarray:
        """Return a scalar column, (R,)."""
        return self.store.read(self.keys, columns=[name], vectors=False).scalars[name]

    def blocks(self, size: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (rows, vectors) of usable rows in one pass over the store; identical rows come together."""
        usable = np.flatnonzero(self.status == Status.OK)
        order = usable[np.argsort(self.keys[usable], kind="stable")]
        wanted = self.keys[order]
        for values in self.store.scan(size, columns=[], vectors=True, keys=np.unique(wanted)):
            assert values.vectors is not None
            first = np.searchsorted(wanted, values.keys, side="left")
            count = np.searchsorted(wanted, values.keys, side="right") - first
            source = np.repeat(np.arange(len(values.keys)), count)
            target = np.concatenate([np.arange(f, f + c) for f, c in zip(first, count, strict=True)])
            yield order[target], values.vectors[source]


class FeatureAccess:
    """Computes what is missing and gives views of what is there.

    Args:
        root: the stores.
        state: the live model.
        section: the run file's `dataflex` section (storage, token_budget, fragment_rows, nonfinite_limit, on_missing).
    """

    def __init__(self, root: StoreRoot, state: ModelState, section: Any):
        self.root = root
        self.state = state
        self.section = section
        self.url = root.files.name("")
        self.tally = Tally()

    def open(self, spec: FeatureSpec) -> ParquetStore:
        """Open the store of a feature at the state the model is in. Collective under ZeRO-3."""
        recipe = self.state.recipe(spec, self.section.storage)
        if self.root.find(spec.kind, recipe) is None:
            nearest = self.root.nearest(spec.kind, recipe)
            if nearest is not None:
                _, fields = nearest
                said = f"no {spec.kind} store fits; the nearest differs in {'; '.join(fields)} (store → run)"
            else:
                said = f"no {spec.kind} store under {self.url} yet"
            if self.section.on_missing == "error":
                raise CoverageError(f"{said}. Run `dataflex featurize`, or set dataflex.on_missing: compute")
            if distributed.is_main():
                log.info("%s: computing", said)
        return self.root.open(spec.kind, recipe, self._layout(spec))

    def view(self, rows: Rows, store: ParquetStore, age: int = 0) -> Snapshot:
        """Return a view of rows that the store has.

        Raises:
            CoverageError: some are missing.
        """
        status = store.read(rows.keys, columns=[], vectors=False).status
        return Snapshot(store, rows.keys, status, np.full(len(rows), age, dtype=np.int32))

    def ensure(self, specs: Sequence[FeatureSpec], rows: Rows, checkpoint: str | None = None) -> list[ParquetStore]:
        """Compute whatever is missing of several features of the same rows, in one pass; return their stores. Collective.

        Raises:
            CoverageError: rows are missing and `on_missing` is `error`.
            DataflexError: more rows than `nonfinite_limit` allows have non-finite values.
        """
        begun = time.monotonic()
        with self.state.at(checkpoint):
            stores = [self.open(spec) for spec in specs]
            unique, first = np.unique(rows.keys, return_index=True)
            absent = np.stack([~store.contains(unique) for store in stores])
            absent = distributed.broadcast(absent)
            self.tally.reused += int((~absent).sum())
            if absent.any() and self.section.on_missing == "error":
                raise CoverageError(
                    f"features of {int(absent.any(axis=0).sum())} rows are missing under {self.url}; run `dataflex "
                    "featurize` with this run file, or set dataflex.on_missing: compute"
                )
            patterns = {tuple(column) for column in absent.T if column.any()}
            for pattern in sorted(patterns):
                wanted = np.flatnonzero((absent.T == pattern).all(axis=1))
                chosen = [i for i, missing in enumerate(pattern) if missing]
                self._compute([specs[i] for i in chosen], [stores[i] for i in chosen], rows, unique[wanted], first[wanted])
        distributed.barrier()
        self.tally.seconds += time.monotonic() - begun
        return stores

    def _compute(
        self, specs: list[FeatureSpec], stores: list[ParquetStore], rows: Rows, keys: np.ndarray, at: np.ndarray
    ) -> None:
        """Compute rows `at` (distinct `keys`, sorted) in fragments dealt to the ranks, committing each as it is done."""
        engine = self._engine(specs)
        world, rank = distributed.world(), distributed.rank()
        size = min(self.section.fragment_rows, max(64, -(-len(at) // (4 * world))))
        pieces = [slice(start, start + size) for start in range(0, len(at), size)]
        waves = -(-len(pieces) // world)
        kinds = "+".join(spec.kind for spec in specs)
        with Progress(f"computing {kinds}", len(at), int(rows.length[at].sum())) as progress:
            for wave in range(waves):
                mine = pieces[wave * world : (wave + 1) * world]
                # Under ZeRO-3 every rank takes part in every layer, so all run the same number of batches.
                batches = max(count_batches(rows.length[at[p]], self.section.token_budget) for p in mine) if self.state.is_zero3 else 0
                piece = mine[rank] if rank < len(mine) else None
                if piece is None and not batches:
                    continue
                self._fragment(engine, specs, stores, rows, keys, at, piece, batches)
                if piece is not None:
                    progress.advance(len(at[piece]), int(rows.length[at[piece]].sum()))

    def _fragment(
        self,
        engine: FeatureEngine,
        specs: list[FeatureSpec],
        stores: list[ParquetStore],
        rows: Rows,
        keys: np.ndarray,
        at: np.ndarray,
        piece: slice | None,
        batches: int,
    ) -> None:
        fragment = keys_digest(keys[piece]) if piece is not None else ""
        if piece is not None and not batches and all(fragment in store.committed_fragments() for store in stores):
            self.tally.reused += len(at[piece]) * len(specs)  # another writer was faster
            return
        examples = [rows.examples[int(row)] for row in at[piece]] if piece is not None else []
        found = engine.compute(examples, specs, min_batches=batches)
        self.tally.batches += max(batches, count_batches(rows.length[at[piece]] if piece is not None else [], self.section.token_budget))
        if piece is None:
            return
        for store, values in zip(stores, found, strict=True):
            kept = Values(keys[piece], values.status, values.scalars, values.vectors)
            store.append(fragment, kept)
            self.tally.bytes += len(kept) * _row_bytes(store.layout)
            self._count(values.status, len(keys))
        self.tally.computed += len(at[piece]) * len(specs)
        self.tally.tokens += int(rows.length[at[piece]].sum())

    def _count(self, status: np.ndarray, total: int) -> None:
        """Count unusable rows, and stop where too many are not finite."""
        for state in (Status.NO_LABELS, Status.NONFINITE):
            if count := int((status == state).sum()):
                self.tally.skipped[state.name.lower()] = self.tally.skipped.get(state.name.lower(), 0) + count
        bad = self.tally.skipped.get("nonfinite", 0)
        if bad > self.section.nonfinite_limit * max(total, 1):
            raise DataflexError(
                f"{bad} of {total} rows gave NaN or infinity; dataflex.nonfinite_limit allows a share of "
                f"{self.section.nonfinite_limit}. Check the learning rate, the dtype (bf16 rather than fp16) and the data."
            )

    def _engine(self, specs: Sequence[FeatureSpec]) -> FeatureEngine:
        trainer = self.state.trainer
        adam = any(isinstance(spec, GradientSpec) and spec.direction == "adam" for spec in specs)
        return FeatureEngine(
            trainer.model,
            pad_token_id=trainer.processing_class.pad_token_id or 0,
            token_budget=self.section.token_budget,
            autocast=trainer.accelerator.autocast,
            moments=self.state.moments() if adam else None,
        )

    def _layout(self, spec: FeatureSpec) -> Layout:
        if isinstance(spec, LossSpec):
            return Layout({"loss_sum": "float64", "tokens": "int32"}, 0, self.section.storage)
        if isinstance(spec, EmbeddingSpec):
            return Layout({"norm": "float32"}, self.state.trainer.model.config.hidden_size, self.section.storage)
        width = spec.projection.dim
        if spec.projection.type == "identity":
            width = sum(p.numel() for _, p in self.state.trainable())
        return Layout({"norm": "float32"}, width, self.section.storage)


def _row_bytes(layout: Layout) -> int:
    """Return the bytes of one stored row: key, status, scalars, vector."""
    scalars = sum(np.dtype(kind).itemsize for kind in layout.scalars.values())
    return 17 + scalars + layout.width * np.dtype(layout.storage).itemsize
