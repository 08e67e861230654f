"""The goal of a mixture: metrics to lower, nearness to a prior, and a limit on the repetition of a domain.

K domains, J metrics.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataflex.components.registry import did_you_mean
from dataflex.config.problems import NOTHING, Origin, Problems
from dataflex.fitting.table import Runs

_MOST = sys.float_info.max
COMMAND = Origin(Path("command line"))
REPETITION = 4.0
"""Epochs over a domain up to which repeated tokens are nearly as good as new ones."""


@dataclass(frozen=True)
class Goal:
    """The problem that the mixture solves.

    Attributes:
        weights: (J,) of the metrics, summing to 1.
        prior: (K,) summing to 1, or None where nothing was said of one.
        kl: weight of KL(x || prior), in units of the metrics per nat.
        sizes: (K,) tokens of the domains, or None.
        tokens: length of the run that the mixture is for, or None.
        repetition: epochs over a domain that are not exceeded; None where `tokens` is.
    """

    weights: np.ndarray
    prior: np.ndarray | None
    kl: float
    sizes: np.ndarray | None
    tokens: float | None
    repetition: float | None

    @property
    def caps(self) -> np.ndarray | None:
        """(K,) largest shares, or None."""
        if self.sizes is None or self.tokens is None or self.repetition is None:
            return None
        return self.repetition * self.sizes / self.tokens


def read_goal(
    runs: Runs,
    weights: str | None = None,
    prior: str | None = None,
    kl: float = 0.05,
    sizes: Path | None = None,
    tokens: float | None = None,
    cap: float | None = None,
) -> Goal:
    """Read what the command line says.

    Args:
        runs: whose names the others are compared with.
        weights: `metric=weight,...`; a metric that is not named has 0; without it all are equal.
        prior: `natural` (by `sizes`, the default where they are given), `uniform`, or a JSON file of names and weights.
        kl: see `Goal`.
        sizes: JSON file of names and tokens.
        tokens: see `Goal`.
        cap: `Goal.repetition`; without it `REPETITION`.

    Raises:
        ConfigError: lists all that is wrong, or cannot act with the rest.
    """
    problems = Problems()
    if not 0 <= kl < math.inf:
        problems.add(COMMAND, "--kl", "a finite number, 0 or more", kl)
    if tokens is not None and not 0 < tokens < math.inf:
        problems.add(COMMAND, "--tokens", "a finite number above 0", tokens)
    if cap is not None and not 0 < cap < math.inf:
        problems.add(COMMAND, "--cap", "a finite number above 0", cap)
    if (tokens is None) != (sizes is None) and (tokens is not None or prior not in (None, "natural") or kl == 0):
        why = "A cap on repetition needs both" if tokens is not None else "Sizes make the prior `natural`, and the cap"
        problems.say(COMMAND, "--sizes, --tokens", "found one without the other; expected both", why)
    if cap is not None and tokens is None:
        problems.say(COMMAND, "--cap", f"found {cap:g} without --tokens and --sizes; expected both or no cap")
    if prior is not None and kl == 0:
        problems.say(COMMAND, "--prior", "found a prior that --kl 0 takes no notice of; expected one or the other")
    if kl > 0 and prior is None and sizes is None:
        problems.say(COMMAND, "--prior", "found no prior, and no --sizes to take it from; expected one, or --kl 0")
    if prior == "natural" and sizes is None:
        problems.say(COMMAND, "--prior", "found 'natural' without --sizes; expected the tokens of each domain")
    tokens_of = None if sizes is None else _named(sizes, runs.domains, problems)
    near = np.ones(len(runs.domains)) if prior == "uniform" else tokens_of
    if prior not in (None, "natural", "uniform"):
        near = _named(Path(prior), runs.domains, problems)
    chosen = _weights(weights, runs.metrics, problems)
    problems.raise_if_any()
    share = near / near.sum() if near is not None else None
    repetition = None if tokens is None else REPETITION if cap is None else cap
    goal = Goal(chosen / chosen.sum(), share, kl, tokens_of, tokens, repetition)
    _check_room(goal, problems)
    problems.raise_if_any()
    return goal


def _check_room(goal: Goal, problems: Problems) -> None:
    """Check that the domains which may have a share have enough tokens for the run."""
    free = slice(None) if goal.prior is None or goal.kl == 0 else goal.prior > 0
    if goal.sizes is None or goal.tokens is None or goal.repetition is None:
        return
    most = goal.repetition * goal.sizes[free].sum()
    if goal.tokens > most:
        found = f"found {goal.tokens:g} tokens; expected at most {most:g}, which is {goal.repetition:g} epochs"
        problems.say(COMMAND, "--tokens", f"{found} over every domain with a prior", "Raise --cap, or train for less")


def _named(path: Path, domains: Sequence[str], problems: Problems) -> np.ndarray:
    """Read a number, 0 or more, for each domain, (K,); the proportions that this command writes can be read as well."""
    origin, missing = Origin(path), np.ones(len(domains))
    try:
        read = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.say(origin, "", f"found {error}; expected a JSON file of names and numbers")
        return missing
    if isinstance(read, dict) and isinstance(read.get("proportions"), dict):
        read = read["proportions"]
    if not isinstance(read, dict):
        problems.say(origin, "", f"found {type(read).__name__}; expected a mapping of names to numbers")
        return missing
    for name in read.keys() - set(domains):
        problems.add_unknown(origin, name, "domain", domains)
    for name in domains:
        value = read.get(name, NOTHING)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
            problems.add(origin, name, "a finite number, 0 or more", value)
            read = {**read, name: 1}
    numbers = [float(read[name]) for name in domains]
    if sum(numbers) == 0:
        problems.say(origin, "", "found 0 for every domain; expected a number above 0")
    elif sum(numbers) > _MOST:
        problems.say(origin, "", "found numbers too large to add up; expected smaller ones")
    return np.array(numbers)


def _weights(text: str | None, metrics: Sequence[str], problems: Problems) -> np.ndarray:
    """Read `metric=weight,...`, (J,)."""
    if text is None:
        return np.ones(len(metrics))
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = math.nan
        if name not in metrics:
            near = did_you_mean(name, metrics)
            problems.say(
                COMMAND, "--weights", f"found {part.strip()!r}; expected metric=weight of {', '.join(metrics)}{near}"
            )
        elif not 0 <= found[name] < math.inf:
            problems.add(COMMAND, f"--weights {name}", "a finite number, 0 or more", number)
    if not any(found.values()):
        problems.add(COMMAND, "--weights", "a weight above 0", text)
    elif sum(found.values()) == math.inf:
        problems.add(COMMAND, "--weights", "weights that can be added up", text)
    return np.array([found.get(name, 0.0) for name in metrics])
