"""What a check finds, and how it is mended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dataflex.stores.files import Files

CURE = "`dataflex store repair` removes what is damaged, `dataflex featurize` computes it again"


@dataclass(frozen=True)
class Problem:
    """Something under a root that should not be there, or is not what it should be.

    Attributes:
        path: where it lies, relative to the root.
        what: the problem in words.
        harmless: true for files that no reader ever opens; a crash or a lost race leaves such files.
        aside: path to rename, because something else lies there where a folder belongs; empty if there is none.
        remove: files to remove, in this order, so that the rows or the state concerned count as missing.
        put: path and content of a document to write after that, replacing what is there.
    """

    path: str
    what: str
    harmless: bool = False
    aside: str = ""
    remove: tuple[str, ...] = ()
    put: tuple[str, bytes] | None = None

    def __str__(self) -> str:
        return self.what

    @property
    def is_mendable(self) -> bool:
        """Whether `mend` does anything about it."""
        return bool(self.aside or self.remove) or self.put is not None


def mend(files: Files, problems: Iterable[Problem]) -> None:
    """Mend what can be mended; harmless leftovers stay: another writer may be about to commit them."""
    for problem in problems:
        if problem.aside:
            files.put_aside(problem.aside)
        for path in problem.remove:
            files.remove(path)
        if problem.put is not None:
            path, data = problem.put
            if files.misplaced(path, "file"):
                files.remove(path)
            with files.output(path) as file:
                file.write(data)
