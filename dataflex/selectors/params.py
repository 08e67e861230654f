"""Types of parameters that several selectors have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def _existing(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError("a file that exists, relative to the working folder")
    return path


ExistingFile = Annotated[str, AfterValidator(_existing)]
"""Path of a file; checked with the run file, before anything is loaded."""
