"""Tickets: numbers that the ranks of a job draw from the key-value store that they met at, each for one piece of work.

Nobody is dealt a share, so a slow rank takes fewer. Near the end it takes none where the others, by what they drew
beside it so far, have done the rest before it would have done one: else all of them wait for the last one that it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from dataflex import distributed

_PAUSE = 0.05
"""Seconds until a rank that leaves the rest to others looks again."""

_drawings = 0


def tickets(count: int, is_over: Callable[[], bool] = lambda: False) -> Iterator[int]:
    """Yield numbers below `count`, each on one rank alone, to whichever asks next. All ranks begin it alike.

    It waits for nobody but where the rest is left to others: then for as long as they are expected to need.

    Args:
        count: how many there are.
        is_over: asked before each; true ends it, with what has not been drawn left.
    """
    global _drawings
    _drawings += 1  # ranks come to the same drawings in the same order, so this names one on all of them
    met, name = distributed.store(), f"dataflex/tickets/{_drawings}"
    first, begun, mine = 0, 0.0, 0
    while not is_over():
        if mine and met is not None:
            drawn, each = int(met.add(name, 0)), (time.monotonic() - begun) / mine
            share = worth_waiting((drawn - first - mine) / mine, count - drawn, distributed.world() - 1)
            until = time.monotonic() + each * share
            while time.monotonic() < until and int(met.add(name, 0)) < count and not is_over():
                time.sleep(min(_PAUSE, each / 10))
        number = mine if met is None else int(met.add(name, 1)) - 1
        if number >= count or is_over():
            return
        if not mine:
            first, begun = number, time.monotonic()
        mine += 1
        yield number


def worth_waiting(beside: float, left: int, others: int) -> float:
    """Return for how long a rank leaves what is left to others, in units of what a ticket takes it; 0: not at all.

    Args:
        beside: tickets that the others drew for each of its own.
        left: tickets to be drawn.
        others: how many other ranks there are.
    """
    rest = left + others  # each of them has one in hand first
    return rest / beside if 0 < rest < beside else 0.0
