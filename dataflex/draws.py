"""Random draws that are a function of a seed and names alone, on every machine."""

from __future__ import annotations

import numpy as np


def generator(seed: int, *names: int | str) -> np.random.Generator:
    """Return a random generator that is a function of its arguments alone, on every machine."""
    # The number of names is a part: names become several words each, and ("a", "b") must not draw what ("ab",) does.
    words = [w for name in names for w in (name.encode() if isinstance(name, str) else [name])]
    # PCG64 by name, as NumPy may make another generator the one of `default_rng`.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, len(names), *words])))


def stream(rows: np.ndarray, start: int, count: int, seed: int, *names: int | str) -> np.ndarray:
    """Return `count` entries, from `start` on, of an endless pass over `rows`: each pass a new permutation."""
    size = len(rows)
    first, last = start // size, (start + count - 1) // size
    passes = [rows[generator(seed, *names, number).permutation(size)] for number in range(first, last + 1)]
    return np.concatenate(passes)[start - first * size :][:count]
