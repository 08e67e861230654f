"""Classes of users made into ours, once, where they are loaded by name: afterwards nobody asks what they are."""

from __future__ import annotations

from typing import Any

_ADAPTED: dict[tuple[type[Any], type[Any]], Any] = {}


def adapted(cls: type[Any], base: type[Any], classic: type[Any] | None = None) -> Any:
    """Return a class with all that a base declares: itself if it inherits from it, or a class made around it.

    A class with `Params` that does not inherit from the base gets the base's defaults; any other one is taken to be of
    the classic interface.

    Args:
        cls: a built-in or a user's class.
        base: what all classes of its kind inherit from.
        classic: the adapter for classes of the classic interface, which finds `cls` as `wraps`; None: there is none.
    """
    if issubclass(cls, base):
        return cls
    if (cls, base) not in _ADAPTED:
        bases: tuple[type[Any], ...] = (classic,) if classic is not None and not hasattr(cls, "Params") else (cls, base)
        own = {"wraps": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _ADAPTED[cls, base] = type(cls.__name__, bases, own)
    return _ADAPTED[cls, base]


def written(cls: type[Any]) -> type[Any]:
    """Return the class that somebody wrote: what an adapter was made around, else the class itself."""
    found: type[Any] = vars(cls).get("wraps", cls)
    return found
