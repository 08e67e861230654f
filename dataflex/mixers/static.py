"""Proportions that do not change: given, even, by size, tempered, or with a limit on repetition. K domains."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dataflex.components.params import Parameters
from dataflex.components.registry import did_you_mean
from dataflex.errors import ConfigError
from dataflex.mixers.base import MixContext, NativeMixer, normalised

Weights = list[float] | dict[str, float]


class Static(NativeMixer):
    """The proportions of the run file, or those that another run wrote."""

    class Params(Parameters):
        """Parameters of `static`."""

        proportions: Weights | str | None = Field(
            None,
            description="weights in the order of the domains, or by name, or a JSON file of weights by name such as "
            "DoReMi writes; normalised. Default: init_mixture_proportions, else by size",
        )

    def check(self, names: Sequence[str], unit: str) -> list[str]:
        """Return what is wrong with the parameters for domains of these names, and proportions in `unit`."""
        given = self.params.proportions
        problems = weight_problems(given, names, "proportions")
        if isinstance(given, str) and not problems and (other := _read(given)[1]) not in (None, unit):
            problems.append(
                f"proportions ({given}): found shares of {other}; the run's are of {unit}. Set dataflex.mixture.unit: "
                f"{other}"
            )
        return problems

    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Return the given proportions.

        Raises:
            ConfigError: they do not fit the domains.
        """
        given, domains = self.params.proportions, context.domains
        if problems := self.check(domains.names, domains.unit):
            raise ConfigError("\n".join(problems))
        return context.initial if given is None else proportions_of(given, domains.names, "proportions")


class Uniform(NativeMixer):
    """The same share for every domain."""

    class Params(Parameters):
        """Parameters of `uniform`: none."""

    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Return 1 / K each."""
        return normalised(np.ones(len(context.domains)))


class Stratified(NativeMixer):
    """Shares by size, in rows or tokens as the run's proportions are: what other mixtures have to beat.

    Source: the baseline that no method beats on every data set in Aioli (arXiv 2411.05735).
    """

    class Params(Parameters):
        """Parameters of `stratified`: none."""

    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Return shares by size."""
        return context.domains.natural


class Temperature(NativeMixer):
    """Shares by size to the power 1 / tau: small domains more often than by size.

    Source: multilingual BERT and mT5 (arXiv 2010.11934).
    """

    class Params(Parameters):
        """Parameters of `temperature`."""

        tau: float = Field(
            10 / 3, ge=1, description="1: by size; towards infinity: uniform. Default: mT5's exponent of 0.3"
        )

    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Return tempered shares."""
        return normalised(context.domains.natural ** (1 / self.params.tau))


class Unimax(NativeMixer):
    """As even as can be without any domain being repeated more than some epochs.

    Source: UniMax (arXiv 2304.09151), algorithm 1. A budget beyond `epochs` passes over everything leaves shares by
    size, which repeats all domains alike.
    """

    class Params(Parameters):
        """Parameters of `unimax`."""

        epochs: float = Field(1.0, gt=0, description="most passes over a domain")
        budget: float | None = Field(
            None, gt=0, description="what the run draws in all, in the unit of the proportions. Default: from its steps"
        )

    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Return the shares; `budget` among kwargs is what the run draws in all, in the unit of the proportions.

        Raises:
            ConfigError: no budget is known.
        """
        budget = kwargs.get("budget") if self.params.budget is None else self.params.budget
        if budget is None:
            raise ConfigError(
                f"unimax: found no budget; expected what the run draws in all, in {context.domains.unit}; "
                "set dataflex.params.budget"
            )
        sizes = context.domains.sizes
        left, shares = float(budget), np.zeros(len(sizes))
        # The smallest first: what a small domain cannot take is shared by those that are left.
        for visited, domain in enumerate(np.argsort(sizes, kind="stable")):
            shares[domain] = min(left / (len(sizes) - visited), self.params.epochs * sizes[domain])
            left -= shares[domain]
        return normalised(shares)


def proportions_of(given: Weights | str, names: Sequence[str], key: str) -> np.ndarray:
    """Return weights in the order of `names`, normalised, (K,) float64; errors name the parameter `key`.

    Raises:
        ConfigError: they do not fit the names, cannot be read, or are no weights.
    """
    problems = weight_problems(given, names, key)
    if problems:
        raise ConfigError("\n".join(problems))
    found = _read(given)[0] if isinstance(given, str) else given
    return normalised([found[name] for name in names] if isinstance(found, Mapping) else found)


def weight_problems(given: Weights | str | None, names: Sequence[str], key: str) -> list[str]:
    """Return every reason why weights, a file of them, or None do not suit the domains; [] if they do."""
    if given is None:
        return []
    where = f"{key} ({given})" if isinstance(given, str) else key
    try:
        found = _read(given)[0] if isinstance(given, str) else given
    except ConfigError as error:
        return [f"{key}: {error}"]
    if isinstance(found, Mapping):
        values, problems = found, unknown_names(found, names, where)
        if missing := [name for name in names if name not in found]:
            problems.append(f"{where}: nothing for {', '.join(missing)}; 0 leaves a domain out")
    else:
        values, problems = dict(zip(map(str, range(len(found))), found, strict=True)), []
        if len(found) != len(names):
            problems.append(
                f"{where}: found {len(found)} numbers; expected {len(names)}, one each for {', '.join(names)}"
            )
    bad = {name: value for name, value in values.items() if not _is_weight(value)}
    if bad:
        problems.append(f"{where}: found {bad}; expected finite numbers, 0 or more")
    elif not problems and not 0 < sum(values.values()) < math.inf:
        problems.append(f"{where}: all weights are 0, or too small or large to add up; expected one above 0")
    return problems


def unknown_names(found: Mapping[str, Any], names: Sequence[str], key: str) -> list[str]:
    """Return a problem for each name that no domain has."""
    unknown = [f"{name!r}{did_you_mean(name, names)}" for name in found if name not in names]
    return [f"{key}: found no domain {name}; expected {', '.join(names)}" for name in unknown]


def _is_weight(value: Any) -> bool:
    # Against the largest float, as `math.isfinite` raises on a whole number that is larger.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _read(path: str) -> tuple[dict[str, Any], str | None]:
    """Return weights by name, and the unit that the file says they are shares of."""
    unit = None
    try:
        found = json.loads(Path(os.path.expanduser(path)).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; expected a JSON file of weights by domain") from error
    if isinstance(found, dict) and isinstance(found.get("proportions"), dict):
        found, unit = found["proportions"], found.get("unit")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: found {type(found).__name__}; expected an object: domain -> weight")
    return found, unit
