"""The features of one update: every declared one is brought about, of the rows that a selector looks at.

N training rows, R of them that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dataflex import distributed
from dataflex.access.views import Mixed, StoreView
from dataflex.config.keys import Refresh
from dataflex.errors import CoverageError
from dataflex.features.need import Need, StateName, View
from dataflex.features.spec import FeatureSpec
from dataflex.pipelines.run import Run
from dataflex.pipelines.selecting.kept_texts import Views
from dataflex.pipelines.selecting.pool import Pool
from dataflex.pipelines.selecting.refresh import anchors, first, moved, rest
from dataflex.rows import Rows
from dataflex.schedule import Round
from dataflex.stores.parquet import ParquetStore


@dataclass
class UpdateFeatures:
    """The features of one update, every declared one brought about when it is made. Making it is collective.

    Attributes:
        run: the run.
        round: to be filled.
        pool: the training rows that are looked at.
        needs: what is declared.
        refresh_by: what is computed anew.
    """

    run: Run
    round: Round
    pool: Pool
    needs: Sequence[Need]
    refresh_by: Refresh

    def __post_init__(self) -> None:
        run = self.run
        self.update = run.update_number(self.round)
        self.updated = np.full(len(self.pool.rows), self.update, dtype=np.int32)
        self._views: dict[tuple[FeatureSpec, str | None, StateName], View] = {}
        self._live = [need for need in self.needs if need.state is None]
        last = self._last_updated()
        if last is not None:
            self.updated = np.where(self._first(last), self.update, last).astype(np.int32)
        has_stale = any(need.of == "train" for need in self._live) and bool((self.updated != self.update).any())
        self.waiting = self.refresh_by.policy == "rotating" and has_stale
        groups = [
            ([need for need in self.needs if (need.of, need.state) == (of, state)], name)
            for of, state in dict.fromkeys((need.of, need.state) for need in self.needs)
            for name in (run.targets if of == "targets" else [None])
        ]
        passes = sum(run.access.passes([need.spec for need in needs], self._rows(name)) for needs, name in groups)
        with run.access.progress.showing(passes):
            for needs, name in groups:
                for need, view in zip(needs, self._together(needs, name), strict=True):
                    self._views[need.spec, name, need.state] = view

    def refresh(self, scores: np.ndarray, selected: np.ndarray) -> None:
        """Compute the rest of the share, given scores (R,) by reused values and the rows (k,) selected. Collective."""
        access, head = self.run.access, self.pool.head
        needs = [need for need in self._live if need.of == "train"]
        asked = access.tally.computed + access.tally.reused
        # Rows of the tail are new at every update, and no part of the rotation.
        place = np.full(len(self.updated), -1)
        place[head] = np.arange(len(head))
        kept = place[selected]
        chosen = rest(self.refresh_by, self.updated[head] == self.update, scores[head], kept[kept >= 0])
        self.updated[head[chosen]] = self.update
        with access.progress.showing(access.passes([need.spec for need in needs], self.pool.rows)):
            for need, view in zip(needs, self._together(needs, None), strict=True):
                self._views[need.spec, None, None] = view
        access.tally.reused = asked - access.tally.computed  # each row counts once, as what it was in the end

    def get(
        self, spec: FeatureSpec, target: str | None = None, state: StateName = None, rows: np.ndarray | None = None
    ) -> View:
        """Give a selector a feature, computed now if it was not declared. Collective."""
        asked = (spec, target, state)
        if rows is None and asked in self._views:
            return self._views[asked]
        whole = self._rows(target)
        wanted = whole if rows is None else whole.take(rows)
        (store,) = self.run.access.ensure([spec], wanted, state, among=whole)
        view = self.run.access.view(spec, wanted, store, is_target=target is not None)
        if rows is None:
            self._views[asked] = view
        return view

    @property
    def views(self) -> Views:
        """All features that were asked for so far."""
        return self._views

    @property
    def of_training_rows(self) -> list[tuple[FeatureSpec, View]]:
        """The features of all rows looked at that were asked for so far, each with what it is."""
        return [(spec, view) for (spec, target, _), view in self._views.items() if target is None]

    def _rows(self, target: str | None) -> Rows:
        return self.pool.rows if target is None else self.run.targets[target]

    def _first(self, last: np.ndarray) -> np.ndarray:
        """Say which rows are computed before any is scored, (R,) bool, given the update of each one's last value."""
        fresh, head = last < 0, self.pool.head  # none of those that were not looked at before
        fresh[head] |= first(self.refresh_by, self.update, last[head])
        if self.refresh_by.policy == "rotating":
            fresh[self.pool.tail] = True
        return fresh

    def _together(self, needs: list[Need], name: str | None) -> list[View]:
        """Give several features of the same rows and state, computed in one pass."""
        access, state = self.run.access, needs[0].state
        rows = self._rows(name)
        if state is None and name is not None and self.refresh_by.policy == "static" and self.update > 0:
            access.progress.skip(access.passes([need.spec for need in needs], rows))
            return [access.view(need.spec, rows, self._earlier(0, need), self.update, is_target=True) for need in needs]
        if state is None and name is None and (self.updated != self.update).any():
            return self._joined(needs)
        stores = access.ensure([need.spec for need in needs], rows, state)
        is_target = name is not None
        return [access.view(n.spec, rows, store, is_target=is_target) for n, store in zip(needs, stores, strict=True)]

    def _joined(self, needs: list[Need]) -> list[View]:
        """Give several features of the training rows, each joined from several updates and moved to this one."""
        access, specs = self.run.access, [need.spec for need in needs]
        parts: list[list[tuple[np.ndarray, StoreView]]] = [[] for _ in needs]
        for update in np.unique(self.updated).tolist():
            at = np.flatnonzero(self.updated == update)
            some = self.pool.rows.take(at)
            if update == self.update:
                stores = access.ensure(specs, some, among=self.pool.rows)
            else:
                stores = [self._earlier(update, need) for need in needs]
                access.tally.reused += len(needs) * len(np.unique(some.keys))
                access.progress.skip(access.passes(specs, some))
            for part, spec, store in zip(parts, specs, stores, strict=True):
                part.append((at, access.view(spec, some, store, self.update - update)))
        if self.refresh_by.policy == "rotating":
            self._move(needs, parts)
        return [Mixed.of(part, len(self.pool.rows)) for part in parts]

    def _move(self, needs: list[Need], parts: list[list[tuple[np.ndarray, StoreView]]]) -> None:
        """Move the vectors of earlier updates by what the anchors' have moved."""
        head = self.pool.head
        fixed = self.pool.rows.take(head[anchors(self.refresh_by, len(head))])
        for need, part in zip(needs, parts, strict=True):
            if not need.spec.has_vectors:
                continue
            values = [self.run.access.view(need.spec, fixed, view.store).dense() for _, view in part]
            part[:] = [
                (at, view if view.ages[0] == 0 else replace(view, shift=moved(values[-1], before)))
                for (at, view), before in zip(part, values, strict=True)
            ]

    def _earlier(self, update: int, need: Need) -> ParquetStore:
        """Open the store that an earlier update of this run used."""
        run = self.run
        round = run.updates[update]
        recipe = run.decided(round).info["recipes"][run.live_needs.index(need)]
        store = run.access.root.find(need.spec.kind, recipe)
        if store is None:
            raise CoverageError(
                f"the {need.spec.kind} store of round {round.number} is gone from {run.access.url}; start anew"
            )
        return store

    def _last_updated(self) -> np.ndarray | None:
        """Return the update of each row's last value, (R,), -1 without one; None where all is computed anew."""
        run = self.run
        if self.update == 0 or self.refresh_by.policy == "full" or not self._live:
            return None
        last = run.updates[self.update - 1]
        found = distributed.broadcast(run.journal.read_pool(last.number) if distributed.is_main() else None)
        if found is None:
            raise CoverageError(
                f"refresh policy {self.refresh_by.policy}: round {last.number} recorded no scores of the pool; the "
                "policy needs a selector that returns them (Selection.pool). Use dataflex.refresh.policy: full"
            )
        return self.pool.inside(found[1])
