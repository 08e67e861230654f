"""What all parameters have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
        added: parameters that came later, each with the value, as JSON has it, that does what was done before there was
            the parameter. It stays what it is when the default changes. A subclass names its own alone.
    """

    elsewhere: ClassVar[dict[str, str]] = {}
    added: ClassVar[Mapping[str, Any]] = {}
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


def without_added(params: BaseModel, include: set[str] | None = None) -> dict[str, Any]:
    """Return parameters as plain data, without those that came later and do what was done before them, at any depth.

    So what was named by its parameters keeps its name when a method gains one.

    Args:
        params: the parameters.
        include: names of those that are wanted; None: all.
    """
    return dict(_without_added(params.model_dump(mode="json", include=include), params))


def _without_added(plain: Any, value: Any) -> Any:
    """Return the plain data of a value without what `Parameters.added` of the models in it allows to leave out."""
    if isinstance(value, BaseModel) and isinstance(plain, dict):
        later = _added(type(value))
        kept = {name: part for name, part in plain.items() if name not in later or part != later[name]}
        return {name: _without_added(part, getattr(value, name, None)) for name, part in kept.items()}
    if isinstance(value, Mapping) and isinstance(plain, dict):
        return dict(zip(plain, map(_without_added, plain.values(), value.values()), strict=True))
    if isinstance(value, list | tuple) and isinstance(plain, list):
        return list(map(_without_added, plain, value))
    return plain


def _added(model: type[BaseModel]) -> dict[str, Any]:
    bases = [base for base in reversed(model.__mro__) if issubclass(base, Parameters)]
    return {name: value for base in bases for name, value in vars(base).get("added", {}).items()}


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
