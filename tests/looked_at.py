"""One store, as `dataflex store verify` and `repair` see it when they look at all of its root."""

from __future__ import annotations

from collections.abc import Iterable

from dataflex.stores.parquet import ParquetStore
from dataflex.stores.problem import Problem
from dataflex.stores.upkeep.inspection import Inspected, inspect, repair


def problems(store: ParquetStore) -> list[Problem]:
    """Return what is wrong with a store, harmless leftovers included."""
    return _of(store, inspect(store.files))


def faults(store: ParquetStore) -> list[Problem]:
    """Return what is wrong with a store and not harmless."""
    return [problem for problem in problems(store) if not problem.harmless]


def repaired(store: ParquetStore) -> list[Problem]:
    """Mend what is wrong under the root of a store; return what was wrong with the store itself."""
    return _of(store, repair(store.files))


def _of(store: ParquetStore, parts: Iterable[Inspected]) -> list[Problem]:
    (part,) = [part for part in parts if part.name == store.folder]
    assert not part.unread
    return list(part.problems)
