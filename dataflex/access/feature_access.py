"""Feature access: the stores first, a source for the rest, and everything computed is written back.

Values are always read back from the store, so a run that computes and a run that reuses choose alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from dataflex import distributed, stop
from dataflex.access.fragments import NonfiniteLimit, Tally, Work, cells_of
from dataflex.access.grid import Grid
from dataflex.access.policy_source import PolicySource
from dataflex.access.progress import Progress
from dataflex.access.sources import EncoderSource, ModelSource, Source, Wanted
from dataflex.access.speed import pass_of
from dataflex.access.views import StoreView
from dataflex.config.keys import DataflexKeys
from dataflex.errors import CoverageError, DataflexError
from dataflex.features.need import StateName
from dataflex.features.spec import ENGINE_VERSION, FeatureSpec, PolicyGradientSpec
from dataflex.fingerprint import keys_digest
from dataflex.live.state import ModelState
from dataflex.rows import Rows, Status
from dataflex.stores.engine_version import older
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import StoreRoot, folder_name
from dataflex.stores.runs import Kind, RunRecord
from dataflex.stores.values import Layout

log = logging.getLogger(__name__)


class FeatureAccess:
    """Computes what is missing and gives views of what is there.

    Args:
        root: the stores.
        state: the live model.
        options: the run file's `dataflex` mapping.
        record: where it is written down what the run uses.
        cutoff_len: tokens of a row, at most.
    """

    def __init__(self, root: StoreRoot, state: ModelState, options: DataflexKeys, record: RunRecord, cutoff_len: int):
        self.root = root
        self.record = record
        self.url = root.files.name("")
        self.tally = Tally()
        self.progress = Progress()
        self.speeds: list[dict[str, Any]] = []
        """What the passes so far took this process (`dataflex.access.speed`)."""
        self._state = state
        self._options = options
        self._model = ModelSource(state, options.token_budget, cutoff_len)
        self._model.on_batch = self.progress.batch
        self._encoders: dict[str, EncoderSource] = {}
        self._policy_source: PolicySource | None = None
        self._has_loss = False
        self._has_looked_back = False
        self._complete_at: dict[tuple[Any, ...], list[ParquetStore]] = {}

    def reach(self, must_write: bool) -> None:
        """Refuse stores that a later step could not read or write. Collective.

        Args:
            must_write: whether the run is bound to compute features, whatever the stores have.

        Raises:
            DataflexError: they cannot be read; or cannot be written to, and features have to be computed.
        """
        with distributed.together():
            is_empty = not self.root.files.names("")
            if distributed.is_main() and self._options.on_missing == "compute" and (must_write or is_empty):
                self.record.begin()

    def recipe(self, spec: FeatureSpec) -> dict[str, Any]:
        """Return the recipe of a feature at the state the model is in. Collective under ZeRO-3."""
        return {**self._source(spec).recipe(spec), "storage": spec.stored_as(self._options.storage)}

    def width(self, spec: FeatureSpec) -> int:
        """Return the numbers of a feature's vector; 0 for a feature without."""
        return self._source(spec).width(spec)

    def require(self, wanted: Sequence[Wanted]) -> None:
        """Refuse, before the first step, features of these rows that could not be computed. Collective.

        Raises:
            DataflexError: they could not.
        """
        # A policy gradient obeys the rules of the gradient that it is made by.
        wanted = [
            *wanted,
            *((cast(FeatureSpec, spec.gradient), rows) for spec, rows in wanted if spec.gradient not in (None, spec)),
        ]
        for source in dict.fromkeys(self._source(spec) for spec, _ in wanted):
            source.require([(spec, rows) for spec, rows in wanted if self._source(spec) is source])

    def view(
        self, spec: FeatureSpec, rows: Rows, store: ParquetStore, age: int = 0, is_target: bool = False
    ) -> StoreView:
        """Return a view of rows that a store has; training rows without labels are not usable."""
        self.note("store", store.folder)
        return StoreView.of(store, self._source(spec).keys(rows), age, None if is_target else rows.supervised)

    def note(self, kind: Kind, name: str) -> None:
        """Record, before a store or kept state is opened, that the run uses it: `store gc` leaves it alone then."""
        if distributed.is_main():
            self.record.uses(kind, name)

    def keys(self, spec: FeatureSpec, rows: Rows) -> np.ndarray:
        """Return the key under which a store has the feature of each row, (R,)."""
        return self._source(spec).keys(rows)

    def together(self, specs: Sequence[FeatureSpec]) -> list[list[FeatureSpec]]:
        """Part features into those that `ensure` computes in one pass."""
        found: dict[int, list[FeatureSpec]] = {}
        for spec in dict.fromkeys(specs):
            found.setdefault(id(self._source(spec)), []).append(spec)
        return list(found.values())

    def passes(self, specs: Sequence[FeatureSpec], rows: Rows) -> int:
        """Return the rows that `ensure` goes through: every one once for each source."""
        return len(rows) * len({self._source(spec) for spec in specs})

    def require_rewards(self, spec: PolicyGradientSpec, rows: Rows) -> None:
        """Refuse, before the first step, responses that could not be written or judged. Collective.

        Raises:
            DataflexError: they could not.
        """
        self._source(spec).require([(spec, rows)])

    def rewards(self, spec: PolicyGradientSpec, rows: Rows) -> np.ndarray:
        """Return what the live model's responses to each row's prompt are worth, (N,) float64. Collective.

        Raises:
            UnavailableError: what writes or judges does not answer; what it has answered is kept.
        """
        source = self._source(spec)
        assert isinstance(source, PolicySource)
        mine, found = np.arange(distributed.rank(), len(rows), distributed.world()), np.full(len(rows), np.nan)
        scores = np.empty(0)
        with stop.held(), distributed.together():
            scores = source.rewards(rows, mine, spec)
        for rank, some in enumerate(distributed.gather(scores)):
            found[rank :: distributed.world()] = some
        return found

    def ensure(
        self,
        specs: Sequence[FeatureSpec],
        rows: Rows,
        state: StateName = None,
        among: Rows | None = None,
        nonfinite_limit: float | None = None,
    ) -> list[ParquetStore]:
        """Compute whatever is missing of several features of the same rows; return their stores. Collective.

        Features of one source that are missing for the same rows are computed in one pass.

        Args:
            specs: the features.
            rows: the rows.
            state: of the model.
            among: the dataset that the rows are some of, which the grid and the share that may be NaN or infinite are
                of; default: `rows`.
            nonfinite_limit: the share that may be so; default: the run file's.

        Raises:
            CoverageError: rows are missing and `on_missing` is `error`.
            DataflexError: more rows than `nonfinite_limit` allows are not finite.
            Interrupted: a signal asked for it, on whichever rank; what is committed stays.
        """
        begun = time.monotonic()
        asked = (tuple(specs), keys_digest(rows.keys), state)
        if asked in self._complete_at:  # a checkpoint does not change, so it need not be loaded again
            self.tally.reused += len(specs) * len(np.unique(rows.keys))
            self.progress.skip(self.passes(specs, rows))
            return self._complete_at[asked]
        share = self._options.nonfinite_limit if nonfinite_limit is None else nonfinite_limit
        limit = NonfiniteLimit(share, len(np.unique((among or rows).keys)))
        with stop.held(), self._state.at(state), self.progress.showing(self.passes(specs, rows)):
            stores = {spec: self._open(spec) for spec in specs}
            for source in dict.fromkeys(self._source(spec) for spec in specs):
                asked_here = {spec: store for spec, store in stores.items() if self._source(spec) is source}
                self._complete(source, asked_here, rows, among or rows, limit)
            self._judge_loss(rows, state)
            self._compact(list(stores.values()))
        if stop.is_asked_anywhere():  # as long as this takes, everyone's fragments are committed behind it
            stop.leave(together=True)
        for spec, store in stores.items():
            keys = np.unique(self._source(spec).keys(rows))
            limit.hold(int((store.read(keys, columns=[], vectors=False).status == Status.NONFINITE).sum()))
        self.tally.seconds += time.monotonic() - begun
        found = [stores[spec] for spec in specs]
        if state is not None:
            self._complete_at[asked] = found
        return found

    def _compact(self, stores: Sequence[ParquetStore]) -> None:
        """Have rank 0 read what all have committed, and put it into one file for the others. Collective."""
        done: list[bool] = []
        with distributed.together():
            if distributed.is_main() and self._options.on_missing == "compute":
                done = [store.compact() for store in stores]
        for store, is_anew in zip(stores, distributed.broadcast(done), strict=False):
            if is_anew and not distributed.is_main():
                store.look_anew()

    def _complete(
        self, source: Source, stores: dict[FeatureSpec, ParquetStore], rows: Rows, among: Rows, limit: NonfiniteLimit
    ) -> None:
        """Compute what one source's features lack."""
        specs = list(stores)
        unique, first = np.unique(source.keys(rows), return_index=True)
        absent = distributed.broadcast(np.stack([~stores[spec].contains(unique) for spec in specs]))
        self.tally.reused += int((~absent).sum())
        self.progress.skip(len(rows) - int(absent.any(axis=0).sum()))
        if absent.any() and self._options.on_missing == "error":
            raise CoverageError(
                f"features of {int(absent.any(axis=0).sum())} rows are missing under {self.url}; run "
                "`dataflex featurize` with this run file, or set dataflex.on_missing: compute"
            )
        if not absent.any():
            return
        grid = Grid(unique if among is rows else np.unique(source.keys(among)), self._options.fragment_rows)
        cells = cells_of(grid, unique, first, stores, absent)
        work = Work(source, rows, cells, self._options.token_budget, limit, self._options.leases)
        begun, before = time.monotonic(), self.tally.tokens
        if source.is_collective:  # ranks meet in every layer: where one fails, the launcher has to end the others
            work.run(self.tally, self.progress)
        else:
            with distributed.together():
                try:
                    work.run(self.tally, self.progress)
                except DataflexError:
                    stop.announce()  # the others need not go through all of their share first
                    raise
        took = {"tokens": self.tally.tokens - before, "seconds": round(time.monotonic() - begun, 4)}
        if distributed.is_main() and took["tokens"]:
            self.speeds.append({"of": pass_of(self._state, specs), **took})

    def _judge_loss(self, rows: Rows, state: StateName) -> None:
        """Have the mean loss of a pass looked at. Collective.

        A pass for embeddings alone takes none: once in a run, and if it is the first, some rows are read for it.
        """
        passes = distributed.gather(self._model.measured())
        if not any(ran for ran, _ in passes):
            return
        total, tokens = (float(number) for number in np.sum([measured for _, measured in passes], axis=0))
        if not tokens and not self._has_loss:
            total, tokens = self._model.measure(rows)
        self._has_loss = True
        if tokens:
            by = "" if state is None else f" by {state}"
            self._state.trainer.judge_loss(total / tokens, f"the features' pass over {len(rows)} rows{by}")

    def _open(self, spec: FeatureSpec) -> ParquetStore:
        """Open the store of a feature, saying what keeps the nearest from being used where there is none."""
        recipe = self.recipe(spec)
        self.note("store", folder_name(spec.kind, recipe))
        if self.root.find(spec.kind, recipe) is None:
            self._say_what_is_older()
            nearest = self.root.nearest(spec.kind, recipe)
            said = f"no {spec.kind} store under {self.url} yet"
            if nearest is not None:
                said = f"no {spec.kind} store fits; the nearest differs in {'; '.join(nearest[1])} (store → run)"
            if self._options.on_missing == "error":
                raise CoverageError(f"{said}. Run `dataflex featurize`, or set dataflex.on_missing: compute")
            if distributed.is_main():
                log.info("%s: computing", said)
        layout = Layout(dict(spec.scalars), self._source(spec).width(spec), spec.stored_as(self._options.storage))
        return self.root.open(spec.kind, recipe, layout)

    def _say_what_is_older(self) -> None:
        """Say once, where something has to be computed, that values of an older engine are there and not used."""
        if self._has_looked_back or not distributed.is_main():
            return
        self._has_looked_back = True
        if found := older(self.root.files, ENGINE_VERSION):
            said = (
                "%d stores and kept states under %s are of an older engine than this one (%d) and are not reused; "
                "`dataflex store gc --older-engine` names them"
            )
            log.info(said, len(found), self.url, ENGINE_VERSION)

    def _source(self, spec: FeatureSpec) -> Source:
        """Return what computes a feature."""
        if spec.rewards:
            if self._policy_source is None:
                note = partial(self.note, "store")
                self._policy_source = PolicySource(self._model, self._state, self.root, self._options, note)
            return self._policy_source
        name = spec.encoder
        if name is None:
            return self._model
        if name not in self._encoders:
            self._encoders[name] = EncoderSource(name, self._state, self._options.token_budget)
            self._encoders[name].on_batch = self.progress.batch
        return self._encoders[name]
