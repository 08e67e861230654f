"""The component of a run: its class, its parameters from components file and run file, and what it needs."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from dataflex.components.adapter import written
from dataflex.components.classic import RUNTIME, Arguments, constructor_params
from dataflex.components.params import Parameters
from dataflex.components.registry import Registry, did_you_mean
from dataflex.config.problems import NOTHING, Origin, Problems
from dataflex.config.runfile import Document, read
from dataflex.errors import ConfigError
from dataflex.features.need import Need
from dataflex.method import Method

M = TypeVar("M", bound=Method)

DEFAULT_FILE = "configs/components.yaml"


@dataclass(frozen=True)
class Asked(Generic[M]):
    """A component that the run file names.

    Attributes:
        name: its name, or module:Class.
        registry: of its kind.
        params: what the run file says of its parameters, which wins over the components file.
        name_at: dotted path of the name in the run file.
        params_at: dotted path of the parameters.
    """

    name: str
    registry: Registry[M]
    params: Any
    name_at: str = "component_name"
    params_at: str = "dataflex.params"

    @property
    def bucket(self) -> str:
        """Key of a components file under which the components of this kind stand."""
        return f"{self.registry.kind}s"


@dataclass(frozen=True)
class Component(Generic[M]):
    """A component as the run file asks for it.

    Attributes:
        name: what the run file calls it.
        cls: the class, with all that its base declares.
        method: an instance made from the parameters, which knows no run yet.
        params: the parameters.
        needs: the features it declares.
    """

    name: str
    cls: type[M]
    method: M
    params: BaseModel
    needs: tuple[Need, ...]


def component(
    asked: Asked[M],
    document: Document,
    file: str | None,
    plugins: tuple[str, ...],
    output_dir: Any,
    problems: Problems,
) -> Component[M] | None:
    """Find the class and check its parameters; None if that was not possible, the reasons among the problems.

    Args:
        asked: which.
        document: the run file.
        file: `components_cfg_file` as written, or None.
        plugins: `dataflex.plugins`.
        output_dir: what `${output_dir}` in a parameter stands for.
        problems: takes what is wrong.
    """
    inline = asked.params
    if inline is not None and not isinstance(inline, dict):
        problems.add(document.origin, asked.params_at, "a mapping of keys to values", inline)
        inline = None
    inline = inline or {}
    below, below_origin = _from_file(asked, document, file, bool(inline), problems)
    try:
        cls = asked.registry.load(_located(asked.name, document.origin.file), plugins)
    except ConfigError as error:
        problems.say(document.origin, asked.name_at, str(error))
        return None

    def place(key: str) -> tuple[Origin, str]:
        in_file = key in below and key not in inline
        return (below_origin, f"{asked.bucket}.{asked.name}.params") if in_file else (document.origin, asked.params_at)

    values = {}
    for key, value in {**below, **inline}.items():
        origin, prefix = place(key)
        if isinstance(key, str):
            values[key] = replaced(value, output_dir, origin, f"{prefix}.{key}", problems)
        else:
            problems.add(origin, f"{prefix}.{key}", "text as a key (quote it)", key)
    params = _checked(cls, values, place, problems)
    if params is None:
        return None
    try:
        method = cls(params)
        needs = tuple(method.needs())
        if other := [need for need in needs if not isinstance(need, Need)]:
            raise ConfigError(f"{asked.name}: needs() has {other[0]!r}; expected dataflex.features.need.Need")
        return Component(asked.name, cls, method, params, needs)
    except ConfigError as error:
        problems.say(document.origin, asked.params_at, str(error))
        return None


def _located(name: str, run_file: Path) -> str:
    """Return `file.py:Class` with the path at which the file was found; any other name as it is."""
    file, _, path = name.rpartition(":")
    if not file.endswith(".py") or os.path.isfile(os.path.expanduser(file)):
        return name
    found = find_file(file, run_file)
    return f"{found}:{path}" if found else name


def find_file(path: str, run_file: Path) -> Path | None:
    """Return an existing file: relative to the working folder, else to the run file's."""
    given = Path(os.path.expanduser(path))  # not Path.expanduser, which raises for a user that is not known
    return next((found for found in (given, run_file.parent / given) if os.path.isfile(found)), None)


def replaced(value: Any, output_dir: Any, origin: Origin, path: str, problems: Problems) -> Any:
    """Return the value with `${output_dir}` replaced in all its texts; any other interpolation is a problem.

    Values may come from files of others, and resolving could show them the environment.
    """
    if isinstance(value, dict):
        return {key: replaced(item, output_dir, origin, f"{path}.{key}", problems) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, output_dir, origin, f"{path}.{i}", problems) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    text = value.replace("${output_dir}", str(output_dir))
    if "${" in text or text == "???":
        problems.add(origin, path, "plain text (only ${output_dir} is replaced)", value)
    return text


def _from_file(
    asked: Asked[Any], document: Document, file: str | None, has_inline: bool, problems: Problems
) -> tuple[dict[str, Any], Origin]:
    """Return the parameters in the components file, and where they are written."""
    path = find_file(file or DEFAULT_FILE, document.origin.file)
    if path is None:
        if file is not None:
            problems.add(
                document.origin,
                "components_cfg_file",
                "a file, relative to the working folder or to the run file",
                file,
                why="Remove the key to use the component's defaults and dataflex.params",
            )
        return {}, document.origin
    found = read(path, problems)
    if found is None:
        return {}, document.origin
    # Only the entry that is used is checked: what else the file holds has no part in this run.
    name, bucket = asked.name, found.values.get(asked.bucket)
    entry = bucket.get(name) if isinstance(bucket, dict) else None
    at = f"{asked.bucket}.{name}"
    if entry is None and file is not None and not has_inline:
        names = [str(key) for key in bucket] if isinstance(bucket, dict) else []
        listed = ", ".join(names) or "nothing"
        problems.say(found.origin, asked.bucket, f"found {listed}; expected an entry {name}{did_you_mean(name, names)}")
    if not isinstance(entry, dict):
        if entry is not None:
            problems.add(found.origin, at, "a mapping with params", entry)
        return {}, found.origin
    if entry.get("name", name) != name:
        problems.add(found.origin, f"{at}.name", f"{name}, as the entry is called, or no name", entry["name"])
    for key in entry:
        if key not in ("name", "params"):
            problems.add_unknown(found.origin, f"{at}.{key}", "key", ("name", "params"))
    params = entry.get("params")
    if params is not None and not isinstance(params, dict):
        problems.add(found.origin, f"{at}.params", "a mapping of keys to values", params)
        params = None
    return params or {}, found.origin


def _checked(
    cls: type[Method], values: dict[str, Any], place: Callable[[str], tuple[Origin, str]], problems: Problems
) -> BaseModel | None:
    """Check parameters against the class's `Params`, or a class of the classic interface against its constructor."""
    model = cls.Params
    # A run's identity is JSON, which knows neither NaN nor infinity; those of our own say so for each field.
    endless = [] if issubclass(model, Parameters) else [key for key, value in values.items() if not _is_finite(value)]
    for key in endless:
        origin, prefix = place(key)
        problems.add(origin, f"{prefix}.{key}", "finite numbers", values[key])
    if endless:
        return None
    if issubclass(model, Arguments):
        return _arguments(written(cls), values, place, problems)
    wrong: set[str] = set()
    while isinstance(params := validated(model, {k: v for k, v in values.items() if k not in wrong}), ValidationError):
        found = problems.add_invalid(params, model, values, place, left_out=wrong)
        if not found & values.keys() - wrong:  # what is wrong is their being together, or what is not there
            return None
        wrong |= found  # on with the others: what they are together, and with the rest of the run file, is seen too
    checked: BaseModel = params
    return checked


def _arguments(
    cls: type[Any], values: dict[str, Any], place: Callable[[str], tuple[Origin, str]], problems: Problems
) -> Arguments | None:
    """Check parameters against a constructor."""
    accepted = constructor_params(cls)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())
    unknown = [key for key in values if key in RUNTIME or not (takes_any or key in accepted)]
    for key in unknown:
        origin, prefix = place(key)
        problems.add_unknown(origin, f"{prefix}.{key}", "parameter", accepted)
    required = [key for key, p in accepted.items() if p.default is p.empty and key != "cache_dir" and key not in values]
    for key in required:
        origin, prefix = place(key)
        problems.add(origin, f"{prefix}.{key}", f"a value, which {cls.__qualname__} requires", NOTHING)
    return None if unknown or required else Arguments(values)


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def validated(model: type[BaseModel], values: Mapping[str, Any]) -> Any:
    """Return an instance of the model, or the ValidationError.

    As JSON and strict: text is no number and `yes` no 1, while a list may still become a tuple.
    """
    try:
        return model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        return error
