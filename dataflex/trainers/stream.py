"""Which rows a mixture is made of: a pure function of the seed and of the proportions so far.

K domains. A *slot* is what is drawn at once: one row, or a micro-batch of rows of one domain. Neither the number of
processes nor the workers of a loader have a part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dataflex.draws import generator

_BLOCK = 1024  # slots whose random numbers are drawn together


@dataclass(frozen=True)
class Exhaustion:
    """What happens when a domain has been passed through.

    Attributes:
        policy: `cycle`: it begins anew, in another order; `renormalise`: the others share its part; `stop`: the run
            ends before the step that it could not fill.
        passes: how often each domain may be passed through, not necessarily whole; None: without limit (`cycle` only).
    """

    policy: Literal["cycle", "renormalise", "stop"] = "cycle"
    passes: float | None = None


class MixtureStream:
    """Deals rows to slots, and goes on where it stopped.

    Greedy draws follow the cumulative proportions: the slot goes to the domain that is furthest behind its share, so a
    domain stays within about ln K slots of its share at any time (as Megatron-LM assigns blended datasets, here with
    moving weights). Random draws take domain i with its probability, by a number that belongs to the slot.

    Args:
        names: (K,) of the domains; an order of rows belongs to its domain's name.
        members: K arrays, the rows of each domain.
        seed: of orders and draws.
        draws: `greedy` or `random`.
        group: rows of a slot.
        exhaustion: what happens when a domain is used up.
    """

    def __init__(
        self,
        names: Sequence[str],
        members: Sequence[np.ndarray],
        seed: int,
        draws: Literal["greedy", "random"] = "greedy",
        group: int = 1,
        exhaustion: Exhaustion = Exhaustion(),
    ):
        self.names, self._members, self._seed = tuple(names), [np.asarray(m, np.int64) for m in members], seed
        self._draws, self.group, self._exhaustion = draws, group, exhaustion
        limit = exhaustion.passes
        self._limits = np.array([np.inf if limit is None else int(limit * len(m)) for m in self._members])
        self.served = np.zeros(len(self.names), np.int64)
        self._mass = np.zeros(len(self.names))
        self._slots = 0
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._numbers: tuple[int, np.ndarray] | None = None

    def room(self, drawn: np.ndarray) -> float:
        """Return the rows that can still be dealt if domains (K,) bool are drawn; infinite without a limit."""
        return float((np.floor((self._limits - self.served) / self.group) * self.group)[drawn].sum())

    def take(self, proportions: np.ndarray, rows: int) -> np.ndarray:
        """Return the next rows, (rows,) int64; fewer, a whole number of slots, where the domains are used up.

        Args:
            proportions: (K,) shares of slots; a domain with 0 is not drawn.
            rows: how many, a multiple of the rows of a slot.
        """
        taken: list[np.ndarray] = []
        shares = self._shares(proportions)
        for _ in range(rows // self.group):
            if not shares.any():
                break
            domain = self._choose(shares)
            if not self._fits(domain):
                break
            taken.append(self._next(domain))
            if not self._fits(domain):
                shares = self._shares(proportions)
        return np.concatenate(taken) if taken else np.empty(0, np.int64)

    def _fits(self, domain: int) -> bool:
        """Say whether a domain can fill another slot."""
        return bool(self.served[domain] + self.group <= self._limits[domain])

    def _shares(self, proportions: np.ndarray) -> np.ndarray:
        """Return the shares of the domains that can be drawn, summing to 1, or zeros; `stop` draws used-up ones too."""
        has_room = self.served + self.group <= self._limits
        shares = proportions if self._exhaustion.policy == "stop" else np.where(has_room, proportions, 0.0)
        total = shares.sum()
        return shares / total if total > 0 else np.zeros_like(shares)

    def _choose(self, shares: np.ndarray) -> int:
        """Return the domain of the next slot."""
        slot, self._slots = self._slots, self._slots + 1
        if self._draws == "random":
            edges = shares.cumsum()
            return int(np.searchsorted(edges, self._number(slot) * edges[-1], side="right"))
        self._mass += shares
        behind = np.where(shares > 0, self._mass, -np.inf)
        domain = int(behind.argmax())
        self._mass[domain] -= 1.0
        return domain

    def _number(self, slot: int) -> float:
        """Return the slot's number in [0, 1)."""
        block = slot // _BLOCK
        if self._numbers is None or self._numbers[0] != block:
            self._numbers = block, generator(self._seed, "slots", block).random(_BLOCK)
        return float(self._numbers[1][slot % _BLOCK])

    def _next(self, domain: int) -> np.ndarray:
        """Return the next rows of a domain: a permutation for each pass."""
        members, start = self._members[domain], int(self.served[domain])
        self.served[domain] += self.group
        turns = (divmod(at, len(members)) for at in range(start, start + self.group))
        return np.array([members[self._order(domain, number)[at]] for number, at in turns])

    def _order(self, domain: int, number: int) -> np.ndarray:
        """Return the order of a domain's pass; the last one is kept."""
        if self._orders.get(domain, (-1, None))[0] != number:
            drawn = generator(self._seed, "pass", self.names[domain], number)
            self._orders[domain] = number, drawn.permutation(len(self._members[domain]))
        return self._orders[domain][1]

    def state(self) -> dict[str, Any]:
        """Return plain data from which another stream over the same rows goes on exactly."""
        named = {n: int(s) for n, s in zip(self.names, self.served, strict=True)}
        return {"served": named, "mass": dict(zip(self.names, self._mass.tolist(), strict=True)), "slots": self._slots}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.served = np.array([state["served"][name] for name in self.names], np.int64)
        self._mass = np.array([state["mass"][name] for name in self.names])
        self._slots = int(state["slots"])
