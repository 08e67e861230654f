"""What all parameters have in common."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator, model_validator


class Parameters(BaseModel):
    """Base of the parameters of methods, parts, features and keys: frozen; unknown keys, NaN and infinity are refused.

    NaN and infinity pass every comparison with a bound (`gt=0` holds for infinity) and turn into weights of NaN where
    they meet a sum, so that rows are left out without a word. No parameter has a meaning for them, at any depth.

    Attributes:
        elsewhere: parameters of DataFlex's reference implementation that there are not here, with what is to be written
            in their place.
    """

    elsewhere: ClassVar[dict[str, str]] = {}
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _refuse_what_types_do_not_reach(cls, value: Any) -> Any:
        """Look into what has any shape, such as the arguments of a user's code."""
        if (found := _not_finite(value)) is not None:
            raise ValueError(f"found {found[1]} at {found[0].removeprefix('.')}; expected finite numbers")
        return value

    @model_validator(mode="after")
    def _refuse_further_keys_alike(self) -> Self:
        self._refuse_what_types_do_not_reach(self.model_extra)
        return self


def _file(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError("a file that exists, relative to the working folder")
    return path


def _folder(path: str) -> str:
    if not Path(path).is_dir():
        raise ValueError("a folder that exists, relative to the working folder")
    return path


ExistingFile = Annotated[str, AfterValidator(_file)]
"""Path of a file; looked for with the run file, before anything is loaded."""

ExistingFolder = Annotated[str, AfterValidator(_folder)]
"""Path of a folder; looked for with the run file, before anything is loaded."""


def _not_finite(value: Any) -> tuple[str, float] | None:
    """Return the path of the first number in a value that is NaN or infinite, and the number."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ("", value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if (found := _not_finite(item)) is not None:
            return f".{key}{found[0]}", found[1]
    return None
