"""A JSON schema (draft-07, which editors know) of run files: it takes whatever `dataflex validate` takes.

It says names, types, choices and bounds of keys, and of a method's parameters where the file names the method. What
keys mean for each other, and whether files are there, is left to `validate`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import models_json_schema

from dataflex.components.classic import Arguments
from dataflex.components.registry import Registry, did_you_mean
from dataflex.config.keys import DataflexKeys, FlatKeys
from dataflex.config.llamafactory_keys import BOUNDS, Key, accepted_types, known_keys, template_names
from dataflex.config.methods import KINDS, TRAIN_TYPES, summary_of
from dataflex.errors import ConfigError

Schema = dict[str, Any]

DRAFT = "http://json-schema.org/draft-07/schema#"
_KINDS: dict[str, Registry[Any]] = {TRAIN_TYPES[registry.kind]: registry for registry in KINDS}
_TYPES = {
    "bool": "boolean", "int": "integer", "float": "number", "str": "string", "list": "array", "dict": "object",
    "None": "null",
}  # fmt: skip
_REFERENCE = "#/definitions/"
_BESIDE = {"weighter": ("weighter", "name"), "selector": ("prefilter", "method")}
"""Kinds of methods that stand beside another or before it: under which key, and by which one in it they are named."""
_WITHOUT_PLUGINS: Schema = {"not": {"required": ["plugins"]}}
"""A plugin may register a built-in method's name, whose parameters are then its own."""


def run_file_schema() -> Schema:
    """Return the schema of a run file, for the installed LLaMA-Factory, Transformers and methods.

    A method that another distribution announces has its place; one of a run file's own plugins is not known here, so
    its parameters are not looked at.
    """
    models, methods = _models()
    definitions, keys = _generated([*models.values(), FlatKeys, DataflexKeys])
    for name, model in models.items():
        # Not `required`: the components file may have what the run file leaves out, all of it too.
        found = {key: value for key, value in definitions[keys[model]].items() if key != "required"}
        definitions[name] = _or_null(found, definitions)
    flat, section = definitions[keys[FlatKeys]], definitions[keys[DataflexKeys]]
    params: Schema = {"description": "parameters of the method; `dataflex ls NAME` lists them", "type": "object"}
    section["properties"]["params"] = params
    for key in ("weighter", "prefilter"):  # whose parameters are those of the method that they name
        beside = section["properties"][key]["anyOf"][0]
        beside |= definitions[_target(beside)]
        beside["properties"] |= {"params": _or_null(params, definitions)}
        del beside["$ref"]
    for ours in (flat, section):  # `key:` without a value is null, and means the default
        ours["properties"] = {key: _or_null(value, definitions) for key, value in ours["properties"].items()}
    theirs = {name: _of_llamafactory(name, key) for name, key in sorted(known_keys().items())}
    whole = {
        "$schema": DRAFT,
        "title": "DataFlex run file",
        "description": "LLaMA-Factory's keys, and DataFlex's: flat ones, and the mapping `dataflex`.",
        "type": "object",
        "properties": {**flat["properties"], "dataflex": _or_null(section, definitions), **theirs},
        "additionalProperties": False,
        "allOf": [*_names(methods), *_parameters(models)],
    }
    return _with_definitions(whole, definitions)


def as_text(schema: Schema) -> str:
    """Return a schema as it is printed, and as `examples/run.schema.json` has it."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def field_schema(field: str, whole: Schema) -> Schema:
    """Return the part of `run_file_schema` that one key has.

    Args:
        field: a dotted key of run files, such as `dataflex.refresh`; or `KIND.METHOD`, a method's parameters, such as
            `selector.less`, of which a further dotted key is one.
        whole: the schema.

    Raises:
        ConfigError: there is no such key.
    """
    definitions = whole["definitions"]
    parts, at = field.split("."), whole
    if ".".join(parts[:2]) in definitions:
        at, parts = definitions[".".join(parts[:2])], parts[2:]
    for part in parts:
        known = {key: value for branch in _branches(at, definitions) for key, value in branch["properties"].items()}
        if part not in known:
            methods = [name for name in definitions if "." in name] if at is whole else []
            near = did_you_mean(field if methods else part, [*known, *methods])
            if methods and part in DataflexKeys.model_fields:
                near = f"; did you mean 'dataflex.{field}'?"
            expected = "a dotted key of run files, or KIND.METHOD" if at is whole else f"one of {', '.join(known)}"
            raise ConfigError(f"--field: found {field!r}; expected {expected if known else 'no key below it'}{near}")
        at = known[part]
    return _with_definitions({"$schema": DRAFT, **at}, definitions)


def _models() -> tuple[dict[str, type[BaseModel]], dict[str, dict[str, str]]]:
    """Return the parameters of each method, by KIND.NAME, and what each is for, by train_type and name."""
    models: dict[str, type[BaseModel]] = {}
    methods: dict[str, dict[str, str]] = {}
    for train_type, registry in _KINDS.items():
        for name in sorted(registry.places()):
            try:
                cls = registry.load(name)
            except ConfigError:  # of another distribution, whose names cannot be imported here
                continue
            methods.setdefault(train_type, {})[name] = summary_of(cls)
            if issubclass(cls.Params, Arguments):
                continue  # a constructor of the classic interface takes what it takes
            try:
                cls.Params.model_json_schema()
            except PydanticInvalidForJsonSchema:
                continue  # it has a type that JSON schema cannot say
            models[f"{registry.kind}.{name}"] = cls.Params
    return models, methods


def _generated(models: list[type[BaseModel]]) -> tuple[dict[str, Schema], dict[type[BaseModel], str]]:
    """Return all definitions in draft-07, and under which name each model stands."""
    found, whole = models_json_schema(
        [(model, "validation") for model in models], ref_template=f"{_REFERENCE}{{model}}"
    )
    definitions = {name: _draft_07(schema) for name, schema in whole["$defs"].items()}
    return definitions, {model: _target(found[model, "validation"]) for model in models}


def _draft_07(node: Any) -> Any:
    """Return a schema of pydantic's, which is draft 2020-12, in draft-07: no `prefixItems`, nothing beside `$ref`."""
    if isinstance(node, list):
        return [_draft_07(item) for item in node]
    if not isinstance(node, dict):
        return node
    dropped = ("title", "discriminator", "acts")
    out = {key: _draft_07(value) for key, value in node.items() if key not in dropped}
    if "properties" in node:  # whose keys are names, not words of the schema
        out["properties"] = {name: _draft_07(value) for name, value in node["properties"].items()}
    for key in ("default", "enum", "const"):
        if key in node:  # values, not schemas
            out[key] = node[key]
    if "prefixItems" in out:
        out["items"], out["additionalItems"] = out.pop("prefixItems"), False
    if "$ref" in out and len(out) > 1:
        out = {**{key: value for key, value in out.items() if key != "$ref"}, "allOf": [{"$ref": out["$ref"]}]}
    return out


def _or_null(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """Return a schema that takes null as well; what it refers to is written out, so that faults are found inside."""
    if schema.keys() & {"$ref", "allOf"}:
        target = schema.get("$ref") or schema["allOf"][0]["$ref"]
        schema = definitions[_target({"$ref": target})] | {
            k: v for k, v in schema.items() if k not in ("$ref", "allOf")
        }
    if "anyOf" in schema:
        branches = schema["anyOf"]
        return schema | {"anyOf": [*branches, *([] if {"type": "null"} in branches else [{"type": "null"}])]}
    more = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return schema | {"type": [schema["type"], "null"]} | more


def _of_llamafactory(name: str, key: Key) -> Schema:
    """Return the schema of one of LLaMA-Factory's keys: what `fault` in `llamafactory_keys` takes."""
    least, most, _ = BOUNDS.get(name, (-math.inf, math.inf, ""))
    bounds = {word: n for word, n in (("minimum", least), ("maximum", most)) if math.isfinite(n)}
    types = accepted_types(name, key)
    branches: list[Schema] = [{"enum": list(key.choices)}] if key.choices else []
    if name == "template":  # a plain LLaMA-Factory run is not held against what is registered
        branches.append({"enum": list(template_names())})
    if name == "resume_from_checkpoint":  # true is the newest
        branches.append({"const": True})
    for each in sorted(types):
        if each == "str" and key.choices:
            continue
        branches.append({"type": _TYPES[each], **(bounds if each in ("int", "float") else {})})
    about = {"description": f"LLaMA-Factory's: {key.expected}"}
    return about | (branches[0] if len(branches) == 1 else {"anyOf": branches})


def _names(methods: dict[str, dict[str, str]]) -> Iterator[Schema]:
    """Yield what `component_name` may be under each train_type: these names, or any other of a plugin."""
    for train_type, names in methods.items():
        known = [{"const": name, "description": about} for name, about in names.items()]
        then = {"component_name": {"anyOf": [*known, {"type": ["string", "null"]}]}}
        yield _if({"train_type": {"const": train_type}}, then)


def _parameters(models: dict[str, type[BaseModel]]) -> Iterator[Schema]:
    """Yield what `dataflex.params` is where the run file names a method, and those of a weighter beside a mixer."""
    for each in models:
        kind, _, name = each.partition(".")
        params = {"$ref": _REFERENCE + each}
        given: Schema = {"train_type": {"const": TRAIN_TYPES[kind]}, "component_name": {"const": name}}
        if kind == "mixer":  # unless these two name another
            given |= {"static_mix": {"enum": [False, None]}, "mixture_sample_rule": {"enum": ["mixture", None]}}
        required = ["train_type", "component_name"]
        yield _if({**given, "dataflex": _WITHOUT_PLUGINS}, {"dataflex": {"properties": {"params": params}}}, required)
        if kind in _BESIDE:
            key, called = _BESIDE[kind]
            named = {"type": "object", "properties": {called: {"const": name}}, "required": [called]}
            beside = {**_WITHOUT_PLUGINS, "properties": {key: named}, "required": [key]}
            then = {"dataflex": {"properties": {key: {"properties": {"params": params}}}}}
            yield _if({"dataflex": beside}, then, ["dataflex"])


def _if(given: Schema, then: Schema, required: list[str] | None = None) -> Schema:
    return {
        "if": {"properties": given, "required": list(given) if required is None else required},
        "then": {"properties": then},
    }


def _with_definitions(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """Return a schema with those definitions that it leads to."""
    found: dict[str, Schema] = {}
    waiting = [schema]
    while waiting:
        for name in _references(waiting.pop()):
            if name not in found:
                found[name] = definitions[name]
                waiting.append(found[name])
    return schema | ({"definitions": dict(sorted(found.items()))} if found else {})


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield _target(node)
        node = list(node.values())
    for item in node if isinstance(node, list) else ():
        yield from _references(item)


def _target(schema: Schema) -> str:
    return str(schema["$ref"]).removeprefix(_REFERENCE)


def _branches(schema: Schema, definitions: dict[str, Schema]) -> Iterator[Schema]:
    """Yield the objects with named keys that a schema allows."""
    if "$ref" in schema:
        yield from _branches(definitions[_target(schema)], definitions)
    if "properties" in schema:
        yield schema
    for word in ("anyOf", "oneOf", "allOf"):
        for branch in schema.get(word, ()) if "properties" not in schema else ():
            yield from _branches(branch, definitions)
