"""The reference model, whose loss of each token is subtracted from the trained model's."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex.features.need import Need
from dataflex.features.spec import TokenLossSpec
from dataflex.mixers.base import NativeMixer

REFERENCE_KINDS = (
    "stored: the token losses of a reference of the run's architecture and finetuning_type are computed once and kept; "
    "live: any model, or adapter, stands beside the run's and runs at every step"
)


def reference_needs(mixer: NativeMixer) -> Sequence[Need]:
    """Return the need of the reference's stored token losses; none without a reference, or if its model runs live."""
    if mixer.reference_model_path is None or mixer.reference_is_live:
        return []
    return [Need(TokenLossSpec(), "train", mixer.reference_model_path)]
