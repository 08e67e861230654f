"""Which rows go through the model together, and the tensors they become. B rows of a batch, T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex.errors import DataflexError
from dataflex.fingerprint import IGNORE_INDEX


def plan_batches(lengths: Sequence[int] | np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Split rows into batches of at most `token_budget` tokens, padding included, but of at least one row.

    Rows of like length go together, the longest first, so that a batch too large for memory fails at once.

    Returns:
        Row positions per batch; together they are a permutation of `range(len(lengths))`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    at = 0
    while at < len(order):
        count = max(1, token_budget // max(1, int(lengths[order[at]])))
        batches.append(order[at : at + count])
        at += count
    return batches


def count_batches(lengths: Sequence[int] | np.ndarray, token_budget: int) -> int:
    """Return how many batches `plan_batches` makes; ranks that must step together agree on the largest."""
    return len(plan_batches(lengths, token_budget))


@dataclass(frozen=True)
class Batch:
    """Padded rows: B rows of T tokens, each (B, T) int64.

    Attributes:
        input_ids: tokens.
        attention_mask: 1 where a row attends, 0 at its padding.
        position_ids: 0, 1, 2, ... from each row's first token.
        targets: the label of the *next* token, or `IGNORE_INDEX`; a row's first token is never a target.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: Tensor


def collate(examples: Sequence[Mapping[str, Any]], pad_token_id: int, padding_side: str, device: torch.device) -> Batch:
    """Pad examples to the longest.

    Raises:
        DataflexError: an example is empty, its parts differ in length, or its mask holds packed-sequence numbers.
    """
    n, width = len(examples), max(len(e["input_ids"]) for e in examples)
    ids = np.full((n, width), pad_token_id, dtype=np.int64)
    mask, positions = np.zeros((2, n, width), dtype=np.int64)
    targets = np.full((n, width), IGNORE_INDEX, dtype=np.int64)
    for i, example in enumerate(examples):
        tokens, labels, attention = _parts(example)
        low = width - len(tokens) if padding_side == "left" else 0
        high = low + len(tokens)
        ids[i, low:high], mask[i, low:high] = tokens, attention
        positions[i, low:high] = np.arange(len(tokens))
        targets[i, low : high - 1] = labels[1:]  # shifted once here, so that losses need no copy of the logits
    return Batch(*(torch.from_numpy(a).to(device) for a in (ids, mask, positions, targets)))


def _parts(example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens = np.asarray(example["input_ids"], dtype=np.int64)
    labels = np.asarray(example["labels"], dtype=np.int64)
    given = example.get("attention_mask")
    attention = np.ones_like(tokens) if given is None else np.asarray(given, dtype=np.int64)
    if not len(tokens) or tokens.shape != labels.shape or tokens.shape != attention.shape:
        raise DataflexError(
            f"an example has {len(tokens)} tokens, {len(labels)} labels and a mask of {len(attention)}; "
            "the three must be equally long and not empty"
        )
    if attention.max() > 1:  # LLaMA-Factory numbers the sequences of a packed row 1, 2, ... in its mask
        raise DataflexError(
            f"an example's attention_mask holds {attention.max()}: it is several packed sequences, which the feature "
            "engine cannot keep apart; set `neat_packing: false`"
        )
    return tokens, labels, attention
