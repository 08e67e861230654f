"""What a method keeps in a checkpoint, held to what JSON gives back as it was."""

from __future__ import annotations

from typing import Any

from dataflex.errors import DataflexError


def kept_by_json(value: Any, owner: str) -> Any:
    """Return a state, if reading its JSON gives exactly the same.

    A tuple would come back as a list, a number that is a key as text, and a run that is resumed would go on otherwise
    than one that never stopped.

    Args:
        value: what `state()` returned.
        owner: what it is of, for people.

    Raises:
        DataflexError: it holds something else than dicts with text as keys, lists, text, numbers, true, false and None.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise DataflexError(f"{owner}: found the key {key!r}; expected text as keys, which JSON keeps")
            kept_by_json(item, f"{owner}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            kept_by_json(item, f"{owner}.{number}")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise DataflexError(
            f"{owner}: found {type(value).__name__}; expected dicts, lists, text, numbers, true, false or None, which "
            "JSON keeps as they are"
        )
    return value
