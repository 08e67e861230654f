"""Where values come from: the run's own model, or another encoder that reads the rows' text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from dataflex import distributed
from dataflex.errors import ConfigError, MismatchError
from dataflex.explanation import explained
from dataflex.features.encoder import TextEncoder
from dataflex.features.engine import FeatureEngine
from dataflex.features.excerpt import excerpt
from dataflex.features.spec import ENGINE_VERSION, FeatureSpec, FeatureValues, LossSpec
from dataflex.fingerprint import text_key
from dataflex.folders import model_folder
from dataflex.live.state import ModelState
from dataflex.rows import Rows, keys_from

_MEASURED = 16
"""Rows whose loss stands for that of all."""


Wanted = tuple[FeatureSpec, Rows]
"""A feature, and the rows that it will be asked of."""


class Source(Protocol):
    """Computes features of rows."""

    is_collective: bool
    """Whether every rank must take part in every batch."""

    def keys(self, rows: Rows) -> np.ndarray:
        """Return the key of each row as this source sees it, (R,)."""
        ...

    def recipe(self, spec: FeatureSpec) -> dict[str, Any]:
        """Return everything but the row that determines a value."""
        ...

    def width(self, spec: FeatureSpec) -> int:
        """Return the numbers of a vector; 0 for a feature without."""
        ...

    def require(self, wanted: Sequence[Wanted]) -> None:
        """Refuse, before the first step, features of these rows that could not be computed. Collective."""
        ...

    def compute(
        self, rows: Rows, at: np.ndarray, specs: Sequence[FeatureSpec], min_batches: int
    ) -> list[FeatureValues]:
        """Return the values of rows `at`, one result for each feature."""
        ...


class ModelSource:
    """The model in the trainer's hands, at the state it is in when asked.

    Args:
        state: names that state.
        token_budget: tokens of a batch.
        cutoff_len: tokens of a row, at most.
    """

    def __init__(self, state: ModelState, token_budget: int, cutoff_len: int):
        self._state = state
        self._token_budget = token_budget
        self._cutoff_len = cutoff_len
        self._ran = False
        self.on_batch: Callable[[int, int], None] | None = None
        """Told the rows and tokens of each batch that is done, as far as each row is counted once."""
        self.is_collective = not state.sharding.has_whole_weights

    @cached_property
    def engine(self) -> FeatureEngine:
        """The engine; it is kept, since its random projections are the same at every state."""
        return self._new_engine()

    def _new_engine(self, is_loaded: bool = True) -> FeatureEngine:
        trainer = self._state.trainer
        return FeatureEngine(
            trainer.model,
            pad_token_id=trainer.processing_class.pad_token_id or 0,
            token_budget=self._token_budget,
            autocast=trainer.accelerator.autocast,
            is_loaded=is_loaded,
        )

    def require(self, wanted: Sequence[Wanted]) -> None:
        """Ask whether every trainable parameter has a per-example gradient, and whether layers and rows are there.

        Raises:
            DataflexError: a parameter has none.
            ConfigError: the model has no such layer, or a row is wider than token losses are kept.
        """
        # An engine of its own: where the model is now need not be where its batches will go.
        engine = self._new_engine(is_loaded=not self._state.sharding.is_loaded_late)
        for rows in [rows for spec, rows in wanted if spec.gradient][:1]:
            count = max(1, int(np.searchsorted(np.cumsum(rows.length), self._token_budget)))
            engine.require_rules([rows.examples[row] for row in range(min(count, len(rows)))])
        engine.require_layers(list(dict.fromkeys(spec for spec, _ in wanted)))
        kept = [rows for spec, rows in wanted if spec.is_by_token]
        longest = max((int(rows.length.max(initial=0)) for rows in kept), default=0)
        if longest > self._cutoff_len:
            raise ConfigError(
                f"cutoff_len: found {self._cutoff_len} and a row of {longest} tokens; expected rows of at most "
                "cutoff_len, as token losses are kept in that width. Set the one that tokenized_path was made with"
            )

    def keys(self, rows: Rows) -> np.ndarray:
        """Return the keys of the tokens."""
        return rows.keys

    def recipe(self, spec: FeatureSpec) -> dict[str, Any]:
        """Return the feature, the model's state, and the numerics. Collective where weights are dealt out."""
        width = {"cutoff_len": self._cutoff_len} if spec.is_by_token else {}
        return {**self._state.recipe(spec), **width}

    def width(self, spec: FeatureSpec) -> int:
        """Return D."""
        return spec.width(_Sizes(self._state, self._cutoff_len))

    def compute(
        self, rows: Rows, at: np.ndarray, specs: Sequence[FeatureSpec], min_batches: int
    ) -> list[FeatureValues]:
        """Run the engine.

        Raises:
            CoverageError: the base model is asked for, and is no longer at hand.
        """
        self._state.require_runnable()
        self.engine.moments = self._state.moments() if any(spec.needs_moments for spec in specs) else None
        if not self._ran:  # what was measured for others meanwhile
            self.engine.measured[:] = 0
        self._ran = True
        examples = [rows.examples[int(row)] for row in at]
        of_excerpts = [spec for spec in specs if spec.is_of_excerpt]
        together = [spec for spec in specs if spec not in of_excerpts]
        found: dict[FeatureSpec, FeatureValues] = {}
        alone: list[list[FeatureSpec]] = [[spec] for spec in of_excerpts]
        for number, group in enumerate([together, *alone] if together else alone):
            seen = [excerpt(example, group[0]) for example in examples]
            told = None if number else self.on_batch
            values = self.engine.compute(seen, group, min_batches=min_batches, on_batch=told)
            found |= {spec: self._as_wide(spec, each) for spec, each in zip(group, values, strict=True)}
        return [found[spec] for spec in specs]

    def measured(self) -> tuple[bool, np.ndarray]:
        """Say whether the model has run since the last time; and what loss (nats) over how many tokens it had then."""
        if not self._ran:
            return False, np.zeros(2)
        found, self._ran = self.engine.measured.copy(), False
        self.engine.measured[:] = 0
        return True, found

    def measure(self, rows: Rows) -> tuple[float, float]:
        """Return the summed loss of a few rows, evenly spaced, and its tokens. Every rank must call it alike."""
        able = np.flatnonzero(rows.supervised > 0)
        some = able[np.unique(np.linspace(0, len(able) - 1, min(_MEASURED, len(able))).astype(np.int64))]
        (found,) = self.engine.compute([rows.examples[int(row)] for row in some], [LossSpec()])
        self.engine.measured[:] = 0
        return float(found.scalars["loss_sum"].sum()), float(found.scalars["tokens"].sum())

    def _as_wide(self, spec: FeatureSpec, values: FeatureValues) -> FeatureValues:
        """Fill token losses up to the width that all rows have."""
        if not spec.is_by_token or values.vectors is None:
            return values
        missing = self._cutoff_len - values.vectors.shape[1]
        return replace(values, vectors=np.pad(values.vectors, ((0, 0), (0, missing))))


@dataclass(frozen=True)
class _Sizes:
    """Of the model in training."""

    state: ModelState
    cutoff_len: int

    @property
    def hidden(self) -> int:
        return self.state.hidden_size

    @property
    def trainable(self) -> int:
        return self.state.trainable_size


class EncoderSource:
    """Another model; it is loaded when it is first asked what it is or gives.

    Raises:
        MismatchError: there is none of that name.
        UnavailableError: a server that it would come from does not answer.
    """

    is_collective = False

    def __init__(self, name_or_path: str, state: ModelState, token_budget: int):
        self._place = f"embedding_model_name_or_path: {name_or_path}"
        with explained(self._place, refusal=MismatchError):
            self._folder: Path = model_folder(name_or_path)
        self._device = state.trainer.args.device
        self._token_budget = token_budget
        self._loaded: TextEncoder | None = None
        self._identity = state.encoder(name_or_path)
        self._keys: WeakKeyDictionary[Rows, np.ndarray] = WeakKeyDictionary()
        self.on_batch: Callable[[int, int], None] | None = None

    @property
    def _encoder(self) -> TextEncoder:
        if self._loaded is None:
            with explained(self._place, refusal=MismatchError):
                self._loaded = TextEncoder(self._folder, self._device, self._token_budget)
        return self._loaded

    def require(self, wanted: Sequence[Wanted]) -> None:
        """Load the encoder.

        Raises:
            ConfigError: a package that it needs is missing, or it has no such layer.
            MismatchError: it cannot be loaded.
        """
        with distributed.together():
            self._encoder.require_layers([spec for spec, _ in wanted])

    def keys(self, rows: Rows) -> np.ndarray:
        """Return the keys of the texts; each is read once for as long as the rows live."""
        if rows not in self._keys:
            self._keys[rows] = keys_from(text_key(*rows.text(row)) for row in range(len(rows)))
        return self._keys[rows]

    def recipe(self, spec: FeatureSpec) -> dict[str, Any]:
        """Return the feature, the encoder's files and our engine; what the encoder is called does not matter."""
        return {"feature": spec.recipe(), "encoder": self._identity, "numerics": {"engine": ENGINE_VERSION}}

    def width(self, spec: FeatureSpec) -> int:
        """Return D."""
        return self._encoder.width

    def compute(
        self, rows: Rows, at: np.ndarray, specs: Sequence[FeatureSpec], min_batches: int
    ) -> list[FeatureValues]:
        """Embed the rows' texts."""
        return self._encoder.compute([rows.text(int(row)) for row in at], specs, self.on_batch)
