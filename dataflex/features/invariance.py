"""Whether padding, or the other rows of its batch, move an example's loss and gradient, as some kernels make them.

N rows, K numbers of a projected gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import FeatureValues, GradientSpec, LossSpec
from dataflex.fingerprint import IGNORE_INDEX
from dataflex.rows import Status

CONDITIONS = {
    "again": "each row alone, once more",
    "padded": "each row alone, padded to twice the longest",
    "together": "all rows in one batch",
    "permuted": "all rows in one batch, in the opposite order",
}
"""Ways of computing what each row alone, without padding, gives; `again` shows what no care can avoid."""


@dataclass(frozen=True)
class Moved:
    """How far values under one condition are from those of each row alone: the largest of the rows.

    Attributes:
        gradient: of the projected gradients, the norm of the difference over the norm.
        loss: of the losses, likewise.
    """

    gradient: float
    loss: float

    @property
    def most(self) -> float:
        """The larger of the two."""
        return max(self.gradient, self.loss)


def chosen_rows(lengths: np.ndarray, tokens: int, most: int = 8) -> np.ndarray:
    """Return rows from short to long whose batch, every row padded to the longest, has at most so many tokens.

    Args:
        lengths: (R,) tokens of each row that may be chosen.
        tokens: of the batch; a row that has half of them or more is left out, unless all have.
        most: rows at most.

    Returns:
        Positions in `lengths`, two or more where there are as many.
    """
    order = np.argsort(lengths, kind="stable")
    fitting = order[lengths[order] <= tokens // 2]
    order = fitting if len(fitting) >= 2 else order[:2]
    longest = max(1, int(lengths[order[-1]]))
    count = min(max(2, min(most, tokens // longest)), len(order))
    return np.asarray(order[np.linspace(0, len(order) - 1, count).round().astype(int)])


def moved(engine: FeatureEngine, examples: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Moved]:
    """Return how far the features of N examples move under each of `CONDITIONS`.

    Gradients are projected to 8192 numbers, which keeps ratios of norms to about a percent. The engine's token budget
    has to hold all examples in one batch.

    Raises:
        DataflexError: the model has no exact per-example gradient.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    get_base: Any = getattr(engine.model, "get_base_model", lambda: engine.model)
    # Where positions are learned, they end.
    room = getattr(get_base().config.get_text_config(), "max_position_embeddings", None) or 2 * longest
    padded = [_padded(example, max(longest, min(2 * longest, room)), pad_token_id) for example in examples]
    backwards = [_padded(example, longest, pad_token_id) for example in reversed(examples)]
    alone = _each(engine, examples)
    return {
        "again": _apart(alone, _each(engine, examples)),
        "padded": _apart(alone, _each(engine, padded)),
        "together": _apart(alone, _values(engine, examples)),
        "permuted": _apart(alone, [part[::-1] for part in _values(engine, backwards)]),
    }


def _padded(example: Mapping[str, Any], width: int, pad_token_id: int) -> dict[str, Any]:
    """Return an example with padding of its own, so that the engine takes it for one of that width."""
    mask = example.get("attention_mask") or [1] * len(example["input_ids"])
    more = width - len(example["input_ids"])
    return {
        "input_ids": [*example["input_ids"], *[pad_token_id] * more],
        "labels": [*example["labels"], *[IGNORE_INDEX] * more],
        "attention_mask": [*mask, *[0] * more],
    }


def _each(engine: FeatureEngine, examples: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    parts = [_values(engine, [example]) for example in examples]
    return [np.concatenate(several) for several in zip(*parts, strict=True)]


def _values(engine: FeatureEngine, examples: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Return losses (N, 1) and projected gradients (N, K) in float64, NaN of a row that has none."""
    losses, gradients = engine.compute(examples, [LossSpec(), GradientSpec()])
    assert gradients.vectors is not None
    return [_known(losses, losses.scalars["loss_sum"][:, None]), _known(gradients, gradients.vectors)]


def _known(values: FeatureValues, found: np.ndarray) -> np.ndarray:
    return np.where((values.status == Status.OK)[:, None], found.astype(np.float64), np.nan)


def _apart(alone: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Moved:
    loss, gradient = (_largest(a, b) for a, b in zip(alone, other, strict=True))
    return Moved(gradient, loss)


def _largest(alone: np.ndarray, other: np.ndarray) -> float:
    """Return the largest relative difference of the rows; infinite where only one side has a value, or is not zero."""
    known = np.isfinite(alone).all(axis=1)
    if (known != np.isfinite(other).all(axis=1)).any():
        return float("inf")
    apart, size = (np.linalg.norm(each[known], axis=1) for each in (other - alone, alone))
    ratios = np.divide(apart, size, out=np.where(apart > 0, np.inf, 0.0), where=size > 0)
    return float(ratios.max(initial=0.0))
