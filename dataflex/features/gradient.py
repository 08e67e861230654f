"""Per-example gradients of every trainable parameter out of one batched backward pass, reduced as they come.

Let y = x W^T + b be a linear layer and gy the gradient of the batch's summed losses at y. No row influences
another, so row n's own gradients are G[n] = sum_t gy[n, t] x[n, t]^T and sum_t gy[n, t]. LoRA's A and B are linear.

Here G is only described, by what gives any rows of it; `sketch` forms it in blocks, so that memory stays bounded.

Shapes: B rows of the batch, T tokens, I/O layer in/out; a parameter is seen as a matrix, `rows` x `cols`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dataflex.errors import DataflexError
from dataflex.features.cross_entropy import wide
from dataflex.features.entries import canonical_name

_HALF = (torch.float16, torch.bfloat16)
_MIXED_BMM = torch.__version__ >= "2.8"  # a version that compares as one
"""Whether CUDA's `bmm` multiplies half-precision factors into float32; else they are converted first."""

Rows = Callable[[int, int], Tensor]
"""(a, b) -> rows [a, b) of a parameter's gradient for each row of the batch, (B, (b - a) * cols)."""


@dataclass(frozen=True)
class Parameter:
    """A trainable parameter: the model's name for it, its canonical name, and the modules that own it."""

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    owners: tuple[tuple[nn.Module, str], ...]

    @property
    def rows(self) -> int:
        """Length of the first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        """Elements per row."""
        return self.size // self.rows

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


def trainable_parameters(model: nn.Module) -> list[Parameter]:
    """List the parameters that require gradients, tied ones once.

    Raises:
        DataflexError: there are none, or the per-example gradient of one is not defined or not exact here.
    """
    _refuse_coupled_rows(model)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                _refuse_unsupported(f"{path}.{local}", module)
                owners.setdefault(id(parameter), []).append((module, local))
    found = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            shape = tuple(getattr(p, "ds_shape", p.shape))  # DeepSpeed ZeRO-3 leaves an empty tensor in place
            found.append(Parameter(name, canonical_name(name), shape, p.dtype, tuple(owners[id(p)])))
    if not found:
        raise DataflexError("the model has no trainable parameter, so there is no gradient; add an adapter")
    keys = [p.key for p in found]
    twice = next((p.name for p in found if keys.count(p.key) > 1), None)
    if twice:
        raise DataflexError(
            f"two trainable parameters differ only in wrapper or adapter name, one is {twice}; keep one adapter"
        )
    return found


def _refuse_coupled_rows(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        raise DataflexError(
            "config.output_router_logits is on: the router's auxiliary loss couples the examples of a batch, so none "
            "has a gradient of its own; unset `moe_aux_loss_coef`"
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise DataflexError(
                f"{path} is a batch norm, which couples the examples of a batch; there is no exact gradient"
            )


def _refuse_unsupported(name: str, module: nn.Module) -> None:
    if "lora_magnitude_vector" in name:  # the column norm that DoRA divides by is not linear in the weights
        raise DataflexError(f"{name}: DoRA has no exact per-example rule here; set `use_dora: false`")
    if next(module.children(), None) is not None or isinstance(module, nn.ParameterList | nn.ParameterDict):
        raise DataflexError(
            f"{name} belongs to {type(module).__name__}, which is not a single layer, so there is no exact rule for "
            "its per-example gradient; freeze it, or train a LoRA adapter on linear layers"
        )
    if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
        raise DataflexError(
            f"{name}: an embedding with max_norm, scale_grad_by_freq or sparse gradients has no exact rule"
        )


def gradient_rows(module: nn.Module, names: list[str], x: Tensor, gy: Tensor) -> dict[str, Rows]:
    """Return the per-example gradients that one call of a module gives to its parameters `names`.

    Args:
        module: a layer with one tensor in and one out, the rows of the batch in the first dimension of both.
        names: its trainable parameters, by their names in it.
        x: input (B, T, ..., I), or token ids (B, T) of an embedding.
        gy: gradient at the output (B, T, ..., O).
    """
    # `type is`, not `isinstance`: a subclass may do more than the product; it is differentiated as it is.
    if type(module) is nn.Embedding:
        return {"weight": _embedding_rows(module, x, gy)}
    if type(module) is not nn.Linear and not isinstance(module, Conv1D):
        return _module_rows(module, names, x, gy)
    x, gy = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, gy))
    rows: dict[str, Rows] = {
        "weight": _linear_rows(x, gy) if isinstance(module, Conv1D) else _linear_rows(gy, x),
        "bias": lambda a, b: wide(gy[..., a:b]).sum(dim=1),
    }
    return {name: rows[name] for name in names}


def _linear_rows(left: Tensor, right: Tensor) -> Rows:
    """Return the gradient sum_t left_t right_t^T of a weight; left (B, T, rows), right (B, T, cols)."""

    def rows(a: int, b: int) -> Tensor:
        # Into float32: float16 underflows near the size of gradients (median root of v in a small model: 8e-5).
        part = left[..., a:b].transpose(1, 2)
        if _MIXED_BMM and part.is_cuda and part.dtype == right.dtype and part.dtype in _HALF:
            return torch.bmm(part, right, out_dtype=torch.float32).flatten(1)
        return torch.bmm(wide(part), wide(right)).flatten(1)

    return rows


def _embedding_rows(module: nn.Embedding, ids: Tensor, gy: Tensor) -> Rows:
    n, width = len(ids), gy.shape[-1]
    flat, values = ids.reshape(n, -1), wide(gy).reshape(n, -1, width)

    def rows(a: int, b: int) -> Tensor:
        inside = (flat >= a) & (flat < b)
        if module.padding_idx is not None:  # torch gives this token no gradient
            inside &= flat != module.padding_idx
        row = inside.nonzero()[:, 0]
        out = values.new_zeros(n * (b - a), width)
        return out.index_add_(0, row * (b - a) + flat[inside] - a, values[inside]).view(n, -1)

    return rows


def _module_rows(module: nn.Module, names: list[str], x: Tensor, gy: Tensor) -> dict[str, Rows]:
    """Differentiate a small module, such as a norm, for each row; in float32."""
    own = {name: wide(parameter.detach()) for name, parameter in module.named_parameters()}
    if any(hasattr(p, "ds_id") and p.numel() == 0 for p in module.parameters()):
        raise DataflexError(
            f"the trainable parameters of a {type(module).__name__} are sharded by DeepSpeed ZeRO-3 and not at hand in "
            "the backward pass; use ZeRO-2, or freeze them"
        )
    x, gy = wide(x), wide(gy)

    def one(x_row: Tensor, gy_row: Tensor) -> dict[str, Tensor]:
        def run(chosen: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(module, own | chosen, (x_row[None],))[0].to(gy_row.dtype)

        pullback = torch.func.vjp(run, {name: own[name] for name in names})[1]
        return pullback(gy_row)[0]

    def rows_of(gradient: Tensor) -> Rows:
        matrix = gradient.reshape(len(gradient), gradient.shape[1] if gradient.dim() > 1 else 1, -1)
        return lambda a, b: matrix[:, a:b].flatten(1)

    return {name: rows_of(gradient) for name, gradient in torch.func.vmap(one)(x, gy).items()}
