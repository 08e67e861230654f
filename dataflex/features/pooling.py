"""One vector per row out of its hidden states. B rows, T tokens, H numbers per state."""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex.features.cross_entropy import wide
from dataflex.features.spec import EmbeddingSpec


def pool(hidden: Tensor, mask: Tensor, spec: EmbeddingSpec) -> Tensor:
    """Return (B, H), at least float32, from hidden states (B, T, H) and a mask (B, T) that is False at padding.

    Source: position_weighted is RDS+ (arXiv 2503.01807): weights t / sum(t), t = 1..L over a row's tokens.
    """
    if spec.pooling == "last":
        # The last position that is no padding, on whichever side the row is padded.
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
        return wide(hidden[torch.arange(len(hidden), device=hidden.device), last])
    state = wide(hidden)
    if not bool(mask.all()):
        state = state.masked_fill(~mask[..., None], 0.0)  # 0 x NaN would be NaN
    weight = _weights(mask, state.dtype, by_position=spec.pooling == "position_weighted")
    return torch.bmm(weight[:, None], state).squeeze(1)


def exact_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Return the position-weighted mean of each row's hidden states, (B, H) float64; NaN of a row without tokens.

    In float64, so that an example's weight hardly depends on the rows that it is padded with.

    Args:
        states: (B, T, H).
        mask: (B, T), true at real tokens; t = 1, 2, ... counts them alone, wherever the padding is.
    """
    real = mask.bool()
    weight = _weights(real, torch.float64, by_position=True)
    # Row by row, as float64 of all states is four times what the model holds; 0 x NaN at padding would be NaN.
    rows = zip(weight, states.detach(), real, strict=True)
    return torch.stack([w @ h.double().masked_fill(~m[:, None], 0.0) for w, h, m in rows])


def _weights(mask: Tensor, dtype: torch.dtype, by_position: bool) -> Tensor:
    """Return the share of each token in its row's mean, (B, T), 0 at padding."""
    weight = mask.to(dtype)
    if by_position:
        weight = weight.cumsum(dim=1) * weight
    return weight / weight.sum(dim=1, keepdim=True)
