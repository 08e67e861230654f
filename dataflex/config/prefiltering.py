"""A prefilter before a selector: refused where it would save nothing, cost as much, or could say nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dataflex.config.component import Component
from dataflex.config.problems import Origin, Problems
from dataflex.features.spec import FeatureSpec


def check_prefilter(
    method: Component[Any], prefilter: Component[Any], policy: str, origin: Origin, problems: Problems
) -> None:
    """Add what is wrong to the problems.

    Args:
        method: the run's selector.
        prefilter: the one before it.
        policy: how features are refreshed.
        origin: where they were written.
        problems: takes what is wrong.
    """

    def refuse(expected: str, why: str) -> None:
        problems.add(origin, "dataflex.prefilter.method", expected, prefilter.name, why=why)

    of_rows = [*(need.spec for need in method.needs if need.of == "train"), *method.method.asked]
    if method.method.declares_needs and not costly(of_rows):
        why = f"{method.name} asks for no gradients of training rows, so fewer rows would save nothing"
        problems.add(origin, "dataflex.prefilter", "no such key", prefilter.name, why=why)
    if not method.method.declares_needs:
        why = f"{method.name} is a class of the classic interface, which computes what it needs itself"
        problems.add(origin, "dataflex.prefilter", "no such key", prefilter.name, why=why)
    own = [*(need.spec for need in prefilter.needs), *prefilter.method.asked]
    if costly(own):
        refuse("a method without gradients, such as rds_plus", "It is there so that few rows need one")
    if not any(need.of == "train" for need in prefilter.needs):
        refuse("a method that scores rows by features, such as rds_plus", "It has no score by which rows are ranked")
    if policy != "full" and any(need.state is None for need in prefilter.needs):
        why = f"Under refresh policy {policy} the same rows must be kept at every update, and the live model changes"
        refuse("a method that looks at the base model alone, such as rds_plus", why)


def costly(specs: Iterable[FeatureSpec]) -> bool:
    """Say whether a backward pass is needed for one of the features."""
    return any(spec.gradient is not None for spec in specs)
