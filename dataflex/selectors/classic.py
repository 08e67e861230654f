"""Selectors of the classic interface: four constructor arguments, and `select(model, step_id, num_samples, **kwargs)`.

It is the interface of DataFlex's reference implementation, which knows no features; a class written against it runs
unchanged but for its import line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dataflex.components.adapter import adapted
from dataflex.components.classic import Arguments, constructed
from dataflex.draws import generator
from dataflex.selectors.base import Answer, Context, NativeSelector, Need


class Selector(ABC):
    """Base of selectors of the classic interface. `select` is called on every rank.

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

    def warmup_rows(self, count: int) -> np.ndarray | None:
        """Return what an overridden `warmup` draws, as `NativeSelector.warmup_rows`."""
        if type(self).warmup is Selector.warmup:
            return None
        return np.asarray(self.warmup(count, replacement=True), dtype=np.int64).reshape(-1)

    @abstractmethod
    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> Sequence[int]:
        """Return the positions of `num_samples` rows.

        Args:
            model: the live model, as the trainer wraps it.
            step_id: optimizer steps done.
            num_samples: rows wanted.
            kwargs: optimizer_state, scheduler_state, current_update_times (1-based), update_times, tokenizer, context.
        """


class ClassicSelector(NativeSelector):
    """A selector around a class of the classic interface."""

    __wrapped__: ClassVar[type[Any]]
    Params = Arguments
    declares_needs = False
    may_choose_unlabelled = True
    leaves_gradients = True

    def _bind(self, runtime: Mapping[str, Any]) -> None:
        """Construct the class with the run's dataset, accelerator, collator and cache folder."""
        self._made = constructed(self.__wrapped__, self.params, runtime)

    def needs(self) -> Sequence[Need]:
        """Return the needs that the class declares, once it is constructed; none if it declares none."""
        made: Any = getattr(self, "_made", None)
        return tuple(made.needs()) if hasattr(made, "needs") else ()

    def warmup_rows(self, count: int) -> np.ndarray | None:
        """Return the rows of the class's own `warmup`, if it overrides that."""
        return self._made.warmup_rows(count) if isinstance(self._made, Selector) else None

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Answer:
        """Return what the class's `select` chooses."""
        found: Answer = self._made.select(model, step_id=step_id, num_samples=num_samples, context=context, **kwargs)
        return found


def adapted_selector(cls: type[Any]) -> type[NativeSelector]:
    """Make a user's class a `NativeSelector`: itself, or a class around it.

    Without `needs` it may do what a classic one may: choose rows without labels, and leave gradients in the model.
    """
    if not hasattr(cls, "Params"):
        found: type[NativeSelector] = adapted(cls, NativeSelector, ClassicSelector)
        return found
    is_classic = not hasattr(cls, "needs")
    found = adapted(cls, NativeSelector, leaves_gradients=is_classic, may_choose_unlabelled=is_classic)
    return found
