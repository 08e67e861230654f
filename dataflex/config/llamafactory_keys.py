"""The keys that LLaMA-Factory takes, read from the installed sources: importing them would take ten seconds."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.config.enumerations import enumerations, log_levels, source
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
_MOST = 2**31 - 1
"""Largest number that a key takes, unless the table below has another bound."""
BOUNDS: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_rank"),
        (1, 1_000_000, "at least 1"),
    ),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1, "at least 0")),  # what NumPy takes
    **dict.fromkeys(("early_stopping_steps", "torch_empty_cache_steps", "ddp_timeout"), (1, _MOST, "at least 1")),
    **dict.fromkeys(("eval_accumulation_steps", "dataloader_prefetch_factor"), (1, _MOST, "at least 1")),
    **dict.fromkeys(("warmup_ratio", "lora_dropout", "label_smoothing_factor"), (0, 1, "at least 0")),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0), "at least 0")),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "warmup_steps", "neftune_noise_alpha"),
        (0, math.inf, "at least 0"),
    ),
    "adam_epsilon": (1e-38, math.inf, "more than 0 (in float32: where a gradient is zero, the step would be 0/0)"),
    "dataloader_num_workers": (0, 4096, "at least 0"),
    "preprocessing_num_workers": (1, 4096, "at least 1"),
    "cutoff_len": (1, _MOST, "at least 1 token"),
    "max_samples": (1, _MOST, "at least 1 row"),
    "num_train_epochs": (1e-9, 10_000_000, "more than 0"),
    "val_size": (0, _MOST, "a share below 1, or a number of rows"),
    "quantization_bit": (1, 8, "1 to 8 bits"),
}
"""Bounds that LLaMA-Factory leaves unchecked: it would divide by zero, train on nothing, or fill the memory."""
_SIMPLE = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "list": "a list"}
_QUOTE = "(YAML reads unquoted yes, no, on and off as true and false: quote it)"


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
                raise ConfigError(
                    f"found no {path}; expected a version of {package} that dataflex requires; `dataflex doctor` "
                    "compares the installed one"
                )
            for node in ast.parse(path.read_text("utf-8")).body:
                if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                    found |= _fields(node)
    return found


@functools.cache
def template_names() -> tuple[str, ...]:
    """Return the chat templates that LLaMA-Factory registers; none if its sources are laid out otherwise."""
    calls = [node for node in ast.parse(source("llamafactory", "data/template.py")).body if isinstance(node, ast.Expr)]
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
    if name == "resume_from_checkpoint" and value is True:  # the newest, which Transformers' annotation leaves out
        return None
    if name == "resume_from_checkpoint" and value is False:
        return "a checkpoint's folder, true for the newest, or no such key (overwrite_output_dir: true begins anew)"
    return fault_of(known_keys()[name], name, value)


def fault_of(key: Key, name: str, value: Any) -> str | None:
    """Return what was expected of a value that has to fit `key`, or None if its type and size are right."""
    if value is None:
        return None if "None" in key.types else f"{key.expected} (leave the key out for its default)"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    kind = type(value).__name__  # not isinstance, to which true is a number
    accepted = accepted_types(name, key)
    if key.choices and isinstance(value, str):
        return None if value in key.choices else key.expected
    if name in _SPLIT_BY_COMMAS and isinstance(value, list) and not all(isinstance(item, str) for item in value):
        return "text, or a list of texts"
    if kind in accepted:
        return _out_of_bounds(name, value) if kind in ("int", "float") else None
    if kind == "bool" and (key.choices or "str" in accepted):
        return f"text {_QUOTE}: {key.expected}" if key.choices else f"{key.expected} {_QUOTE}"
    if kind == "str" and accepted & {"bool", "int", "float"} and "str" not in accepted:
        return f"{key.expected} (without quotes)"
    return key.expected


def accepted_types(name: str, key: Key) -> set[str]:
    """Return the types of values that a key takes: a whole number for a number, a list for text split by commas."""
    wider = {"int"} if "float" in key.types else set()
    return {*key.types, *wider, *({"list"} if name in _SPLIT_BY_COMMAS else ())}


def dataclass_keys(text: str, name: str) -> dict[str, Key | None]:
    """Return what the fields of a dataclass in a source take; none if it is not there."""
    return dict(next((_fields(n) for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name), {}))


def function_keys(text: str, name: str) -> dict[str, Key | None]:
    """Return what the arguments of a function in a source take, None where that is not said, `**` under its name."""
    node = next((n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name), None)
    found: dict[str, Key | None] = {}
    for each in [*node.args.args, *node.args.kwonlyargs, *filter(None, [node.args.kwarg])] if node is not None else ():
        types, choices = _annotation(each.annotation) if each.annotation is not None else (set(), [])
        found[each.arg] = (
            Key(frozenset(types), tuple(choices)) if types <= {*_SIMPLE, "dict", "None"} and types else None
        )
    return found


def _out_of_bounds(name: str, value: float) -> str | None:
    """Return what was expected of a number, or None if it is neither too small nor too large."""
    least, most, expected = BOUNDS.get(name, (-_MOST if isinstance(value, int) else -math.inf, _MOST, ""))
    if value < least:
        return expected or f"at least {least}"
    return f"at most {most}" if value > most else None


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
                found[item.target.id] = Key(frozenset(types), tuple(choices or _named(keywords)))
    return found


def _named(keywords: list[ast.keyword]) -> list[str]:
    """Return the `choices` that a field's metadata names."""
    metadata = next((k.value for k in keywords if k.arg == "metadata"), None)
    for key, value in zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ():
        if isinstance(key, ast.Constant) and key.value == "choices":
            if isinstance(value, ast.List):
                return [str(item.value) for item in value.elts if isinstance(item, ast.Constant)]
            return list(log_levels()) if ast.unparse(value) == "trainer_log_levels.keys()" else []
    return []


def _annotation(node: ast.expr) -> tuple[set[str], list[str]]:
    """Return the type names of an annotation, and the texts that a literal or an enum allows; a config is a mapping."""
    match node:
        case ast.Name(id=name) if name in enumerations():
            return set(), list(enumerations()[name])
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
