"""What there is to classes of the classic interface, that of DataFlex's reference implementation.

They are constructed from objects of the run and their parameters, by name, and know no features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, RootModel

from dataflex.errors import ConfigError

RUNTIME = ("dataset", "eval_dataset", "accelerator", "data_collator", "mixture_manager")
"""Constructor arguments of a class of the classic interface that are objects of the run, never parameters."""


class Arguments(RootModel[dict[str, Any]]):
    """Parameters of a class of the classic interface: constructor arguments by name."""


def constructor_params(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class of the classic interface: its constructor's arguments but those of the run."""
    return {
        name: parameter
        for name, parameter in inspect.signature(cls).parameters.items()
        if name not in RUNTIME and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def constructed(cls: type[Any], params: BaseModel, runtime: Mapping[str, Any]) -> Any:
    """Construct a class from its parameters and those objects of the run that it asks for; or from its `Params` alone.

    Raises:
        ConfigError: it asks for one that there is not.
    """
    if not isinstance(params, Arguments):
        return cls(params)
    wanted = inspect.signature(cls).parameters
    given = {name: value for name, value in runtime.items() if name in wanted} | params.root
    required = {name for name, parameter in wanted.items() if parameter.default is parameter.empty}
    missing = [name for name in RUNTIME if name in required - given.keys()]
    if missing:
        raise ConfigError(
            f"{cls.__qualname__} is constructed with {', '.join(missing)}, which there is in a training alone; run "
            "`dataflex train`, or name the features under dataflex.features of a run file with another component"
        )
    return cls(**given)
