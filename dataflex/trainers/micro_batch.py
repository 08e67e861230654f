"""What the training forward of one micro-batch gave.

B examples of a micro-batch of this rank, T tokens, hidden size H.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataflex.errors import DataflexError
from dataflex.weighters.base import Examples

ROWS = "dataflex_rows"
"""Column of the training set, and key of a batch: the position of each example in the training set."""


@dataclass(frozen=True)
class MicroBatch:
    """What the training forward of one micro-batch gave; `losses` carries the gradient.

    Attributes:
        rows: (B,) int64.
        losses: (B, T) token losses, 0 where there is no target.
        targets: (B, T) int64, label of the next token; negative where there is none.
        states: (B, T, H) last hidden states without gradient, if they are wanted.
        inputs: what the model was fed, without labels.
        items: what this rank's sum of token losses is divided by: the step's tokens on all ranks, or on this one; for
            a model whose plain loss is a mean of means, those of this micro-batch times the number of micro-batches.
        micro_batches: G of this step.
        rank_scale: undoes the mean over ranks that Transformers takes where `items` counts this rank's tokens only: the
            world size then, else 1.
    """

    rows: Tensor
    losses: Tensor
    targets: Tensor
    states: Tensor | None
    inputs: Mapping[str, Tensor]
    items: Tensor
    micro_batches: int
    rank_scale: int

    @property
    def is_target(self) -> Tensor:
        """(B, T) bool."""
        return self.targets >= 0

    @property
    def examples(self) -> Examples:
        """The same per example, without gradient."""
        sums = self.losses.detach().sum(dim=1, dtype=torch.float64)
        mask = self.inputs.get("attention_mask") if self.states is not None else None
        return Examples(self.rows, sums, self.is_target.sum(dim=1), self.states, None if mask is None else mask.bool())


@contextmanager
def capturing(model: Any) -> Iterator[list[Tensor]]:
    """Collect what enters a model's output embedding meanwhile: its last hidden states.

    Raises:
        DataflexError: it has no output embedding.
    """
    states: list[Tensor] = []
    head = model.get_output_embeddings()
    if head is None:
        raise DataflexError("the model has no output embedding; the last hidden states cannot be read")
    handle = head.register_forward_pre_hook(lambda _, given: states.append(given[0].detach()))
    try:
        yield states
    finally:
        handle.remove()
