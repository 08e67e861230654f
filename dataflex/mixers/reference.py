"""The reference model, whose loss of each token is subtracted from the trained model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataflex.features.need import Need
from dataflex.features.spec import TokenLossSpec
from dataflex.mixers.base import NativeMixer

REFERENCE_KINDS = (
    "stored: the token losses of a reference of the run's architecture and finetuning_type are computed once and kept; "
    "live: any model, or adapter, stands beside the run's and runs at every step"
)


class Referenced(NativeMixer):
    """Base of mixers with the parameters `reference_model_path` and `reference`, as `REFERENCE_KINDS` describes it."""

    params: Any

    @property
    def reference_model_path(self) -> str | None:
        """The parameter of this name."""
        path: str | None = self.params.reference_model_path
        return path

    @property
    def reference_is_live(self) -> bool:
        """True with `reference: live`."""
        return bool(self.params.reference == "live")

    @property
    def reference_needs(self) -> Sequence[Need]:
        """The need of the reference's stored token losses; none without a reference, or if its model runs live."""
        if self.reference_model_path is None or self.reference_is_live:
            return []
        return [Need(TokenLossSpec(), "train", self.reference_model_path)]
