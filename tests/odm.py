"""A mixer `odm` and what a run tells it, without a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dataflex.mixers.base import Domains, MixContext, Statistics
from dataflex.mixers.odm import Odm

Losses = dict[int, float]  # domain, from 0 -> mean loss


class Run:
    """A mixer and what a run tells it: one call is one update."""

    def __init__(self, count: int, step: int = 0, initial: Any = None, **params: Any):
        rows = np.arange(1, count + 1) * 100
        self.domains = Domains(tuple(f"d{i}" for i in range(count)), rows, rows * 50)
        self.initial = np.full(count, 1 / count) if initial is None else np.array(initial, dtype=np.float64)
        self.proportions = self.initial
        self.mixer = Odm(Odm.Params(**params))
        self.step, self.update = step, 0

    def mix(self, statistics: Statistics) -> list[float]:
        given = MixContext(self.domains, self.initial, self.proportions, statistics, self.step, self.update, 0, {})
        self.proportions = self.mixer.mix(None, self.step, context=given)
        self.update += 1
        assert self.proportions.sum() == pytest.approx(1, abs=1e-14)
        assert (self.proportions >= 0).all()
        return self.proportions.tolist()

    def begin(self) -> list[float]:
        return self.mix(Statistics.zeros(len(self.initial)))

    def __call__(self, losses: Losses, steps: int = 1) -> list[float]:
        self.step += steps
        return self.mix(seen(len(self.initial), losses, steps))


def seen(count: int, losses: Losses, steps: int = 1, tokens: float = 64.0) -> Statistics:
    given = Statistics.zeros(count)
    for domain, loss in losses.items():
        given.tokens[domain], given.loss[domain] = tokens, loss * tokens
        given.groups[domain], given.group_loss[domain] = 2, 2 * loss
    return replace(given, steps=steps)


def ran(observations: Sequence[Losses], count: int = 3, step: int = 0, **given: Any) -> list[list[float]]:
    run = Run(count, step, **given)
    return [run.begin(), *(run(losses) for losses in observations)]


EVERY = {0: 2.0, 1: 3.0, 2: 2.5}


GAPS: list[Losses] = [{0: 2.0}, {1: 3.0}, {0: 1.9, 2: 2.5}, {1: 2.8}, {2: 2.4}]


VARIANTS = ("official", "paper", "exp3")
