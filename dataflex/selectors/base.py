"""What a selector is given and what it returns. N training rows, k rows of a selection."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from dataflex.draws import generator
from dataflex.features.need import Features as Features
from dataflex.features.need import Need as Need
from dataflex.features.need import View as View
from dataflex.features.spec import BASE as BASE
from dataflex.features.spec import FeatureSpec
from dataflex.method import Method, default
from dataflex.rows import Rows
from dataflex.schedule import Round

RefreshPolicy = Literal["full", "rotating", "static"]
REFRESHES: tuple[str, ...] = get_args(RefreshPolicy)


@dataclass(frozen=True)
class Context:
    """What a selector is given at an update.

    Attributes:
        rows: the training rows; behind a prefilter, those that it lets through, as if there were no others.
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
        largest: size of the largest selection of the run, at least; 0 if nothing is selected.
        width: function that gives the width of a feature's vectors.
    """

    rows: Rows
    targets: Mapping[str, Rows]
    largest: int
    width: Callable[[FeatureSpec], int]

    @property
    def eligible(self) -> int:
        """How many rows have supervised tokens: no selection can be larger."""
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


Answer = Selection | Sequence[int] | np.ndarray
"""What a selector may return: positions alone will do."""


class NativeSelector(Method):
    """Base of selectors: override `select`, and of the rest what differs. See also `dataflex.method.Method`.

    Attributes:
        is_adaptive: whether only `select` knows of which rows features are needed, so that featurize has to run it.
        may_choose_unlabelled: whether rows without a supervised token among its choice are a warning, not an error.
        leaves_gradients: whether it may leave gradients in the model, which are removed then.
    """

    is_adaptive: ClassVar[bool] = False
    may_choose_unlabelled: ClassVar[bool] = False
    leaves_gradients: ClassVar[bool] = False

    @default
    def chooses_distinct(self) -> bool:
        """Whether an update holds each row once, so that it cannot be larger than the pool."""
        return False

    @default
    def refreshes(self) -> tuple[str, ...]:
        """The refresh policies that the selector can work under."""
        return REFRESHES

    def prepare(self, beginning: Beginning) -> None:
        """Check what can be checked before the first step and before any feature is computed.

        Raises:
            DataflexError: no update could be chosen.
        """

    def warmup_rows(self, count: int) -> np.ndarray | None:
        """Return the rows of a warm-up round, (count,) int64, or None for the run's own random draw."""
        return None

    @abstractmethod
    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Answer:
        """Choose `num_samples` rows. Called on every rank alike; the answer of rank 0 counts.

        Args:
            model: the live model, as the trainer wraps it.
            step_id: optimizer steps done.
            num_samples: rows wanted.
            context: rows, targets, features and history.
            kwargs: optimizer_state, scheduler_state, current_update_times (1-based), update_times, tokenizer.
        """
