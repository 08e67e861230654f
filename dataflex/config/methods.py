"""What methods there are, and what parameters they take."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

from pydantic import BaseModel

from dataflex.components.adapter import written
from dataflex.components.classic import Arguments, constructor_params
from dataflex.components.registry import MIXERS, SELECTORS, WEIGHTERS, Registry
from dataflex.errors import ConfigError
from dataflex.method import Method

KINDS = (SELECTORS, MIXERS, WEIGHTERS)
TRAIN_TYPES = {"selector": "dynamic_select", "mixer": "dynamic_mix", "weighter": "dynamic_weight"}
"""Kind of a method -> the `train_type` of a run that has one."""
_MODULE = re.compile(r"\b(?:[a-z_]+\.)+(?=[A-Z])")
_CHECKED = re.compile(r"Annotated\[(\w+), .*?>\)\]")  # a type with a check of ours


def methods() -> list[dict[str, Any]]:
    """Return every registered method: name, place, first line of its description, parameters; JSON-compatible."""
    every = [(registry, *item) for registry in KINDS for item in sorted(registry.places().items())]
    return [entry_of(*each) for each in every]


def entry_of(registry: Registry[Any], name: str, place: str) -> dict[str, Any]:
    """Return what `methods` says of one, whose class is at `place`; `error` where it cannot be imported."""
    entry: dict[str, Any] = {"name": name, "kind": registry.kind, "class": place}
    if place != registry.builtins.get(name, place):
        entry["in_place_of"] = registry.builtins[name]
    try:
        cls = registry.load(name)
    except ConfigError as error:
        return entry | {"error": str(error)}
    return entry | {"description": summary_of(cls), "params": _params(cls)}


def summary_of(cls: type[Method]) -> str:
    """Return what a method does in a sentence: the first line of its description, empty where it has none."""
    return (vars(written(cls)).get("__doc__") or "").strip().partition("\n")[0]


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return `methods()` as lines for people."""
    lines = []
    for entry in found:
        instead = f", in place of the built-in {entry['in_place_of']}" if "in_place_of" in entry else ""
        lines.append(f"{entry['name']}  ({entry['kind']}, {entry['class']}{instead})")
        lines.append(f"    {entry.get('error') or entry['description']}")
        for param in entry.get("params", []):
            default = "required" if param["required"] else f"default {json.dumps(param['default'])}"
            lines.append(f"    {param['name']}: {param['type']}, {default}. {param['description']}".rstrip(". "))
    return lines


def _params(cls: type[Method]) -> list[dict[str, Any]]:
    model = cls.Params
    if issubclass(model, Arguments):
        return [
            _param(name, Any if p.annotation is p.empty else p.annotation, p.default, p.default is p.empty, "")
            for name, p in constructor_params(written(cls)).items()
        ]
    return [
        _param(name, f.annotation, f.get_default(call_default_factory=True), f.is_required(), f.description)
        for name, f in model.model_fields.items()
    ]


def _param(name: str, annotation: Any, default: Any, required: bool, description: str | None) -> dict[str, Any]:
    is_plain = isinstance(annotation, type) and not get_args(annotation)
    kind = annotation.__name__ if is_plain else _CHECKED.sub(r"\1", _MODULE.sub("", str(annotation)))
    if isinstance(default, BaseModel):  # a part of a method: its kind, and what differs from that kind's own defaults
        kind_of_part = {"kind": default.kind} if hasattr(default, "kind") else {}
        default = kind_of_part | default.model_dump(exclude_defaults=True)
    shown = json.loads(json.dumps(None if required else default, default=str))
    return {"name": name, "type": kind, "required": required, "default": shown, "description": description or ""}
