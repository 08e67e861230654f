"""The shares in force, and how the mixer moves them by what was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dataflex import distributed
from dataflex.errors import DataflexError
from dataflex.fingerprint import digest
from dataflex.mixers.base import Domains, MixContext, NativeMixer, Statistics, normalised
from dataflex.pipelines.mixing.mixture_log import by_name, in_order, named


class Shares:
    """The proportions of the domains, (K,) float64, from one update of the mixer to the next.

    Args:
        name: what the run file calls the mixer.
        mixer: the mixer.
        domains: names and sizes.
        initial: (K,) proportions that the run begins with.
        signals: what the mixer may ask for.
        given: what the mixer is told beside, see `NativeMixer.mix`.
        seed: the run's seed.
    """

    def __init__(
        self,
        name: str,
        mixer: NativeMixer,
        domains: Domains,
        initial: np.ndarray,
        signals: Mapping[str, Callable[[], Any]],
        given: Mapping[str, Any],
        seed: int,
    ):
        self._name, self._mixer, self._domains, self._initial = name, mixer, domains, initial
        self._signals, self._given, self._seed = signals, given, seed
        self.now = initial
        self.pending = Statistics.zeros(len(domains))
        """What was seen since the last update."""
        self._update = 0

    def begin(self) -> None:
        """Put the initial proportions in force, for a warm-up."""
        self.now = self._initial

    def forget(self) -> None:
        """Begin to count anew: what was seen has been acted on."""
        self._update += 1
        self.pending = Statistics.zeros(len(self._domains))

    def move(self, model: Any, step: int) -> np.ndarray:
        """Ask the mixer for the proportions from a step on, which are held to be the same on every rank. Collective.

        Raises:
            DataflexError: its answer is no proportions of these domains.
        """
        context = MixContext(
            self._domains, self._initial, self.now, self.pending, step, self._update, self._seed, self._signals
        )
        found = self._mixer.mix(model, step, context=context, **self._given)
        try:
            shares = normalised(found)
        except ValueError as error:
            raise DataflexError(f"{self._name}: {error} at step {step}") from error
        if shares.shape != self._initial.shape:
            raise DataflexError(
                f"{self._name}: returned {len(shares)} proportions; expected {len(self._initial)}, one for each of "
                f"{', '.join(self._domains.names)}"
            )
        weights = self._mixer.loss_weights()
        decided = [shares.tolist(), None if weights is None else [float(w) for w in weights]]
        if len(set(distributed.gather(digest(decided)))) > 1:
            raise DataflexError(f"{self._name}: the processes have come to different proportions at step {step}")
        return shares

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        names = self._domains.names
        return {
            "update": self._update,
            "proportions": named(names, self.now),
            "pending": by_name(names, self.pending.state()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the state of `state()` back."""
        names = self._domains.names
        self._update = int(state["update"])
        self.now = np.array(in_order(names, state["proportions"]))
        self.pending = Statistics.restored(in_order(names, state["pending"]))
