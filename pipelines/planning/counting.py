"""How much of what a run asks is there, and what the rest costs, counted as `FeatureAccess.ensure` will count it.

R distinct rows of an ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex.access.fragments import cells_of, row_bytes
from dataflex.access.grid import Grid
from dataflex.features.batching import count_batches
from dataflex.features.spec import BASE, FeatureSpec, PolicyGradientSpec
from dataflex.pipelines.planning.asks import Ask
from dataflex.pipelines.planning.naming import Naming
from dataflex.pipelines.planning.needs import Count, Need, Pass, joined
from dataflex.rows import Rows
from dataflex.stores.foreseen import FileSizes, recipe_bytes
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.root import folder_name
from dataflex.stores.values import Layout


@dataclass
class _Work:
    """As `Pass`, before it is scaled, and the bytes of the files of each feature."""

    sizes: dict[FeatureSpec, int]
    rows: int = 0
    backward: int = 0
    tokens: int = 0
    batches: int = 0
    responses: int = 0


class Counting:
    """Counts asks in order: what one brings about, the next finds.

    Args:
        naming: names features.
        factors: set of rows -> rows that each row looked at stands for; 1 where all are looked at.
        rows: that stand for the training rows; default: these themselves.
    """

    def __init__(self, naming: Naming, factors: Mapping[str | None, float], rows: Rows | None = None):
        self._naming, self._run, self._factors = naming, naming.run, factors
        self._rows = naming.run.rows if rows is None else rows
        self._options = naming.run.settings.dataflex
        self._made: dict[str, list[np.ndarray]] = {}
        self._stores: dict[str, ParquetStore | None] = {}
        self._layouts: dict[FeatureSpec, tuple[Layout, FileSizes]] = {}
        self._keys: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = {}
        self._whole: dict[tuple[Any, ...], _Work] = {}
        self._passing: tuple[int, set[str]] = -1, set()

    def count(self, asks: Iterable[Ask]) -> Count:
        """Return what asks come to, on top of those counted before."""
        found = Count()
        for ask in asks:
            rows = self._rows if ask.target is None else self._run.targets[ask.target]
            for specs in self._run.access.together(ask.specs):
                self._add(found, ask, specs, rows)
        found.needs = joined(found.needs)
        return found

    def _add(self, found: Count, ask: Ask, specs: list[FeatureSpec], rows: Rows) -> None:
        """Count the features of an ask that are computed in one pass."""
        unique, first = self._distinct(ask, specs[0], rows)
        names = [self._name(ask, spec) for spec in specs]
        if ask.kept is not None:
            kept = self._kept(ask, dict(zip(names, specs, strict=True)), unique, rows)
            unique, first = unique[kept], first[kept]
        if ask.fresh == "none":
            absent = np.zeros((len(specs), len(unique)), bool)
        else:
            absent = np.stack([~self._has(name, spec, ask, unique) for name, spec in zip(names, specs, strict=True)])
        if ask.fresh == "some":
            absent &= self._some(ask, unique, rows)
        factor = self._factors.get(ask.target, 1.0)
        work = self._work(ask, tuple(specs), rows, unique, first, absent)
        one = Pass(tuple(specs), ask.target or "train", None if ask.update is None else ask.update + 1)
        for number in ("rows", "backward", "tokens", "batches", "responses"):
            setattr(one, number, round(getattr(work, number) * factor))
        found.passes += [one] if one.rows else []
        for spec, name, lacks in zip(specs, names, absent, strict=True):
            need = self._need(ask, spec, name, unique, lacks, work.sizes[spec], factor)
            found.needs.append(need)
            found.computed, found.reused = found.computed + need.missing, found.reused + need.present
            found.bytes, found.files = found.bytes + need.bytes, found.files + need.files
        found.gradients, found.tokens = found.gradients + one.backward, found.tokens + one.tokens
        found.batches += one.batches

    def _some(self, ask: Ask, unique: np.ndarray, rows: Rows) -> np.ndarray:
        """Say which keys are refreshed, (R,) bool: those of a run that was alike; else any, as scores decide."""
        updated = self._naming.refreshed(ask.update)
        if updated is not None:
            return np.isin(unique, rows.keys[updated == ask.update])
        return np.arange(len(unique)) < round(ask.count * len(unique) / (ask.kept or len(rows)))

    def _kept(self, ask: Ask, names: Mapping[str, FeatureSpec], unique: np.ndarray, rows: Rows) -> np.ndarray:
        """Return the keys that a prefilter lets through: those of a run that was alike; else any, as scores decide.

        Those that are there come first, since a run of before, or featurize, has computed just these.
        """
        updated = self._naming.refreshed(ask.update)
        if updated is not None:
            return np.flatnonzero(np.isin(unique, rows.keys[updated >= 0]))
        is_there = np.any([self._has(name, spec, ask, unique) for name, spec in names.items()], axis=0)
        able = np.flatnonzero(np.isin(unique, rows.keys[rows.supervised > 0]))
        return np.sort(able[np.argsort(~is_there[able], kind="stable")][: ask.kept])

    def _work(
        self,
        ask: Ask,
        specs: tuple[FeatureSpec, ...],
        rows: Rows,
        unique: np.ndarray,
        first: np.ndarray,
        absent: np.ndarray,
    ) -> _Work:
        """Return what computing features costs, cell by cell, where rows (S, R) are absent from their stores."""
        is_whole = bool(absent.all())
        named = ask.target, specs, ask.kept
        if is_whole and named in self._whole:
            return self._whole[named]
        found = _Work(dict.fromkeys(specs, 0))
        grid = Grid(unique, self._options.fragment_rows)
        nothing: Any = dict.fromkeys(specs)
        for cell in cells_of(grid, unique, first, nothing, absent) if absent.any() else ():
            lengths, count = rows.length[cell.at], len(cell.at)
            # Each excerpt is read in a forward pass of its own, the other features share one.
            ways = sum(spec.is_of_excerpt for spec in cell.specs) + any(not s.is_of_excerpt for s in cell.specs)
            found.rows += count * ways
            found.backward += count * any(spec.gradient is not None for spec in cell.specs)
            found.tokens += int(lengths.sum())
            found.batches += count_batches(lengths, self._options.token_budget)
            found.responses += count * sum(s.mc_samples for s in cell.specs if isinstance(s, PolicyGradientSpec))
            for spec in cell.specs:
                found.sizes[spec] += self._sizes(spec)[1].fragment(count)
        if is_whole:  # as it will be at every update
            self._whole[named] = found
        return found

    def _distinct(self, ask: Ask, spec: FeatureSpec, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct keys of rows, (R,), and the first row of each."""
        by = ask.target, spec.encoder, bool(spec.rewards)
        if by not in self._keys:
            self._keys[by] = np.unique(self._run.access.keys(spec, rows), return_index=True)
        return self._keys[by]

    def _need(
        self, ask: Ask, spec: FeatureSpec, name: str, keys: np.ndarray, lacks: np.ndarray, size: int, factor: float
    ) -> Need:
        """Return an ask for one feature, and take note that its rows are there from now on."""
        layout, missing = self._sizes(spec)[0], round(int(lacks.sum()) * factor)
        recipe = self._naming.recipe(ask, spec)
        if lacks.any() and name not in self._made and (recipe is None or self._stores.get(name) is None):
            document = recipe if recipe is not None else self._naming.like(ask, spec)
            size = round(size * factor) + recipe_bytes(spec.kind, document, layout)
        else:
            size = round(size * factor)
        if lacks.any():
            self._made.setdefault(name, []).append(keys[lacks])
        rows = round(len(keys) * factor)
        return Need(
            feature=spec.describe(),
            spec=spec.recipe(),
            of=ask.target or "train",
            state=_state(ask),
            store=None if recipe is None else name,
            update=[] if ask.update is None else [ask.update + 1],
            rows=rows,
            present=rows - missing,
            missing=missing,
            bytes=missing * row_bytes(layout),
            files=size,
        )

    def _name(self, ask: Ask, spec: FeatureSpec) -> str:
        """Name the store of a feature; one that nobody can name yet by the step that its state is behind."""
        recipe = self._naming.recipe(ask, spec)
        if recipe is not None:
            return folder_name(spec.kind, recipe)
        name = f"{spec!r} behind step {ask.step}"
        if ask.step != self._passing[0]:  # no later step asks for what an earlier one left without a name
            for passed in self._passing[1]:
                self._made.pop(passed, None)
            self._passing = ask.step, set()
        self._passing[1].add(name)
        return name

    def _has(self, name: str, spec: FeatureSpec, ask: Ask, keys: np.ndarray) -> np.ndarray:
        """Say which keys a store has, or will have by then, (R,) bool."""
        if name not in self._stores:
            recipe = self._naming.recipe(ask, spec)
            self._stores[name] = None if recipe is None else self._run.access.root.find(spec.kind, recipe)
        store = self._stores[name]
        found = np.zeros(len(keys), bool) if store is None else store.contains(keys)
        for made in self._made.get(name, ()):
            found |= np.isin(keys, made)
        return found

    def _sizes(self, spec: FeatureSpec) -> tuple[Layout, FileSizes]:
        if spec not in self._layouts:
            layout = self._naming.layout(spec)
            self._layouts[spec] = layout, FileSizes(layout)
        return self._layouts[spec]


def _state(ask: Ask) -> str:
    if ask.state is not None:
        return "base" if ask.state == BASE else ask.state
    return "live" if ask.step else "initial"
