"""Stand-ins for packages that a machine without ours lacks, so that the feature engine can be imported there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from types import ModuleType
from typing import Any


def stand_in_for_pydantic() -> None:
    """Put frozen dataclasses in pydantic's place where it is not installed.

    `dataflex.features.spec` is made of pydantic models, whose values and equality are all that the engine reads. A
    dataclass has both; it checks nothing, so specifications must be written right.
    """
    if importlib.util.find_spec("pydantic"):
        return
    module: Any = ModuleType("pydantic")
    module.BaseModel, module.ConfigDict, module.Field = _Model, dict, _field
    module.AfterValidator = module.BeforeValidator = module.field_validator = module.model_validator = _unchecked
    sys.modules["pydantic"] = module


class _Model:
    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)


def _field(default: Any = MISSING, **_: Any) -> Any:
    return field(default=default)


def _unchecked(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda method: method
