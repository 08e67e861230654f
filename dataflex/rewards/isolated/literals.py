"""Values that cross between the processes, as JSON: what a Python literal can say, nothing that has code of its own.

Lists, texts, numbers, booleans and None are themselves; everything else is an object with one key that names its type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_BASES: tuple[Any, ...] = (int, float, str, bytes, complex, list, tuple, dict, set, frozenset)


class NotLiteral(Exception):
    """A value is of no type that may cross between the processes."""


def encode(value: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """Return a value as JSON; an object of a subclass, such as a Counter, becomes its base.

    Args:
        value: a literal, whose items are literals.
        other: encodes a value that is no literal, or raises NotLiteral.

    Raises:
        NotLiteral: the value holds something that is no literal.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:  # hexadecimal beyond 64 bits, as Python refuses decimal texts of more than 4,300 digits
        return value if abs(value) < 1 << 63 else {"int": hex(value)}
    if kind is list:
        return [encode(item, other) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(item, other) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key, other), encode(item, other)] for key, item in value.items()]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is range:
        return {"range": [encode(value.start), encode(value.stop), encode(value.step)]}
    for base in _BASES:
        if isinstance(value, base):
            return encode(base(value), other)
    if other is not None:
        return other(value)
    raise NotLiteral(f"a {kind.__name__}, which is no JSON-like literal")


def decode(found: Any, other: Callable[[str, Any], Any] | None = None) -> Any:
    """Return the value that was encoded.

    Args:
        found: JSON.
        other: makes a value of another key and what it holds.

    Raises:
        NotLiteral: it is nothing that `encode` makes.
    """
    if isinstance(found, list):
        return [decode(item, other) for item in found]
    if not isinstance(found, dict):
        return found
    try:
        ((kind, held),) = found.items()
        if kind == "int":
            return int(held, 16)
        if kind in ("tuple", "set", "frozenset"):
            made = [decode(item, other) for item in held]
            return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](made)
        if kind == "dict":
            return {decode(key, other): decode(item, other) for key, item in held}
        if kind in ("bytes", "bytearray"):
            return bytes.fromhex(held) if kind == "bytes" else bytearray.fromhex(held)
        if kind == "complex":
            return complex(*held)
        if kind == "range":
            return range(*(decode(item) for item in held))
    except (TypeError, ValueError) as error:
        raise NotLiteral(f"what is no JSON-like literal ({error})") from error
    if other is not None:
        return other(kind, held)
    raise NotLiteral(f"a {kind}, which is no JSON-like literal")
