"""The names that features of a run will have, as far as they are known before it: those of its stores."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from dataflex.errors import DataflexError
from dataflex.features.spec import FeatureSpec
from dataflex.live.known import KnownState, Names
from dataflex.pipelines.planning.asks import Ask
from dataflex.pipelines.run import Run
from dataflex.pipelines.selecting.warmup import NAMES, WarmState
from dataflex.stores.values import Layout

log = logging.getLogger(__name__)

_UNKNOWN: Names = {"acting": {"weights": "0" * 32}, "weights": {"weights": "0" * 32}, "adam": "0" * 32}
"""As long as the names of a state that nobody knows yet."""


class Naming:
    """Names features by what is known: the model before its first step, kept states, and the run's own journal.

    Args:
        run: the run, over what is known of its model.
        state: the same object as the run's.
        warm: finds the kept state at the end of its warm-up; None: there is none, or it cannot be looked for.
    """

    def __init__(self, run: Run, state: KnownState, warm: WarmState | None):
        self.run, self._state = run, state
        self.warm_step = run.rounds[0].steps if run.rounds and run.rounds[0].kind == "warmup" else 0
        found = warm.find() if warm is not None and warm.lineage is not None else None
        self.lineage = found[0] if found is not None else warm.lineage if warm is not None else None
        self.is_kept = found is not None
        self._kept: Names | None = found[1].get(NAMES) if found is not None else None
        self.journal = self._journal()
        """Number of an update -> the recipes that a run of this identity had there, for each of its live needs."""

    @property
    def is_nameless(self) -> bool:
        """Whether the kept state's record is of an older DataFlex, which did not note what its features are called."""
        return self.is_kept and self._kept is None

    def recipe(self, ask: Ask, spec: FeatureSpec) -> Mapping[str, Any] | None:
        """Return the recipe of a feature that is asked for, None where it depends on a state that nobody knows yet."""
        if ask.state is not None:
            with self._state.at(ask.state):
                return self.run.access.recipe(spec)
        if spec.encoder is not None or ask.step == 0:
            return self.run.access.recipe(spec)
        if (
            ask.step == self.warm_step
            and self._kept is not None
            and not (spec.needs_moments and "adam" not in self._kept)
        ):
            with self._state.named(self._kept):
                return self.run.access.recipe(spec)
        recorded = self.journal.get(ask.update) if ask.update is not None else None
        specs = [need.spec for need in self.run.live_needs]
        return recorded[specs.index(spec)] if recorded is not None and spec in specs else None

    def like(self, ask: Ask, spec: FeatureSpec) -> Mapping[str, Any]:
        """Return a recipe as long as that of a feature whose state nobody knows yet."""
        with self._state.named(_UNKNOWN):
            return self.run.access.recipe(spec)

    def layout(self, spec: FeatureSpec) -> Layout:
        """Return the columns of a feature's store."""
        known = self.run.access.width if spec.encoder is None else self._width_of_encoder
        return Layout(dict(spec.scalars), known(spec), spec.stored_as(self.run.settings.dataflex.storage))

    def _width_of_encoder(self, spec: FeatureSpec) -> int:
        assert spec.encoder is not None
        return self._state.encoder_sizes(spec.encoder)["width"]

    def refreshed(self, update: int | None) -> np.ndarray | None:
        """Return the update at which each row was last computed, (N,), if a run of this identity recorded it."""
        if update not in self.journal:
            return None
        found = None
        with contextlib.suppress(DataflexError):
            found = self.run.journal.read_pool(self.run.updates[update].number)
        return None if found is None or len(found[1]) != len(self.run.rows) else found[1]

    def _journal(self) -> dict[int, list[Mapping[str, Any]]]:
        run, found = self.run, {}
        for number, round in enumerate(run.updates if run.live_needs and run.identity else ()):
            recorded = None
            with contextlib.suppress(DataflexError):  # of another schedule or other rows: another run's
                recorded = run.journal.read(round, run.rows.keys, run.trainer.global_batch)
            if recorded is not None and recorded.info.get("identity") == run.identity:
                found[number] = recorded.info.get("recipes", [])
        return {number: recipes for number, recipes in found.items() if len(recipes) == len(run.live_needs)}
