"""What all parameters have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Parameters(BaseModel):
    """Base of the parameters of methods, parts, features and keys: frozen; unknown keys, NaN and infinity are refused.

    NaN and infinity pass every comparison with a bound (`gt=0` holds for infinity) and turn into weights of NaN where
    they meet a sum, so that rows are left out without a word. No parameter has a meaning for them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
