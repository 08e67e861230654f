"""What a selector is given and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dataflex.draws import generator
from dataflex.features.need import Features as Features
from dataflex.features.need import Need as Need
from dataflex.features.need import View as View
from dataflex.features.spec import BASE as BASE
from dataflex.features.spec import FeatureSpec
from dataflex.rows import Rows
from dataflex.schedule import Round


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
class Beginning:
    """What is known before the first step, and before any feature is computed.

    Attributes:
        rows: the training rows.
        targets: target sets by name.
        largest: rows that the largest choice will be of at least; 0 where nothing is chosen.
        width: gives the numbers of a feature's vector.
    """

    rows: Rows
    targets: Mapping[str, Rows]
    largest: int
    width: Callable[[FeatureSpec], int]

    @property
    def eligible(self) -> int:
        """Rows with supervised tokens: no more of them can be chosen from."""
        return int((self.rows.supervised > 0).sum())


@dataclass(frozen=True)
class Selection:
    """Rows chosen, best first.

    Attributes:
        rows: (k,) int64.
        scores: (k,) float64 score of each, or None.
        ages: (k,) int32 age of the features behind each score, or None.
        pool: (N,) float64 score of every training row for the record, -inf where a row cannot be scored, or None.
        judged: (N,) float64 score of every training row where `pool` has something else, such as the logarithm of a
            chance; not finite where a row cannot be scored. None: `pool` has the scores.
    """

    rows: np.ndarray
    scores: np.ndarray | None = None
    ages: np.ndarray | None = None
    pool: np.ndarray | None = None
    judged: np.ndarray | None = None


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
