"""A finding of `dataflex doctor`: how a package or place is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]

TESTED = "`pip install '.[cpu]' -c constraints.txt` in a clone of DataFlex installs versions that were tested together"
"""What to do about versions; `.[gpu]` in place of `.[cpu]` where the index of vectors is to use a GPU."""


@dataclass(frozen=True)
class Finding:
    """What was found, and what to do about it.

    Attributes:
        level: ok; warning: a run works, or some of them do; error: none does.
        about: the package or place.
        found: one line.
        advice: one line, empty where nothing is to be done.
    """

    level: Level
    about: str
    found: str
    advice: str = ""

    def lines(self) -> list[str]:
        """Return the one or two lines that people read."""
        margin = " " * 9
        return [f"{self.level:<9}{self.about}: {self.found}", *([margin + self.advice] if self.advice else [])]
