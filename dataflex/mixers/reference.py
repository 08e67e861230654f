"""The reference model, whose loss of each token is subtracted from the trained model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from dataflex.features.need import Need
from dataflex.features.spec import TokenLossSpec


def _existing(path: str) -> str:
    if not Path(path).is_dir():
        raise ValueError("a folder that exists, relative to the working folder, with the reference model")
    return path


ReferencePath = Annotated[str, AfterValidator(_existing)]

REFERENCE_KINDS = (
    "stored: the token losses of a reference of the run's architecture and finetuning_type are computed once and kept; "
    "live: any model, or adapter, stands beside the run's and runs at every step"
)


def reference_needs(params: Any) -> Sequence[Need]:
    """Return the need of the reference's stored token losses; none without a reference, or if its model runs live.

    Args:
        params: have `reference_model_path` and `reference`.
    """
    if params.reference_model_path is None or params.reference == "live":
        return []
    return [Need(TokenLossSpec(), "train", params.reference_model_path)]
