"""A NumPy array that a parameter names."""

from __future__ import annotations

import numpy as np

from dataflex.errors import MismatchError


def load_array(path: str) -> np.ndarray:
    """Read a .npy file; one that holds Python objects is refused.

    Raises:
        MismatchError: it is no array.
    """
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise MismatchError(f"{path}: no NumPy array ({error}); expected a file written by numpy.save") from error
