"""Methods that never act, because a warm-up is longer than the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex.config.keys import FlatKeys
from dataflex.method import Method
from dataflex.schedule import Schedule


def known_steps(flat: FlatKeys, schedule: Schedule, llamafactory: Mapping[str, Any]) -> int | None:
    """Return the optimizer steps of a run, or None if they follow from its rows."""
    if flat.train_type == "dynamic_weight":
        steps = flat.train_step or llamafactory.get("max_steps") or 0
        return steps if steps > 0 else None
    return None if schedule.needs_rows else schedule.total()


def idle_note(name: str, method: Method, schedule: Schedule, total: int) -> str | None:
    """Say why a method has no effect in a run of so many steps; None if it has one, as far as can be told.

    It is asked at `warmup_step` and, a mixer, every `update_step` steps after it; what it answers holds for the steps
    that follow. One that lives on losses has none before the first step.

    Args:
        name: what the run file calls it.
        method: the method; one of the classic interface does not tell more than its schedule does.
        schedule: of the run.
        total: optimizer steps of the run.
    """
    first, interval = schedule.warmup_step, schedule.update_step
    if first >= total:
        why, lower = f"warmup_step is {first}", "warmup_step"
    elif (own := method.idle_steps) >= total:
        why, lower = f"it stays at the initial proportions for {own} steps", " or ".join(method.idle_by)
    elif method.watches and not method.acts_at_start and first == 0 and interval >= total:
        why, lower = f"the first losses that it sees are those of step {interval}", "update_step"
    else:
        return None
    return f"{name} has no effect: {why}, and the run has {total}. Lower {lower}, or train for longer"
