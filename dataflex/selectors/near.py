"""Nearest rows of every target row, the target rows taking turns. M target rows, K neighbours of each."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from dataflex.components.params import ExistingFile
from dataflex.errors import CoverageError, MismatchError
from dataflex.rows import Rows
from dataflex.selectors.base import Beginning, Context, Need
from dataflex.selectors.composed import Composed, Composition
from dataflex.selectors.parts.array_file import load_array
from dataflex.selectors.parts.choice import RoundRobin
from dataflex.selectors.parts.judgement import Judgement
from dataflex.selectors.parts.representation import Part
from dataflex.selectors.parts.vectors import EmbeddingVectors, GradientVectors

Compared = Annotated[EmbeddingVectors | GradientVectors, Field(discriminator="kind")]


class Near(Composed):
    """Walks through every target row's nearest rows: all first ones, then all second ones, each row once.

    An update goes on where the one before stopped; after the whole pool the walk begins again.

    Source: the selector `near` of DataFlex (arXiv 2603.26164), whose every update repeats the first rows of the walk
    (`repeat: true`), and whose targets are 100 rows of the pool where none are named (here: an error).
    """

    class Params(Part):
        """Parameters of `near`."""

        representation: Compared = Field(EmbeddingVectors(), description="what is near: embeddings or gradients")
        repeat: bool = Field(False, description="choose the same rows at every update, not the next-nearest")
        indices_path: ExistingFile | None = Field(
            None, description="precomputed: .npy of row positions (M, K), nearest first; nothing is computed then"
        )
        cache_dir: str | None = Field(
            None, description="root of the stores where neither dataflex.store nor DATAFLEX_HOME is set"
        )

    def composition(self, params: Params) -> Composition:
        """Return the parts."""
        rule = RoundRobin(over="rows", repeat=params.repeat)
        return Composition(representation=params.representation, similarity="cosine", within="max", rule=rule)

    def needs(self) -> list[Need]:
        """Return the representation's features, none where the neighbours are given."""
        return [] if self.params.indices_path else super().needs()

    def prepare(self, beginning: Beginning) -> None:
        """Check the given neighbours, if there are any, against the training set.

        Raises:
            MismatchError: the file holds no positions of training rows.
            CoverageError: an update needs more rows than they have.
        """
        if self.params.indices_path is None:
            super().prepare(beginning)
            return
        given = np.unique(self._given(beginning.rows))
        able = int((beginning.rows.supervised[given] > 0).sum())
        if able < beginning.largest:
            raise CoverageError(
                f"{self.params.indices_path}: {beginning.largest} rows wanted at one update, found {able} with "
                "supervised tokens in it; lower update_step or the batch size, or name more neighbours there"
            )

    def judge(self, context: Context) -> Judgement:
        """Return the neighbours found, or given. Collective."""
        if self.params.indices_path is None:
            return super().judge(context)
        given = self._given(context.rows)
        size = len(context.rows)
        scores = np.full(size, -np.inf)
        # From the farthest neighbours on, so that a row's score is that of the nearest place at which it stands.
        for column in range(given.shape[1] - 1, -1, -1):
            scores[given[:, column]] = -column
        scores[context.rows.supervised == 0] = -np.inf
        ages = np.full(size, -1, np.int32)  # of no update: nothing was computed
        return Judgement(
            context, scores, ages, nearest=lambda k: (np.zeros((len(given), 0)), given[:, :k]), reach=given.shape[1]
        )

    def _given(self, rows: Rows) -> np.ndarray:
        path, size = str(self.params.indices_path), len(rows)
        given = load_array(path)
        if given.ndim != 2 or given.dtype.kind not in "iu" or not given.size:
            raise MismatchError(f"{path}: found {given.dtype} {list(given.shape)}; expected whole numbers (M, K)")
        if given.min() < 0 or given.max() >= size:
            raise MismatchError(
                f"{path}: found positions {given.min()} to {given.max()}; the training set has rows 0 to {size - 1}"
            )
        return given
