"""Random selection: the baseline that every other method has to beat; also with the lengths of another's choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from dataflex.components.compatibility import accepted
from dataflex.components.params import ExistingFile, Parameters
from dataflex.draws import generator
from dataflex.errors import ConfigError, CoverageError
from dataflex.selectors.base import Beginning, Context, NativeSelector, Selection
from dataflex.selectors.parts.sampling import sample


class Random(NativeSelector):
    """A new draw at every update."""

    class Params(Parameters):
        """Parameters of `random`."""

        seed: int | None = Field(None, ge=0, description="seed of the draws; default: the run's seed")
        replacement: bool = Field(False, description="draw with replacement within an update")
        lengths: ExistingFile | None = Field(
            None,
            description="Parquet with columns update, from 0, and tokens: each update's rows are distributed over "
            "lengths as these, so that what is gained by length alone can be told; default: as the pool is",
        )
        bins: int = Field(20, ge=1, description="lengths: equally frequent classes of length in the pool, at most")
        cache_dir: str | None = accepted("cache_dir", None)

    @property
    def chooses_distinct(self) -> bool:
        """Whether an update holds each row once."""
        return not self.params.replacement

    def prepare(self, beginning: Beginning) -> None:
        """Check the file of lengths.

        Raises:
            ConfigError: it is none.
        """
        if self.params.lengths is not None:
            _lengths(self.params.lengths)

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Draw `num_samples` of the rows that have supervised tokens.

        Raises:
            CoverageError: there are fewer, as a whole or of some length; or the file of lengths has no such update.
        """
        seed = context.seed if self.params.seed is None else self.params.seed
        rng = generator(seed, "random", context.update)
        logits = np.where(context.rows.supervised > 0, 0.0, -np.inf)
        if self.params.lengths is None:
            return Selection(sample(logits, context.rows.keys, num_samples, rng, self.params.replacement))
        update, tokens = _lengths(self.params.lengths)
        wanted = tokens[update == context.update]
        if len(wanted) < num_samples:
            raise CoverageError(
                f"random.lengths: found the lengths of {len(wanted)} rows for update {context.update + 1}; expected "
                f"{num_samples}. The choice that they are of needs this run's schedule and batch"
            )
        return Selection(self._of_lengths(context, logits, wanted[:num_samples], rng))

    def _of_lengths(
        self, context: Context, logits: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Draw as many rows of each class of length as there are lengths in it, (k,), in a random order."""
        rows, params = context.rows, self.params
        shares = np.arange(1, params.bins) / params.bins
        edges = np.unique(np.quantile(rows.length[np.isfinite(logits)], shares))
        of, counts = np.searchsorted(edges, rows.length), np.bincount(np.searchsorted(edges, wanted))
        parts = []
        for number in np.flatnonzero(counts).tolist():
            inside = np.where(of == number, logits, -np.inf)
            if (found := int(np.isfinite(inside).sum())) < (1 if params.replacement else counts[number]):
                raise CoverageError(
                    f"random.lengths: {counts[number]} rows wanted at one update in class {number + 1} of "
                    f"{len(edges) + 1} from short to long, found {found} that can be drawn; lower bins, or set "
                    "replacement: true"
                )
            parts.append(sample(inside, rows.keys, int(counts[number]), rng, params.replacement))
        return np.concatenate(parts)[rng.permutation(len(wanted))]


def _lengths(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the update and the length of each row of a choice, two columns (n,) int64.

    Raises:
        ConfigError: the file has no such columns.
    """
    try:
        table = pq.read_table(path, columns=["update", "tokens"])
        found = [table[name].cast(pa.int64()).to_numpy() for name in ("update", "tokens")]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise ConfigError(
            f"random.lengths: {path}: found no Parquet with whole numbers `update` and `tokens` ({error})"
        ) from error
    return found[0], found[1]
