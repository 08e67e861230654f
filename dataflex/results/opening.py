"""What a training writes of itself at its first step: a start that is refused before leaves all that was there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from dataflex.results.names import MIXTURE, ROWS, SUMMARY, TEST

_waiting: list[tuple[Callable[[int], None], Callable[[], None]]] = []
_depth = 0


def at_first_step(act: Callable[[int], None], otherwise: Callable[[], None] = lambda: None) -> None:
    """Have something done at the first step of the training that is beginning.

    Args:
        act: done then; it is told how many steps came before. Outside `beginning` nothing waits, and it is never done.
        otherwise: done if the training ends before its first step.
    """
    if _depth:
        _waiting.append((act, otherwise))


def step_begins(before: int) -> None:
    """Do what waits for the first step, `before` steps having been done by an earlier launch."""
    acts, _waiting[:] = list(_waiting), []
    for act, _ in acts:
        act(before)


@contextlib.contextmanager
def beginning() -> Iterator[None]:
    """Let things wait for the first step inside the block; where it was not reached by its end, undo what was prepared.

    A block inside another one changes nothing.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            undone, _waiting[:] = list(reversed(_waiting)), []
            for _, otherwise in undone:
                otherwise()


def set_aside(path: Path) -> None:
    """Take a file or folder of an earlier training out of the way; it is removed at the first step, or given back."""
    give_back(path)
    if not _depth:
        _remove(path)
    elif path.exists():
        os.rename(path, _aside(path))
        at_first_step(lambda _: _remove(_aside(path)), lambda: give_back(path))


def give_back(path: Path) -> None:
    """Undo `set_aside`, also of a process that was killed before its first step."""
    if _aside(path).exists():
        _remove(path)
        os.rename(_aside(path), path)


def clear(folder: Path, keeps_rounds: bool, keeps_mixture: bool) -> None:
    """Remove what an earlier training left in a folder and this one, which begins anew, does not write itself.

    Args:
        folder: the run's.
        keeps_rounds: whether the rounds there are this training's already.
        keeps_mixture: whether the mixture's log is.
    """
    names = [SUMMARY, ROWS, TEST, *([] if keeps_rounds else ["rounds"])]
    for name in [*names, *([] if keeps_mixture else [MIXTURE, "mixture_proportions.json"])]:
        _remove(folder / name)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.earlier")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
