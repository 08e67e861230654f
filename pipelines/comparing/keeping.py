"""The table that is kept, as the runs of a comparison end: what cannot be added now is added by the next launch."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from dataflex.errors import DataflexError
from dataflex.pipelines.comparing.kept import Kept
from dataflex.pipelines.comparing.plans import Plan
from dataflex.pipelines.comparing.records import records_of

log = logging.getLogger(__name__)


class Keeping:
    """Puts finished runs into a table, and ends no other run where that fails.

    Args:
        kept: the table.
    """

    def __init__(self, kept: Kept):
        self._kept = kept
        self._missing: list[tuple[str, OSError | DataflexError]] = []

    def known(self, plans: Collection[Plan], finished: Mapping[str, bool]) -> dict[str, list[dict[str, Any]]]:
        """Return by name the records of the runs that the table has; what is finished here and not in it, is added."""
        known: dict[str, list[dict[str, Any]]] = {}
        for plan in plans:
            assert plan.everywhere is not None
            found = self._kept.find(plan.trial, plan.everywhere)
            if found is not None:
                known[plan.trial.name] = found
            elif finished[plan.trial.name]:
                self.add(plan, None)
        wanted = [(plan.trial, plan.everywhere) for plan in plans if plan.everywhere is not None]
        if text := self._kept.others(wanted):
            log.warning("%s", text)
        return known

    def add(self, plan: Plan, wall: float | None) -> None:
        """Add a finished run, with the seconds that one launch has seen all of; warn where that cannot be done."""
        assert plan.everywhere is not None
        try:
            self._kept.add(plan.everywhere, records_of(plan.trial), wall)
        except (OSError, DataflexError) as error:
            self._missing.append((plan.trial.name, error))
            log.warning("%s: finished, and not added to %s: %s", plan.trial.name, self._kept.path, error)

    def judge(self) -> None:
        """Raise if a finished run could not be added.

        Raises:
            DataflexError: of the kind of the first error.
        """
        if not self._missing:
            return
        name, error = self._missing[0]
        kind = type(error) if isinstance(error, DataflexError) else DataflexError
        raise kind(
            f"--table: {self._kept.path}: {len(self._missing)} finished runs could not be added; the first, {name}: "
            f"{error}\n  they are finished where they are; the same command adds them"
        )
