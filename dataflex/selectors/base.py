"""What a selector is given and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from dataflex.features.spec import BASE as BASE
from dataflex.features.spec import FeatureSpec
from dataflex.rows import Rows
from dataflex.schedule import Round


@dataclass(frozen=True)
class Need:
    """A feature that a selector will ask for.

    Attributes:
        spec: the feature.
        of: of the training rows or of every target set.
        state: folder of a checkpoint, `BASE`, or None for the model as it is at the update.
    """

    spec: FeatureSpec
    of: Literal["train", "targets"]
    state: str | None = None


class View(Protocol):
    """Values of one feature for R rows, read from stores in bounded memory."""

    @property
    def status(self) -> np.ndarray:
        """(R,) uint8 of `dataflex.rows.Status`."""
        ...

    @property
    def ages(self) -> np.ndarray:
        """(R,) int32, updates since each row's value was computed; 0 is fresh."""
        ...

    def take(self, rows: np.ndarray) -> View:
        """Return the view of some of the rows, in the order given."""
        ...

    def scalar(self, name: str) -> np.ndarray:
        """Return a scalar column, (R,)."""
        ...

    def blocks(self, size: int = 4096, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (rows (b,), vectors (b, D) float32) until every usable row came once, in the order of the storage.

        With `part` (i, n), only the i-th of n shares of the rows; the shares of all i are a partition.
        """
        ...

    def nearest(
        self, queries: np.ndarray, k: int, metric: Literal["cosine", "ip", "l2"], approximate_above: int = 1_000_000
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest usable rows of each query, best first. Collective: ask alike on every rank.

        Ties go by (row key, position): identical rows all appear, next to each other. A row of zeros has no cosine and
        is no neighbour under `cosine`.

        Args:
            queries: (M, D) float32.
            k: rows wanted per query.
            metric: cosine or inner product, larger is better; or squared Euclidean distance, smaller is better.
            approximate_above: usable rows of one store from which an inverted file is searched, which can miss some
                neighbours; with fewer the answer is exact.

        Returns:
            Scores (M, k) float64 and positions in the view (M, k) int64.

        Raises:
            ConfigError: FAISS is not installed.
            CoverageError: fewer than k rows can be neighbours.
            DataflexError: a query is not finite, or is zero under `cosine`.
            MismatchError: the queries do not fit the feature.
        """
        ...


class Features(Protocol):
    """Gives features: from the stores, computed first where they are missing. Collective: ask alike on every rank."""

    def __call__(
        self, spec: FeatureSpec, target: str | None = None, state: str | None = None, rows: np.ndarray | None = None
    ) -> View:
        """Return a feature of the training rows, or of the target set named; `rows` (R,) takes some of them.

        Args:
            spec: the feature.
            target: name of a target set.
            state: as `Need.state`.
            rows: positions; the view is of them, in their order.
        """
        ...


@dataclass(frozen=True)
class Context:
    """What a selector finds at an update.

    Attributes:
        rows: the training rows.
        targets: target sets by name, from `eval_dataset` or `val_size`.
        features: gives the features that the selector declared in `needs`.
        round: the round to be filled.
        update: updates done before this one, over the whole run.
        updates: updates of the flex epoch that this one is part of.
        history: rows of each earlier update, in order.
        seed: the run's seed.
    """

    rows: Rows
    targets: Mapping[str, Rows]
    features: Features
    round: Round
    update: int
    updates: int
    history: Sequence[np.ndarray]
    seed: int

    def rng(self, *names: int | str) -> np.random.Generator:
        """Return a generator that is a function of the run's seed and the names alone."""
        return generator(self.seed, *names)


@dataclass(frozen=True)
class Selection:
    """Rows chosen, best first.

    Attributes:
        rows: (k,) int64.
        scores: (k,) float64 score of each, or None.
        ages: (k,) int32 age of the features behind each score, or None.
        pool: (N,) float64 score of every training row for the record, -inf where a row cannot be scored, or None.
    """

    rows: np.ndarray
    scores: np.ndarray | None = None
    ages: np.ndarray | None = None
    pool: np.ndarray | None = None


class NativeSelector(Protocol):
    """A selector written for DataFlex: its parameters are a pydantic model beside it, called `Params`."""

    def needs(self) -> Sequence[Need]:
        """Return the features of all training rows, or of all targets, that `select` will ask for."""
        ...

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Choose `num_samples` rows. Called on every rank alike; the answer of rank 0 counts."""
        ...


class Selector(ABC):
    """Base of selectors written against the documented four-argument interface. `select` is called on every rank.

    Args:
        dataset: the processed training set.
        accelerator: the trainer's `accelerate.Accelerator`.
        data_collator: the trainer's collator.
        cache_dir: a folder that the selector may write to.
    """

    def __init__(self, dataset: Any, accelerator: Any, data_collator: Any, cache_dir: str):
        self.dataset = dataset
        self.accelerator = accelerator
        self.data_collator = data_collator
        self.cache_dir = cache_dir
        self.seed = 42

    def warmup(self, num_samples: int, replacement: bool) -> list[int]:
        """Return the rows of a warm-up round; override it to warm up on rows of your own."""
        rng = generator(self.seed, "warmup")
        size = len(self.dataset)
        return [
            int(i)
            for i in (rng.integers(size, size=num_samples) if replacement else rng.permutation(size)[:num_samples])
        ]

    @abstractmethod
    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> Sequence[int]:
        """Return the positions of `num_samples` rows.

        Args:
            model: the live model, as the trainer wraps it.
            step_id: optimizer steps done.
            num_samples: rows wanted.
            kwargs: optimizer_state, scheduler_state, current_update_times (1-based), update_times, tokenizer, context.
        """


def generator(seed: int, *names: int | str) -> np.random.Generator:
    """Return a random generator that is a function of its arguments alone, on every machine."""
    words = [w for name in names for w in (name.encode() if isinstance(name, str) else [name])]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, len(names), *words])))


def stream(rows: np.ndarray, start: int, count: int, seed: int, *names: int | str) -> np.ndarray:
    """Return `count` entries, from `start` on, of an endless pass over `rows`: each pass a new permutation."""
    size = len(rows)
    first, last = start // size, (start + count - 1) // size
    passes = [rows[generator(seed, *names, number).permutation(size)] for number in range(first, last + 1)]
    return np.concatenate(passes)[start - first * size :][:count]
