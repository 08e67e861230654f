"""The rows of a mixture's rounds, and how far the run has come in each domain."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from dataflex.config.keys import Mixture
from dataflex.errors import CoverageError
from dataflex.mixers.base import Domains, normalised
from dataflex.schedule import Round
from dataflex.trainers.rounds import DecidedRound
from dataflex.trainers.stream import Exhaustion, MixtureStream

log = logging.getLogger(__name__)


class Drawing:
    """Draws the rows of rounds from the domains by the shares in force; K domains.

    Args:
        domains: their names and sizes.
        members: K arrays, the rows of each.
        keys: `dataflex.mixture` of the run file.
        seed: of the draws.
        global_batch: rows of an optimizer step.
        group: rows that are drawn from one domain together.
        draws: how rows are dealt to the shares.
    """

    def __init__(
        self,
        domains: Domains,
        members: Sequence[np.ndarray],
        keys: Mixture,
        seed: int,
        global_batch: int,
        group: int,
        draws: Literal["greedy", "random"],
    ):
        self._domains, self._keys, self._global_batch = domains, keys, global_batch
        passes = keys.passes if keys.exhausted == "cycle" else keys.passes or 1.0
        self._stream = MixtureStream(domains.names, members, seed, draws, group, Exhaustion(keys.exhausted, passes))
        self._round: tuple[Round, dict[str, Any]] | None = None

    @property
    def served(self) -> np.ndarray:
        """(K,) int64, rows drawn so far."""
        return self._stream.served

    @property
    def group(self) -> int:
        """Rows that are drawn from one domain together."""
        return self._stream.group

    @property
    def round(self) -> Round:
        """The round that was begun last."""
        assert self._round is not None
        return self._round[0]

    def state(self) -> dict[str, Any]:
        """Return where the stream was when the last round began."""
        assert self._round is not None
        return self._round[1]

    def restore(self, round: Round, state: Mapping[str, Any]) -> None:
        """Be where the stream was when a round began."""
        self._round = round, dict(state)
        self._stream.restore(state)

    def take(self, round: Round, shares: np.ndarray) -> np.ndarray:
        """Return the rows of a round by shares (K,), fewer where the domains come to an end; the stream moves on."""
        if self._domains.unit == "tokens":  # a row counts as many tokens as its domain has on average
            shares = normalised(shares / np.maximum(1, self._domains.tokens) * self._domains.rows)
        return self._stream.take(shares, round.steps * self._global_batch)

    def begin(self, round: Round, shares: np.ndarray) -> DecidedRound | None:
        """Return a round's rows, cut where the domains come to an end, or None if there is no step left.

        Raises:
            CoverageError: they come to an end where the run must go on.
        """
        self._round = round, self._stream.state()
        rows = self.take(round, shares)
        steps = len(rows) // self._global_batch
        missing = round.steps * self._global_batch - len(rows)
        may_end = self._keys.exhausted == "stop" or missing < self._global_batch
        if missing and (not may_end or round.first_step + steps == 0):
            raise CoverageError(
                f"dataflex.mixture: the domains with a share are used up after {self.served.sum()} rows, at "
                f"step {round.first_step + steps}; allow more passes, set exhausted: cycle, or train for fewer steps"
            )
        if missing:
            log.warning("a domain has been passed through: the run ends after step %d", round.first_step + steps)
        if steps == 0:
            return None
        cut = round if steps == round.steps else Round(round.number, round.kind, round.first_step, steps, 0, 0)
        rows = rows[: steps * self._global_batch]
        return DecidedRound(cut, rows, np.full(len(rows), np.nan), np.full(len(rows), -1, np.int32))

    def end_at(self, step: int, shares: np.ndarray) -> None:
        """Forget what was drawn behind a step of the last round, which was not trained on."""
        if self._round is not None:
            round, state = self._round
            self._stream.restore(state)
            self.take(replace(round, steps=min(step - round.first_step, round.steps)), shares)

    def refuse_hopeless(self, drawn: np.ndarray, steps: int) -> None:
        """Refuse steps that are more than the rows are enough for.

        Args:
            drawn: (K,) bool, domains that may have a share.
            steps: from here on.

        Raises:
            CoverageError: the domains hold too few.
        """
        wanted, found = steps * self._global_batch, self._stream.room(drawn)
        if self._keys.exhausted == "renormalise" and wanted - found >= self._global_batch:
            raise CoverageError(
                f"dataflex.mixture: {wanted} rows wanted, found {found:g} within {self._keys.passes or 1:g} passes; "
                "raise passes, set exhausted: cycle, or train for fewer steps"
            )
