"""Mixers of the classic interface: constructed with a `mixture_manager`, asked by `mix(model, step_id, **kwargs)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from dataflex import distributed
from dataflex.components.adapter import adapted
from dataflex.components.classic import Arguments, constructed
from dataflex.mixers.base import LAST_BATCH, MixContext, NativeMixer


class Mixer(ABC):
    """Base of mixers of the classic interface.

    Args:
        mixture_manager: has `names`, `sizes`, `initial_proportions`, and `sources` (name -> processed dataset).
    """

    def __init__(self, mixture_manager: Any):
        self.mixture_manager = mixture_manager

    @abstractmethod
    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        """Return proportions in the order of `mixture_manager.names`."""


class ClassicMixer(NativeMixer):
    """A mixer around a class of the classic interface, whose answer on rank 0 counts."""

    __wrapped__: ClassVar[type[Any]]
    Params = Arguments
    declares_needs = False
    watches = True
    acts_at_start = True
    interval = 1

    @property
    def signals(self) -> tuple[str, ...]:
        """The last micro-batch, which `mix` is given as keyword arguments."""
        return (LAST_BATCH,)

    def _bind(self, runtime: Mapping[str, Any]) -> None:
        """Construct the class with the run's `mixture_manager`."""
        self._made = constructed(self.__wrapped__, self.params, runtime)

    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Return the proportions of the class's own `mix`."""
        # Rank 0's answer counts: a class that knows no ranks may draw numbers or look at its own rank's batch.
        more = context.ask[LAST_BATCH]()
        found: np.ndarray = distributed.broadcast(self._made.mix(model, step_id, context=context, **kwargs, **more))
        return found


def adapted_mixer(cls: type[Any]) -> type[NativeMixer]:
    """Make a user's class a `NativeMixer`: itself, or a class around it."""
    found: type[NativeMixer] = adapted(cls, NativeMixer, ClassicMixer)
    return found
