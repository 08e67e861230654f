"""Classes of users made into ours, once, where they are loaded by name: afterwards nobody asks what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from dataflex.errors import ConfigError

_ADAPTED: dict[tuple[type[Any], type[Any]], Any] = {}


def adapted(cls: type[Any], base: type[Any], classic: type[Any] | None = None, **facts: Any) -> Any:
    """Return a class with all that a base declares: itself if it inherits from it, or a class made around it.

    Args:
        cls: a built-in or a user's class.
        base: what all classes of its kind inherit from.
        classic: the adapter that holds an instance of `cls`, found as `__wrapped__`; None: `cls` gets the base's
            defaults, by inheriting from both.
        facts: further attributes of the class that is made.

    Raises:
        ConfigError: `cls.Params` is no model of parameters, or the class cannot be inherited from.
    """
    params = getattr(cls, "Params", BaseModel)
    if not isinstance(params, type) or not issubclass(params, BaseModel):
        raise ConfigError(
            f"found Params = {params!r} in {cls.__qualname__}; expected a subclass of Parameters (of a weighter: "
            "WeighterParams), from dataflex.selectors, mixers, rewards or weighters. Without it the constructor's "
            "arguments are the parameters"
        )
    if issubclass(cls, base):
        return cls
    if (cls, base) not in _ADAPTED:
        own = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        own |= {"__wrapped__": cls, **facts}
        if classic is not None and hasattr(cls, "Params"):
            own |= {"Params": cls.Params, "declares_needs": True}
        reduces: Any = cls.__reduce_ex__
        if classic is None and reduces is object.__reduce_ex__:  # its name leads to the class as it was written
            own["__reduce_ex__"] = lambda made, _: (_restored, (cls, base, vars(made)))
        try:
            _ADAPTED[cls, base] = type(cls.__name__, (cls, base) if classic is None else (classic,), own)
        except TypeError as error:  # another metaclass, or a class that asks something of those that inherit from it
            name = base.__name__
            raise ConfigError(f"{cls.__qualname__}: {error}; expected a class that inherits from {name}") from error
    return _ADAPTED[cls, base]


def written(cls: type[Any]) -> type[Any]:
    """Return the class that somebody wrote: what an adapter was made around, else the class itself."""
    found: type[Any] = vars(cls).get("__wrapped__", cls)
    return found


def _restored(cls: type[Any], base: type[Any], state: Mapping[str, Any]) -> Any:
    made = object.__new__(adapted(cls, base))
    vars(made).update(state)
    return made
