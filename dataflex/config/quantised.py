"""Models whose weights are quantised: under which of them the values of a single row are exact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXACT = "bitsandbytes in 4 bits"
"""Backwards it multiplies by the very weights that it multiplies by forwards, and no row knows of another."""

BATCHED = "bitsandbytes in 8 bits"
"""A row's activations are rounded by what all rows of its batch contain."""

_DEQUANTISED = ("mxfp4", "fp8")
"""What LLaMA-Factory turns back into half precision when it loads a model that was saved so."""

WHY_NO_VALUES = (
    "In 8 bits all rows of a batch decide which of its columns stay in 16 bits, so no row has values of its own"
)
WHY_NO_GRADIENTS = f"Over a quantised base, gradients of single rows are known to be exact for {EXACT} alone"


def kind_of(quantization: Any) -> str | None:
    """Return how a model is quantised, from the `quantization_config` of its configuration: a mapping, or an object.

    None if it is not, or if LLaMA-Factory turns it back into half precision.
    """
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    method = values.get("quant_method", "quantization_config")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes":
        return BATCHED if values.get("load_in_8bit") else EXACT
    return None if method in _DEQUANTISED else method


def saved_as(folder: Any) -> str | None:
    """Return how a local model was quantised before it was saved; None if it was not, or is dequantised when loaded."""
    path = Path(folder) / "config.json" if isinstance(folder, str) else None
    if path is None or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError:
        return None  # whoever loads it will say so
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return kind_of(found) if isinstance(found, dict) else None


def asked_for(values: Mapping[str, Any]) -> str | None:
    """Return how LLaMA-Factory's keys have a model quantised as it is loaded."""
    bits, method = values.get("quantization_bit"), values.get("quantization_method", "bnb")
    if not bits or saved_as(values.get("model_name_or_path")):  # LLaMA-Factory loads that as it was saved
        return None
    return {4: EXACT, 8: BATCHED}.get(bits, f"bitsandbytes in {bits} bits") if method == "bnb" else str(method)
