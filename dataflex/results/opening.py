"""What a training writes of itself at its first step: a start that is refused before leaves all that was there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from dataflex.results.names import MIXTURE, ROWS, SUMMARY, TEST

_waiting: list[Callable[[int], None]] = []


def at_first_step(act: Callable[[int], None]) -> None:
    """Have something done at the first step of the training that is beginning; it is told how many came before."""
    _waiting.append(act)


def step_begins(before: int) -> None:
    """Do what waits for the first step, `before` steps having been done by an earlier launch."""
    acts, _waiting[:] = list(_waiting), []
    for act in acts:
        act(before)


@contextlib.contextmanager
def beginning() -> Iterator[None]:
    """Forget, when the block ends, what has not been done: the training did not come to its first step."""
    try:
        yield
    finally:
        _waiting.clear()


def clear(folder: Path, keeps_rounds: bool, keeps_mixture: bool) -> None:
    """Remove what an earlier training left in a folder and this one, which begins anew, does not write itself.

    Args:
        folder: the run's.
        keeps_rounds: whether the rounds there are this training's already.
        keeps_mixture: whether the mixture's log is.
    """
    names = [SUMMARY, ROWS, TEST, *([] if keeps_mixture else [MIXTURE, "mixture_proportions.json"])]
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if not keeps_rounds and (folder / "rounds").is_dir():
        shutil.rmtree(folder / "rounds")
