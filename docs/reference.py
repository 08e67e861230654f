"""The reference, from what the program itself goes by: the models of keys and parameters, and the command line.

Each public function returns the Markdown of one place of the site; `pages.filled` puts it there. Nothing here imports
torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dataflex.cli import app
from dataflex.components.registry import MIXERS, SELECTORS, WEIGHTERS, Registry
from dataflex.config.arguments import ARGUMENTS, SETTINGS, Way
from dataflex.config.keys import DataflexKeys, FlatKeys, WeighterChoice
from dataflex.features.spec import FeatureSpec
from dataflex.method import Method
from dataflex.rewards.base import REWARDS

Schema = Mapping[str, Any]

_PARAMS = ("mapping", "`{}`", "parameters of the component: [of each method](methods.md)")
_WAYS: Mapping[Way, str] = {
    "rows": "Through the rows: they are known by what the model is fed.",
    "content": "Through the content of the files that they name.",
    "configuration": "Through the configuration that the model has once it is loaded.",
    "model": "By value, with the base model: another value is another model.",
    "drawn": "By value, where weights are drawn at random and not only read.",
    "drawn file": "Likewise, by the content of the file that they name.",
    "step": "By value: they change what an optimizer step does to the weights.",
    "step file": "Likewise, by the content of the file that they name.",
    "schedule": "By value in a run's identity; in a kept state's through the learning rates that follow.",
    "batch": "As the global batch.",
    "order": "By value in a run's identity: the order of the rows chosen.",
    "reference": "Through the model that ASFT's loss compares with, where that loss is used.",
    "identity": "By value in a run's identity.",
    "no value": "They reach no value, so changing them computes nothing anew.",
    "refused": "Refused where features are computed or rows chosen, at least in some values: `dataflex validate` says "
    "which and why.",
}


def keys() -> str:
    """Return all of DataFlex's own keys: the flat ones, and those of the `dataflex:` mapping, dotted."""
    rows = list(_rows(DataflexKeys, "dataflex."))
    for named, params in (("weighter.name", "weighter.params"), ("prefilter.method", "prefilter.params")):
        at = next(i for i, row in enumerate(rows) if row[0] == f"`dataflex.{named}`")
        rows.insert(at + 1, (f"`dataflex.{params}`", *_PARAMS))
    rows.insert(0, ("`dataflex.params`", *_PARAMS))
    return "\n".join(
        [
            "## Beside LLaMA-Factory's keys\n",
            *_table(_rows(FlatKeys, "")),
            "\n## Under `dataflex:`\n",
            *_table(rows),
        ]
    )


def identities() -> str:
    """Return how every argument enters what values are known by, those of LLaMA-Factory and ours."""
    ours = {f"dataflex.{name}" if name in DataflexKeys.model_fields else name: way for name, way in SETTINGS.items()}
    lines = ["| how | keys |", "|---|---|"]
    for way, said in _WAYS.items():
        names = sorted(name for name, found in (ARGUMENTS | ours).items() if found == way)
        lines.append(f"| {said} | {' '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines)


def methods() -> str:
    """Return every built-in method with its parameters, and the parts that these consist of."""
    lines, parts = [], _Parts("method")
    for registry, about in (
        (SELECTORS, "`train_type: dynamic_select`; `composed` takes any [parts](#parts)."),
        (MIXERS, "`train_type: dynamic_mix`."),
        (WEIGHTERS, "`train_type: dynamic_weight`, or beside a mixer as `dataflex.weighter`."),
    ):
        lines += [f"## {registry.kind.capitalize()}s", "", about, ""]
        for name, cls in _built_in(registry):
            lines += [f"({registry.kind}-{name})=", f"### {name}", "", _about(cls), ""]
            lines += _parameters(cls, parts)
    return "\n".join([*lines, "## Parts", "", *parts.lines()])


def features() -> str:
    """Return every kind of feature with its parameters."""
    lines, parts = [], _Parts("feature")
    for spec in get_args(get_args(FeatureSpec)[0]):
        lines += [f"### {spec.model_fields['kind'].default}", "", _about(spec), ""]
        lines += [*_listed(_schema_rows(spec.model_json_schema(), parts, skip="kind")), ""]
    return "\n".join([*lines, *parts.lines()])


def rewards() -> str:
    """Return every built-in reward with its parameters."""
    lines, parts = [], _Parts("reward")
    for name, cls in _built_in(REWARDS):
        lines += [f"### {name}", "", _about(cls), "", *_parameters(cls, parts)]
    return "\n".join([*lines, *parts.lines()])


def commands() -> str:
    """Return every verb with its arguments and options."""
    return "\n".join(_command(typer.main.get_command(app), "dataflex"))


def fields(model: type[BaseModel]) -> list[str]:
    """Return a model's fields as a list in reStructuredText, for its place among the interfaces."""
    lines = []
    for name, kind, default, said in _schema_rows(model.model_json_schema(), None):
        text = f"{kind}; {'required' if default.startswith('*') else f'default {default}'}"
        lines.append(f"* ``{name.strip('`')}`` ({text.replace('`', '``')}){': ' if said else ''}{said}")
    return lines


class _Parts:
    """Models that parameters consist of, each told once, in the order in which they are met; `of` begins labels."""

    def __init__(self, of: str) -> None:
        self._of = of
        self._found: dict[str, Schema] = {}
        self._told: list[str] = []

    def link(self, name: str, schema: Schema) -> str:
        """Return a link to a part, which is told from now on."""
        known = self._found.setdefault(name, schema)
        if known["properties"] != schema["properties"]:
            raise ValueError(f"found two parts called {name}; expected one name for one thing")
        return f"[{_kind(schema) or name}](#{self._label(name)})"

    def _label(self, name: str) -> str:
        return f"{self._of}-part-{name.lower()}"

    def lines(self) -> list[str]:
        """Return all of them; a part of a part comes behind it."""
        lines: list[str] = []
        while waiting := [name for name in self._found if name not in self._told]:
            name = waiting[0]
            self._told.append(name)
            schema = self._found[name]
            lines += [f"({self._label(name)})=", f"### {name}", "", *_first(schema.get("description", "")), ""]
            if kind := _kind(schema):
                lines += [f"`kind: {kind}`", ""]
            lines += [*_listed(_schema_rows(schema, self, skip="kind")), ""]
        return lines


def _kind(schema: Schema) -> str:
    return str(schema.get("properties", {}).get("kind", {}).get("const", ""))


def _built_in(registry: Registry[Any]) -> Iterator[tuple[str, Any]]:
    for name in sorted(registry.builtins):
        yield name, registry.load(name)


def _about(cls: type[Any]) -> str:
    return " ".join(_first(cls.__doc__ or ""))


def _first(text: str) -> list[str]:
    """Return the first paragraph of a docstring."""
    return [line.strip() for line in text.strip().split("\n\n")[0].splitlines()]


def _parameters(cls: type[Method], parts: _Parts) -> list[str]:
    return [*_listed(_schema_rows(cls.Params.model_json_schema(), parts)), ""]


def _rows(model: type[BaseModel], before: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield a model's keys, those of the models in it dotted."""
    inner = {name: found for name, field in model.model_fields.items() if (found := _model_of(field))}
    for row in _schema_rows(model.model_json_schema(), None):
        name = row[0].strip("`")
        if name not in inner:
            yield (f"`{before}{name}`", *row[1:])
        elif inner[name] is WeighterChoice or inner[name].__module__ == DataflexKeys.__module__:
            yield from _rows(inner[name], f"{before}{name}.")
        else:
            yield (f"`{before}{name}`", *row[1:])


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    for found in (field.annotation, *get_args(field.annotation)):
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return None


def _schema_rows(schema: Schema, parts: _Parts | None, skip: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type, default, meaning) of each property."""
    named = schema.get("$defs", {})
    for name, found in schema.get("properties", {}).items():
        if name == skip:
            continue
        defs = _Defs(named, parts)
        default = "*required*" if "default" not in found else _default(found["default"], defs.own(found))
        yield f"`{name}`", _type(found, defs), default, found.get("description", "")


class _Defs:
    """The models that a schema refers to, and where they are told."""

    def __init__(self, named: Schema, parts: _Parts | None):
        self._named, self._parts = named, parts

    def said(self, reference: str) -> str:
        """Return what a reference stands for, as a link where parts are told."""
        name = reference.rpartition("/")[2]
        schema = {**self._named[name], "$defs": self._named} if self._parts else self._named[name]
        if self._parts is not None:
            return self._parts.link(name, schema)
        if "enum" in schema:
            return _type(schema, self)
        return _kind(schema) or "mapping"

    def own(self, found: Schema) -> Mapping[Any, Schema]:
        """Return by kind (None: it has none) the models that a value may be made of."""
        references = [
            each["$ref"] for each in (found, *found.get("oneOf", ()), *found.get("anyOf", ())) if "$ref" in each
        ]
        models = [self._named[reference.rpartition("/")[2]] for reference in references]
        return {_kind(model) or None: model for model in models}


def _type(found: Schema, defs: _Defs) -> str:
    """Return what a value may be, in words."""
    if "$ref" in found:
        return defs.said(found["$ref"])
    if "const" in found:
        return f"`{json.dumps(found['const'])}`".replace('"', "")
    if "enum" in found:
        return ", ".join(f"`{value}`" for value in found["enum"])
    for several in ("anyOf", "oneOf"):
        if several in found:
            return " or ".join(dict.fromkeys(_type(each, defs) for each in found[several] if each != {"type": "null"}))
    match found.get("type"):
        case "array" if "prefixItems" in found:
            return f"list of {len(found['prefixItems'])}"
        case "array":
            return f"list of {_type(found['items'], defs)}" if found.get("items") else "list"
        case "object":
            return "mapping"
        case "boolean":
            return "true or false"
        case "integer" | "number" as kind:
            return f"{'whole number' if kind == 'integer' else 'number'}{_bounds(found)}"
        case "string":
            return "text"
    return "anything"


def _bounds(found: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = ", ".join(f"{sign} {_number(found[key])}" for key, sign in signs.items() if key in found)
    return said and f" {said}"


def _number(value: float) -> str:
    powers = {2**31 - 1: "2³¹ - 1", 2**32 - 1: "2³² - 1", 2**53: "2⁵³", 2**63 - 1: "2⁶³ - 1"}
    return powers.get(int(value), f"{value:g}" if isinstance(value, float) else f"{value:,}")


def _default(value: Any, models: Mapping[Any, Schema]) -> str:
    """Return a default; of a model its kind, and what differs from that kind's own defaults."""
    if isinstance(value, dict) and (model := models.get(value.get("kind"))):
        own = {name: found.get("default") for name, found in model["properties"].items()}
        other = ", ".join(f"{name}: {json.dumps(each)}" for name, each in value.items() if each != own[name])
        said = [f"`{value['kind']}`"] if "kind" in value else []
        return " with ".join([*said, *([f"`{{{other}}}`"] if other else [])]) or "its defaults"
    if value is None:
        return "none"
    is_plain = isinstance(value, str) and value.isprintable() and value
    return f"`{value if is_plain else json.dumps(value)}`"


def _listed(rows: Iterable[Sequence[str]]) -> list[str]:
    found = list(rows)
    return _table(found) if found else ["No parameters."]


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    cells = ([cell.replace("|", r"\|").replace("<", "&lt;") for cell in row] for row in rows)
    return ["| key | type | default | meaning |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)]


def _command(command: Any, name: str) -> Iterator[str]:
    """Yield the lines of a command, then those of its own commands."""
    if name != "dataflex":
        yield f"{'##' if name.count(' ') == 1 else '###'} {name}\n"
    takes = [each for each in command.params if each.param_type_name == "argument"]
    shown = [each.metavar or each.name.upper() for each in takes]
    inner = getattr(command, "commands", {})
    usage = " ".join([name, *shown, *(["[OPTIONS]"] if len(command.params) > len(takes) else [])])
    yield f"```text\n{usage}{' VERB ...' if inner else ''}\n```\n"
    yield from (f"{' '.join(paragraph.split())}\n" for paragraph in (command.help or "").split("\n\n"))
    rows = [_option(each, shown) for each in command.params]
    if rows:
        yield "| | default | meaning |\n|---|---|---|"
        yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
        yield ""
    for each, found in inner.items():
        yield from _command(found, f"{name} {each}")


def _option(option: Any, shown: Sequence[str]) -> tuple[str, str, str]:
    if option.param_type_name == "argument":
        return f"`{option.metavar or option.name.upper()}`", "", option.help or ""
    value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    plain = option.default is None or option.is_flag or option.default == ""
    default = "*required*" if option.required else "" if plain else f"`{option.default}`"
    return ", ".join(f"`{each}{value}`" for each in option.opts), default, option.help or ""
