"""Whether FSDP2 deals a model's weights out: they are then whole only in the course of the model's own pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_dealt_out(model: Any) -> bool:
    """Say whether FSDP2 holds weights of a model."""
    return isinstance(model, nn.Module) and any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which this process may have a part alone. Collective if it has."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return what this process has of a tensor, which every process has whole, dealt out as `like` is."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def put_back(model: nn.Module) -> None:
    """Leave every process its own part of each weight, as it has it between two passes.

    FSDP2 may leave weights whole after a pass without gradients; they are copies then, perhaps of a lower precision.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
