"""How long runs take from start to end, with all that belongs to them: as far as one launch has seen it."""

from __future__ import annotations

from collections.abc import Iterable

from dataflex.pipelines.comparing.plans import Plan


class Walls:
    """Seconds of the processes of runs that this launch has made.

    Args:
        parts: every run and choice, before the first of them begins.
    """

    def __init__(self, parts: Iterable[Plan]):
        self._earlier = {part.trial.name for part in parts if part.trial.folder.exists()}
        self._took: dict[str, float] = {}

    def ended(self, part: Plan, seconds: float) -> None:
        """Note how long a run or a choice took in this launch."""
        self._took[part.trial.name] = seconds

    def seen(self, plan: Plan) -> float:
        """Return what this launch has seen of a run and its choice, in seconds."""
        return sum(self._took.get(part.trial.name, 0.0) for part in plan.parts)

    def whole(self, plan: Plan) -> float | None:
        """Return the same, if that is all of it; None where an earlier launch has begun a part, or made it."""
        names = [part.trial.name for part in plan.parts]
        is_whole = all(name in self._took and name not in self._earlier for name in names)
        return self.seen(plan) if is_whole else None
