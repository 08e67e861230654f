"""The keys that LLaMA-Factory takes, read from the installed sources: importing them would take ten seconds."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.errors import ConfigError

_SOURCES = {
    "transformers": ("training_args.py", "training_args_seq2seq.py"),
    "llamafactory": tuple(
        f"hparams/{part}_args.py" for part in ("model", "data", "training", "finetuning", "generating")
    ),
}
_SPLIT_BY_COMMAS = (
    *("dataset", "eval_dataset", "freeze_trainable_modules", "freeze_extra_modules", "lora_target", "oft_target"),
    *("additional_target", "galore_target", "apollo_target"),
)
"""Text for which LLaMA-Factory takes a list as well."""
_LEAST: dict[str, tuple[float, str]] = {
    "per_device_train_batch_size": (1, "at least 1"),
    "per_device_eval_batch_size": (1, "at least 1"),
    "gradient_accumulation_steps": (1, "at least 1"),
    "cutoff_len": (1, "at least 1 token"),
    "lora_rank": (1, "at least 1"),
    "max_samples": (1, "at least 1 row"),
    "num_train_epochs": (1e-9, "more than 0"),
    "learning_rate": (0, "at least 0"),
    "val_size": (0, "a share below 1, or a number of rows"),
}
"""Bounds that LLaMA-Factory leaves unchecked: it would divide by zero, or train on nothing, much later."""
_SIMPLE = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "list": "a list"}


@dataclass(frozen=True)
class Key:
    """What one key takes.

    Attributes:
        types: of bool, int, float, str, list, dict, None.
        choices: the only texts allowed, if not empty.
    """

    types: frozenset[str]
    choices: tuple[str, ...]

    @property
    def expected(self) -> str:
        """Name in words what the key takes."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kinds = [text for name, text in (_SIMPLE | {"dict": "a mapping"}).items() if name in self.types]
        return " or ".join(kinds)


@functools.cache
def known_keys() -> dict[str, Key]:
    """Return every key of LLaMA-Factory's training arguments, model to generation, with what it takes.

    Raises:
        ConfigError: LLaMA-Factory or Transformers is not installed, or laid out otherwise than expected.
    """
    found: dict[str, Key] = {}
    for package, files in _SOURCES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"found no package {package}; expected it beside dataflex; install it: pip install {package}"
            )
        for name in files:
            path = Path(spec.origin).parent / name
            if not path.is_file():
                raise ConfigError(f"found no {path}; expected llamafactory >=0.9.5,<0.10 and transformers >=5.0,<5.6")
            for node in ast.parse(path.read_text("utf-8")).body:
                if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                    found |= _fields(node)
    return found


@functools.cache
def template_names() -> tuple[str, ...]:
    """Return the chat templates that LLaMA-Factory registers; none if its sources are laid out otherwise."""
    spec = importlib.util.find_spec("llamafactory")
    path = Path(str(spec.origin)).parent / "data" / "template.py" if spec is not None else None
    if path is None or not path.is_file():
        return ()
    calls = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.Expr)]
    names = [
        keyword.value.value
        for call in calls
        if isinstance(call.value, ast.Call) and ast.unparse(call.value.func) == "register_template"
        for keyword in call.value.keywords
        if keyword.arg == "name" and isinstance(keyword.value, ast.Constant)
    ]
    return tuple(str(name) for name in names)


def fault(name: str, value: Any) -> str | None:
    """Return what was expected of a known key's value, or None if its type and size are right."""
    key = known_keys()[name]
    if value is None:
        return None if "None" in key.types else f"{key.expected} (leave the key out for its default)"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    kind = type(value).__name__
    accepted = key.types | ({"int"} if "float" in key.types else set())
    if name in _SPLIT_BY_COMMAS:
        accepted |= {"list"}
    if key.choices and isinstance(value, str):
        return None if value in key.choices else key.expected
    if kind in accepted:
        least, expected = _LEAST.get(name, (0, ""))
        return expected if expected and isinstance(value, int | float) and value < least else None
    if kind == "bool" and "str" in accepted | ({"str"} if key.choices else set()):
        return f"{key.expected} (YAML reads unquoted yes, no, on and off as true and false: quote it)"
    if kind == "str" and accepted & {"bool", "int", "float"} and "str" not in accepted:
        return f"{key.expected} (without quotes)"
    return key.expected


def _fields(node: ast.ClassDef) -> dict[str, Key]:
    """Return the initialisable fields of a dataclass."""
    found = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            keywords = item.value.keywords if isinstance(item.value, ast.Call) else []
            if not any(
                k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in keywords
            ):
                types, choices = _annotation(item.annotation)
                found[item.target.id] = Key(frozenset(types), tuple(choices))
    return found


def _annotation(node: ast.expr) -> tuple[set[str], list[str]]:
    """Return type names and literal texts of an annotation; an enum is written as text, a config as a mapping."""
    match node:
        case ast.Constant(value=None):
            return {"None"}, []
        case ast.Constant(value=str(text)):
            return _annotation(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, right=right):
            parts = [_annotation(left), _annotation(right)]
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            parts = [_annotation(inner), ({"None"}, [])]
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            parts = [_annotation(member) for member in members]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            members = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return set(), [str(m.value) for m in members if isinstance(m, ast.Constant)]
        case ast.Subscript(value=ast.Name(id=name)) | ast.Name(id=name):
            return {name if name in (*_SIMPLE, "dict") else "dict" if name.endswith("Config") else "str"}, []
        case _:
            raise ConfigError(f"found the annotation {ast.unparse(node)} in an argument class; expected a plain type")
    return set().union(*(types for types, _ in parts)), [text for _, choices in parts for text in choices]
