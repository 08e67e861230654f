"""Files among the parameters of selectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from dataflex.errors import MismatchError


def _existing(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError("a file that exists, relative to the working folder")
    return path


ExistingFile = Annotated[str, AfterValidator(_existing)]
"""Path of a file; checked with the run file, before anything is loaded."""


def load_array(path: str) -> np.ndarray:
    """Read a .npy file; one that holds Python objects is refused.

    Raises:
        MismatchError: it is no array.
    """
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise MismatchError(f"{path}: no NumPy array ({error}); expected a file written by numpy.save") from error
