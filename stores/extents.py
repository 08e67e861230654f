"""Parts of files, and the fewest requests that fetch them."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex.stores.files import Extent

GAP = 64 << 10
"""Bytes between two parts that are fetched along with them: in its time a request costs as much as some 1 MB."""
LONGEST = 16 << 20
"""Bytes that parts are merged up to: beyond it several requests at a time are faster than one."""


def merged(wanted: Sequence[Extent]) -> dict[Extent, list[int]]:
    """Return what to ask for -> the numbers of the parts in it. What is wanted as one part is asked for as one."""
    found: dict[Extent, list[int]] = {}
    last: Extent | None = None
    for number in sorted(range(len(wanted)), key=lambda number: wanted[number][:2]):
        path, start, stop = wanted[number]
        part = path, start, stop if stop is None else max(stop, start + 1)  # no range of a request is empty
        joined = None if last is None else _joined(last, part)
        inside = found.pop(last) if last is not None and joined is not None else []
        last = joined or part
        found.setdefault(last, inside).append(number)
    return found


def _joined(first: Extent, second: Extent) -> Extent | None:
    """Return one request for two parts, of which the second does not begin earlier; None where that is too much."""
    (path, begin, end), (name, start, stop) = first, second
    if path != name or end is None or stop is None:
        return first if first == second else None
    whole = max(end, stop)
    is_near = start - end <= GAP and whole - begin <= LONGEST
    return (path, begin, whole) if whole == end or is_near else None
