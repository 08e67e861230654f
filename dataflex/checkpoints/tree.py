"""Tensors and plain values as a JSON tree and named tensors, and back, bit for bit.

What JSON has no form for is an object of one key: `{"tensor": name}`, `{"array": name}`, `{"tuple": [...]}`,
`{"dict": [[key, value], ...]}` (keys need not be text, and their order counts), `{"float": "inf"}`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

_ARRAYS = ("bool", "uint8", "uint32", "int32", "int64", "float32", "float64")
_KEYS = (str, int, bool, float, type(None))


class Unplain(Exception):
    """A value that has no form here, or a tree that `to_tree` did not make."""


class Tensors:
    """Tensors by number; the same memory seen the same way is one tensor, as safetensors wants it."""

    def __init__(self) -> None:
        self.named: dict[str, torch.Tensor] = {}
        self._names: dict[Any, str] = {}
        self._pointers: set[int] = set()

    def add(self, tensor: torch.Tensor) -> str:
        """Return the tensor's name."""
        seen_as = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if not tensor.numel() or seen_as not in self._names:
            name = self._names[seen_as] = str(len(self.named))
            is_all = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            is_alone = is_all and tensor.data_ptr() not in self._pointers
            self._pointers.add(tensor.data_ptr())
            self.named[name] = tensor if is_alone else tensor.clone(memory_format=torch.contiguous_format)
        return self._names[seen_as]


def to_tree(value: Any, tensors: Tensors) -> Any:
    """Return the tree of a value, whose tensors and arrays are added to `tensors`.

    Raises:
        Unplain: it holds an object of any other class.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:  # JSON has the digits of a float exactly, but neither NaN nor infinity
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [to_tree(item, tensors) for item in value]
    if kind is tuple:
        return {"tuple": [to_tree(item, tensors) for item in value]}
    if kind in (dict, OrderedDict) and all(type(key) in _KEYS for key in value):
        return {"dict": [[to_tree(key, tensors), to_tree(item, tensors)] for key, item in value.items()]}
    if kind is np.ndarray and value.dtype.name in _ARRAYS:
        return {"array": tensors.add(torch.from_numpy(value.copy(order="C")))}
    if kind is torch.Tensor and value.layout is torch.strided and not value.is_quantized:
        return {"tensor": tensors.add(value.detach())}
    raise Unplain(f"found an object of the class {kind.__module__}.{kind.__qualname__}")


def from_tree(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value of a tree.

    Raises:
        Unplain: it is none that `to_tree` makes, or names a tensor that is not there.
    """
    if isinstance(tree, list):
        return [from_tree(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    match list(tree.items()):
        case [("tuple", list(items))]:
            return tuple(from_tree(item, tensors) for item in items)
        case [("dict", list(pairs))] if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            keys = [from_tree(key, tensors) for key, _ in pairs]
            if all(isinstance(key, _KEYS) for key in keys):
                return dict(zip(keys, (from_tree(item, tensors) for _, item in pairs), strict=True))
        case [("float", "inf" | "-inf" | "nan" as text)]:
            return float(text)
        case [("tensor", str(name))] if name in tensors:
            return tensors[name]
        case [("array", str(name))] if name in tensors and tensors[name].dtype is not torch.bfloat16:
            return tensors[name].numpy()
    raise Unplain(f"found {str(tree)[:80]!r} in a tree")
