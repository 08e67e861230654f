"""Similarity of training rows to target sets, block by block, each rank its share of the rows.

N training rows, b of them in a block, R some of them, J target sets of M_j rows, D numbers per vector. No N x M matrix
exists: inside a block the similarities to a set are reduced to one number at once. What travels between ranks is that
number per row and set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from dataflex import distributed
from dataflex.errors import ConfigError, CoverageError
from dataflex.selectors.base import View
from dataflex.selectors.parts.representation import Acts, Part

Similarity = Literal["cosine", "whitened_cosine", "inner_product", "l2"]
Within = Literal["mean", "max"]
WHITENED_MOST = 4096
"""Numbers per vector up to which vectors are whitened: the covariance is a D x D matrix."""
RIDGE = 1.0
"""Of eight Gaussian clusters (400 rows of 256 numbers) 1e-5 finds 0.31 of a cluster's rows, 0.1 finds 0.50, 1 finds
0.95; where the numbers' scales differ by orders of magnitude, 1 finds as many as the best ridge to within 0.06."""


class Compared(Part):
    """How vectors are compared."""

    only: ClassVar[Acts] = {"ridge": ("similarity", ("whitened_cosine",))}

    similarity: Similarity = Field("cosine", description="of a training row's vector and a target row's")
    ridge: float = Field(
        RIDGE,
        gt=0,
        description="whitened_cosine: added to the diagonal of the rows' covariance, times its mean; towards "
        "0 every direction counts alike, noise too; large ones give the cosine after subtracting the mean",
    )


def require_whitenable(width: int, of: str) -> None:
    """Refuse to whiten wide vectors.

    Args:
        width: their numbers.
        of: what they are, for the message.

    Raises:
        ConfigError: there are more than `WHITENED_MOST`.
    """
    if width > WHITENED_MOST:
        raise ConfigError(
            f"similarity: found whitened_cosine with {width} numbers per {of}; expected at most {WHITENED_MOST}, as "
            f"their covariance is a square matrix. Set proj_dim: {WHITENED_MOST} or less for gradients, or similarity: "
            "cosine"
        )


def set_scores(
    view: View, targets: Mapping[str, View], similarity: Similarity, within: Within, ridge: float = RIDGE
) -> np.ndarray:
    """Return the similarity of every row to every target set, (N, J) float64; -inf for rows without one. Collective.

    Args:
        view: the training rows.
        targets: target sets by name.
        similarity: of two vectors; `l2` is the negative squared Euclidean distance. `whitened_cosine` is the cosine
            after subtracting the training rows' mean and multiplying with the inverse Cholesky factor of their
            covariance, `ridge` times its mean diagonal added to the diagonal (after TAROT, arXiv 2412.00420, which adds
            1e-5 itself, does not centre, and counts the targets in).
        within: over the rows of a set: the mean of similarities (not the similarity to the mean), or the largest.
        ridge: of `whitened_cosine`, see `Compared`.

    Raises:
        CoverageError: a target set has no usable row.
        ConfigError: vectors of more than `WHITENED_MOST` numbers are to be whitened.
    """
    sets = {name: target_vectors(target, name) for name, target in targets.items()}
    ready = comparable(view, next(iter(sets.values())).shape[1], similarity, ridge)
    sets = {name: ready(vectors)[0] for name, vectors in sets.items()}
    found = []
    for rows, vectors in shared_blocks(view):
        block, usable = ready(vectors)
        columns = [_reduced(block, vectors, similarity, within) for vectors in sets.values()]
        found.append((rows[usable], np.stack(columns, axis=1)[usable]))
    return joined(found, len(view.status), len(sets))


def comparable(
    view: View, width: int, similarity: Similarity, ridge: float
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return the map from vectors (b, D) to those that products are taken of, and whether each is usable, (b,).

    `whitened_cosine` reads the training rows for it. Collective.

    Args:
        view: the training rows.
        width: D.
        similarity: as for `set_scores`.
        ridge: as for `set_scores`.

    Raises:
        ConfigError: vectors of more than `WHITENED_MOST` numbers are to be whitened.
    """
    prepare: Callable[[np.ndarray], np.ndarray] = (
        whitening(view, width, ridge) if similarity == "whitened_cosine" else _identity
    )

    def ready(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wide = vectors.astype(np.float64)
        usable = are_usable(wide)
        block = prepare(np.where(usable[:, None], wide, 0))  # whitening meets no NaN; whoever asks drops these rows
        if similarity in ("cosine", "whitened_cosine"):
            block, is_long = unit(block)
            usable &= is_long
        return block, usable

    return ready


def shared_blocks(view: View) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield this rank's share of a view: (rows (b,), vectors (b, D) float32)."""
    yield from view.blocks(part=(distributed.rank(), distributed.world()))


def joined(found: Sequence[tuple[np.ndarray, np.ndarray]], size: int, width: int) -> np.ndarray:
    """Return (size, width) float64 of what every rank found for its own rows; -inf where none did. Collective.

    Args:
        found: rows (b,) and values (b, width) of each block of this rank.
        size: rows in all.
        width: numbers per row.
    """
    out = np.full((size, width), -np.inf)
    # By row: blocks come in the order of storage, and the ranks' shares interleave.
    for shares in distributed.gather(list(found)):
        for rows, values in shares:
            out[rows] = values
    return out


def vectors_of(view: View, rows: np.ndarray, width: int = 1) -> np.ndarray:
    """Return the vectors of some rows, (R, D) float32, zero where a row is not usable; nothing else is read.

    Args:
        view: of the rows among others.
        rows: positions in it.
        width: of the zeros where no row at all is usable.
    """
    found = None
    for at, block in view.take(rows).blocks():
        if found is None:
            found = np.zeros((len(rows), block.shape[1]), np.float32)
        found[at] = block
    return np.zeros((len(rows), width), np.float32) if found is None else found


def target_vectors(view: View, name: str) -> np.ndarray:
    """Return a target set's usable vectors, (M, D) float64, in the order of its rows; zero vectors are left out.

    Raises:
        CoverageError: there is none.
    """
    parts = list(view.blocks())
    rows = np.concatenate([rows for rows, _ in parts]) if parts else np.empty(0, np.int64)
    vectors = np.concatenate([v for _, v in parts]).astype(np.float64)[np.argsort(rows)] if parts else np.empty((0, 0))
    keep = are_usable(vectors)
    if not keep.any():
        raise CoverageError(
            f"target set {name}: found no usable row; expected at least one with supervised tokens and a finite vector "
            "that is not zero"
        )
    return vectors[keep]


def unit(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors of length one, and whether each had a length, (b,) bool; the others stay zero."""
    norms = np.linalg.norm(vectors, axis=1).astype(vectors.dtype)  # so that float32 vectors stay float32
    is_long = np.isfinite(norms) & (norms > 0)
    return np.divide(vectors, norms[:, None], out=np.zeros_like(vectors), where=is_long[:, None]), is_long


def whitening(view: View, width: int, ridge: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the map x -> L^-1 (x - mean), L L^T = C + ridge tr(C) / D, C the covariance of training rows. Collective.

    Targets stay outside: a few that lie far off would stretch the covariance towards themselves, and so shorten just
    the direction that is asked about.

    Raises:
        ConfigError: the vectors have more than `WHITENED_MOST` numbers.
    """
    require_whitenable(width, "vector")
    count, total, square = 0, np.zeros(width), np.zeros((width, width))
    for _, vectors in shared_blocks(view):
        wide = vectors.astype(np.float64)
        wide = wide[are_usable(wide)]
        count, total, square = count + len(wide), total + wide.sum(axis=0), square + wide.T @ wide
    # Sums, not covariances, of each rank's share: they add up to those of all rows.
    parts = distributed.gather((count, total, square))
    count, total, square = (sum(column) for column in zip(*parts, strict=True))
    mean = total / max(1, count)
    covariance = square / max(1, count) - np.outer(mean, mean)
    # Relative to the mean variance, so that the same ridge fits vectors of any scale; above 0 even where all are alike.
    added = ridge * max(float(np.trace(covariance)) / width, np.finfo(np.float64).tiny)
    factor = np.linalg.cholesky(covariance + added * np.eye(width))
    return lambda vectors: np.linalg.solve(factor, (vectors - mean).T).T


def _reduced(block: np.ndarray, targets: np.ndarray, similarity: Similarity, within: Within) -> np.ndarray:
    """Reduce a block's similarities to the rows of a target set to one number per row, (b,)."""
    # A mean of products is the product with the mean vector: D operations a row in place of M_j D.
    if within == "max":
        return pairs(block, targets, similarity).max(axis=1)
    products = block @ targets.mean(axis=0)
    if similarity != "l2":
        return products
    return 2 * products - (block**2).sum(axis=1) - (targets**2).sum(axis=1).mean()


def pairs(block: np.ndarray, targets: np.ndarray, similarity: Similarity) -> np.ndarray:
    """Return the similarity of every comparable vector of a block to every target row's, (b, M)."""
    products = block @ targets.T
    if similarity != "l2":
        return products
    return 2 * products - (targets**2).sum(axis=1) - (block**2).sum(axis=1)[:, None]


def are_usable(vectors: np.ndarray) -> np.ndarray:
    """Say which vectors can be compared, (b,) bool; a zero vector stands for a missing one, under every similarity."""
    return np.asarray(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1))


def _identity(vectors: np.ndarray) -> np.ndarray:
    return vectors
