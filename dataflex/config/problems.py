"""Everything that is wrong with a configuration, gathered and raised as one error."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dataflex.components.registry import did_you_mean
from dataflex.errors import ConfigError
from dataflex.redaction import is_secret

_LONGEST = 1200
"""Characters of a problem's text; the longest list of names that are expected has 700."""

NOTHING = object()
"""Stands for a value that is not there."""


@dataclass(frozen=True)
class Origin:
    """Where values were written.

    Attributes:
        file: the file they were read from.
        lines: dotted path -> line, from 1.
        overridden: dotted paths given in place of the file's, each with its value whole.
        by: where they were given.
    """

    file: Path
    lines: Mapping[str, int] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()
    by: str = "command line"

    def place(self, path: str) -> str:
        """Return "file:line" of a dotted path, or of the nearest one above it that is written."""
        above = [path, *(path[:at] for at in range(len(path) - 1, 0, -1) if path[at] == ".")]
        if not self.overridden.isdisjoint(above):
            return self.by
        line = next((self.lines[each] for each in above if path and each in self.lines), None)
        if line is None and any(each.startswith(f"{path}.") for each in self.overridden):
            return self.by  # the mapping that a dotted key reaches into is written nowhere else
        return f"{self.file}:{line}" if line else str(self.file)


class Problems:
    """A list of problems, each one line: place, dotted path, found, expected, nearest known name, what to do."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._paths: set[str] = set()

    def has(self, path: str) -> bool:
        """Say whether something was noted of the value at `path`."""
        return path in self._paths

    def add(
        self, origin: Origin, path: str, expected: str, found: Any = NOTHING, known: Iterable[str] = (), why: str = ""
    ) -> None:
        """Note that the value at `path` is not what is expected.

        Args:
            origin: where it was written.
            path: dotted path.
            expected: what would be right.
            found: the value.
            known: names among which the nearest to `found` is suggested.
            why: the reason, or what to do.
        """
        near = did_you_mean(found, known) if isinstance(found, str) else ""
        self.say(origin, path, f"found {show(path, found)}; expected {expected}{near}", why)

    def add_unknown(self, origin: Origin, path: str, what: str, known: Iterable[str], expected: str = "") -> None:
        """Note a key that nothing reads."""
        names = list(known)
        key = path.rpartition(".")[2]
        expected = expected or (f"one of {', '.join(names)}" if names else "no keys here")
        self.say(origin, path, f"found an unknown {what}; expected {expected}{did_you_mean(key, names)}")

    def add_invalid(
        self,
        error: ValidationError,
        model: type[BaseModel],
        values: Any,
        place: Callable[[str], tuple[Origin, str]],
        left_out: Collection[str] = (),
    ) -> set[str]:
        """Note everything that pydantic found; return the top-level keys concerned.

        Args:
            error: what pydantic raised.
            model: what was expected.
            values: what it was given.
            place: top-level key -> where it was written, and the dotted path of the mapping it stands in.
            left_out: top-level keys that were noted before, and are not missing therefore.
        """
        keys = set()
        for item in error.errors(include_url=False):
            location = item["loc"]
            key = str(location[0]) if location else ""
            if item["type"] == "missing" and key in left_out:
                continue
            origin, prefix = place(key)
            path = ".".join(([prefix] if prefix else []) + _written(location, values))
            instead = getattr(model, "elsewhere", {}).get(key) if len(location) == 1 else None
            if item["type"] == "extra_forbidden" and instead is not None:
                self.say(origin, path, f"found a key of the reference implementation; expected {instead}")
            elif item["type"] == "extra_forbidden":
                self.add_unknown(origin, path, "key", _siblings(model, location))
            else:
                found = NOTHING if item["type"] == "missing" else item["input"]
                context = item.get("ctx", {})
                if "expected_tags" in context:
                    path, found = f"{path}.{context['discriminator'].strip(chr(39))}", context["tag"]
                known = re.findall(r"'([^']*)'", str(context.get("expected", context.get("expected_tags"))))
                self.add(origin, path, _expected(item), found, known)
            keys.add(key)
        return keys

    def say(self, origin: Origin, path: str, text: str, why: str = "", line: int | None = None) -> None:
        """Note a problem in words; `line` where it is known otherwise than from the path."""
        self._paths.add(path)
        place = f"{origin.file}:{line}" if line else origin.place(path)
        self._texts.append(_in_a_line(f"{place}: {path + ': ' if path else ''}{text}{'. ' + why if why else ''}"))

    def raise_if_any(self) -> None:
        """Raise all problems together.

        Raises:
            ConfigError: there is at least one.
        """
        if self._texts:
            texts = list(dict.fromkeys(self._texts))  # several checks may come upon the same fault
            count = "1 problem" if len(texts) == 1 else f"{len(texts)} problems"
            raise ConfigError(f"{count} in the configuration:\n" + "\n".join(f"  {text}" for text in texts))


def _in_a_line(text: str) -> str:
    """Return a text as one line, its middle left out if it is very long: values and files' names may be anything."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def show(path: str, value: Any) -> str:
    """Return a value as people may see it: short, control characters escaped, secrets hidden."""
    if value is NOTHING:
        return "nothing"
    if value is None:
        return "nothing (null)"
    if is_secret(path):
        return "a value (not shown)"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _written(location: tuple[int | str, ...], values: Any) -> list[str]:
    """Return a pydantic location as it is written: without the names of union branches, which it has as well."""
    steps = []
    for at, step in enumerate(location):
        inside = values[step] if isinstance(values, dict) and step in values else None
        if isinstance(values, list) and isinstance(step, int) and step < len(values):
            inside = values[step]
        elif isinstance(values, dict) and step not in values and at < len(location) - 1:
            continue  # not in what was written, and not the last: the name of a union's branch
        steps.append(str(step))
        values = inside
    return steps


def _siblings(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the model that holds the last step."""
    models = [model]
    for step in location[:-1]:
        within = [
            m
            for parent in models
            if step in parent.model_fields
            for m in _models(parent.model_fields[str(step)].annotation)
        ]
        branch = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == step]
        models = within or branch or models
    return list(models[0].model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _expected(item: Any) -> str:
    """Return pydantic's message as words that follow "expected"; a validator of ours words its own so already."""
    context = item.get("ctx", {})
    match item["type"]:
        case "missing":
            return "a value"
        case "literal_error" | "union_tag_invalid":
            return re.sub(r"'([^']*)'", r"\1", str(context.get("expected", context.get("expected_tags"))))
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "int_type" | "int_parsing" | "int_from_float":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "string_type":
            return "text (YAML reads unquoted numbers, yes, no, on and off as something else: quote it)"
        case "list_type" | "tuple_type":
            return "a list"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "a mapping of keys to values"
    message = str(item["msg"]).removeprefix("Value error, ")
    return message.removeprefix("Input should be ").removeprefix("a valid ")
