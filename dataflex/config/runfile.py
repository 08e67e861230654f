"""Reading a run file or a components file: plain values, and the line on which each was written."""

from __future__ import annotations

import io
import json
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dataflex.config.problems import Origin, Problems

_MAX_BYTES = 1 << 20
_MAX_NODES = 100_000
"""Values after aliases are written out; a run file has a few hundred."""
_MOST = 2**53
"""Whole numbers up to this are exact in every format that a run file or its values pass through."""
_PLAIN = ("str", "int", "float", "bool", "null", "map", "seq", "merge", "timestamp", "value")


@dataclass(frozen=True)
class Document:
    """What a file, and what was given in place of it, say."""

    values: dict[str, Any]
    origin: Origin


def read(path: Path, problems: Problems) -> Document | None:
    """Read YAML (or JSON, by its name) as LLaMA-Factory does, except that interpolations always stay text.

    Returns:
        The document, or None if it cannot be read; the reason is then among the problems.
    """
    origin = Origin(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)  # whatever its size is said to be: a pipe has none, a device no end
        if len(raw) > _MAX_BYTES:
            problems.say(origin, "", f"found a longer file; expected at most {_MAX_BYTES} bytes")
            return None
        text = raw.decode("utf-8-sig")
    except OSError as error:
        problems.say(origin, "", f"found no readable file ({error.strerror}); expected a YAML or JSON file")
        return None
    except UnicodeDecodeError as error:
        problems.say(origin, "", f"found bytes that are not UTF-8 at offset {error.start}; save the file as UTF-8")
        return None
    try:
        lines: dict[str, int] = {}
        values: Any
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=_unique)
        else:
            lines = _check(text)
            # Not PyYAML alone, which reads 1e-5 as text: with OmegaConf values are what LLaMA-Factory would read.
            values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False) if lines else {}
        _refuse_unusable(values)
    except _NOT_READABLE as error:
        problems.say(origin, "", _reason(error), line=_line(error))
        return None
    if not isinstance(values, dict):
        problems.add(origin, "", "a mapping of keys to values", values)
        return None
    return Document(values, Origin(path, lines))


def override(document: Document, arguments: Sequence[str], problems: Problems) -> Document:
    """Return the document with `key=value` arguments put in place of what it has; dotted keys reach into mappings."""
    values, file = document.values, document.origin.file
    given: set[str] = set()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            problems.say(
                Origin(file, overridden=frozenset([key])), key, f"found {argument!r}; expected key=value, as in seed=1"
            )
            continue
        try:
            _check(text)
            added: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
            _refuse_unusable(added)
        except _NOT_READABLE as error:
            problems.say(Origin(file, overridden=frozenset([key])), key, _reason(error))
            continue
        values = _replaced(values, key.split("."), added["value"])
        given.add(key)
    return replace(document, values=values, origin=replace(document.origin, overridden=frozenset(given)))


def put(document: Document, given: Mapping[str, Any], problems: Problems, by: str) -> Document:
    """Return the document with values of Python's in place of what it has.

    Args:
        document: what a file says.
        given: key, dotted or not -> value whole; paths count as text, tuples as lists.
        problems: takes what is no plain value.
        by: where the values were given.
    """
    values, origin = document.values, replace(document.origin, overridden=frozenset(given), by=by)
    for key, value in given.items():
        try:
            if not re.fullmatch(r"\w+(\.\w+)*", key):
                raise _Refused("found no key; expected one as in a run file, dotted or not")
            added = _plain(value)
            _refuse_unusable(added)
        except (_Refused, RecursionError) as error:
            problems.say(origin, key, _reason(error))
            continue
        values = _replaced(values, key.split("."), added)
    return replace(document, values=values, origin=origin)


def _plain(value: Any) -> Any:
    """Return a value as YAML would have given it."""
    if value is None or isinstance(value, bool | str):
        return value
    if type(value).__name__ in ("bool", "bool_"):  # NumPy's
        return bool(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral):  # NumPy's as well
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise _Refused(f"found {type(value).__name__}; expected text, a number, true, false, a list, a mapping or None")


def _replaced(below: Any, keys: Sequence[str], value: Any) -> Any:
    """Return a mapping with the whole value under `keys` replaced; a mapping there is not merged with the new one."""
    if not keys:
        return value
    below = below if isinstance(below, dict) else {}
    return {**below, keys[0]: _replaced(below.get(keys[0]), keys[1:], value)}


class _Refused(Exception):
    """The text is well-formed, but more than a configuration needs."""

    def __init__(self, text: str, line: int | None = None):
        super().__init__(text)
        self.line = line


_NOT_READABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError, _Refused)


def _check(text: str) -> dict[str, int]:
    """Return the line of every dotted path, having refused tags, recursion and aliases that unfold to very much.

    Nothing is constructed: an alias is one node however often it is used, so this takes time linear in the text.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if sizes[id(node)] < 0:
                raise _Refused("found an alias that contains itself; expected values", _first_line(node))
            return sizes[id(node)]
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN:
            raise _Refused(f"found the tag {node.tag}; expected plain values, as tags may run code", _first_line(node))
        sizes[id(node)] = -1  # being counted: met again before it is done, it contains itself
        sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
        return sizes[id(node)]

    if root is None:
        return {}
    if size(root) > _MAX_NODES:
        raise _Refused(f"found aliases that unfold to {size(root)} values; expected at most {_MAX_NODES}")
    lines = {"": _first_line(root)}
    _note_lines(root, "", lines)
    return lines


def _refuse_unusable(value: Any) -> None:
    """Refuse numbers and text that no program further on can take, wherever they stand."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_unusable(key)
            _refuse_unusable(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_unusable(item)
    elif isinstance(value, int) and abs(value) > _MOST:
        raise _Refused(f"found a whole number beyond {_MOST}; expected a smaller one")
    elif isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise _Refused(
            f"found {value!r}, which is no Unicode text: half a pair of surrogates; expected whole characters"
        )
    elif isinstance(value, str) and "\0" in value:
        raise _Refused(f"found {value!r}, text with a zero byte; expected text without")


def _first_line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _note_lines(node: yaml.Node, prefix: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        pairs = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(i), item, item) for i, item in enumerate(node.value)]
    else:
        return
    for name, key, value in pairs:
        lines[prefix + name] = _first_line(key)
        _note_lines(value, f"{prefix}{name}.", lines)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Refused(f"found duplicate key {key}")
        found[key] = value
    return found


def _line(error: BaseException) -> int | None:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return int(error.problem_mark.line) + 1
    return error.lineno if isinstance(error, json.JSONDecodeError) else getattr(error, "line", None)


def _reason(error: BaseException) -> str:
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, RecursionError):
        return "found values nested too deeply; expected a run file"
    if isinstance(error, yaml.MarkedYAMLError):
        return f"found text that is not YAML: {error.problem}"
    first = str(error).partition("\n")[0]
    return f"found text that cannot be read: {first}"
