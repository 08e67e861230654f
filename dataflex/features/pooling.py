"""One vector per row out of its hidden states. B rows of a batch, T tokens, D numbers of a hidden state."""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex.features.cross_entropy import wide
from dataflex.features.spec import EmbeddingSpec


def pool(hidden: Tensor, mask: Tensor, spec: EmbeddingSpec) -> Tensor:
    """Return (B, D), at least float32, from hidden states (B, T, D) and a mask (B, T) that is False at padding.

    Source: position_weighted is RDS+ (arXiv 2503.01807): weights t / sum(t), t = 1..L over a row's tokens.
    """
    if spec.pooling == "last":
        # The last position that is no padding, on whichever side the row is padded.
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
        return wide(hidden[torch.arange(len(hidden), device=hidden.device), last])
    state = wide(hidden)
    if not bool(mask.all()):
        state = state.masked_fill(~mask[..., None], 0.0)  # 0 x NaN would be NaN
    weight = mask.to(state.dtype)
    if spec.pooling == "position_weighted":
        weight = weight.cumsum(dim=1) * weight
    weight = weight / weight.sum(dim=1, keepdim=True)
    return torch.bmm(weight[:, None], state).squeeze(1)
