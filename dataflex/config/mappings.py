"""Keys of Transformers whose value is a mapping, or names a file with one: what may stand in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex.config.enumerations import source
from dataflex.config.llamafactory_keys import Key, dataclass_keys, fault_of, function_keys
from dataflex.config.paths import json_object
from dataflex.config.problems import Origin, Problems

_FILES = ("deepspeed", "accelerator_config", "fsdp_config")
"""Keys that may name a JSON file."""
_TEXTS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs")
"""Keys that may hold the mapping as JSON in a text."""
_SCHEDULES = re.compile(r"^    SchedulerType\.(?P<member>\w+): (?P<function>\w+),$", re.MULTILINE)
_GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")
"""Arguments of a schedule that are not the run file's."""
_NO_OPTIONS = ("constant", "constant_with_warmup")
_NO_OPTIM_ARGS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor")
"""Optimizers that read nothing of `optim_args`."""


def check_mappings(values: Mapping[str, Any], origin: Origin, problems: Problems) -> list[str]:
    """Note entries that the trainer would refuse; return notes on those that it would take and not read.

    Args:
        values: LLaMA-Factory's keys.
        origin: where they were written.
        problems: takes what is wrong.
    """
    found = {key: _mapping(key, values[key], origin, problems) for key in (*_FILES, *_TEXTS) if values.get(key)}
    if config := found.get("accelerator_config"):
        known = dataclass_keys(source("transformers", "trainer_pt_utils.py"), "AcceleratorConfig") or None
        _check_items("accelerator_config", config, known, origin, problems)
    schedule, notes = values.get("lr_scheduler_type", "linear"), []
    if (options := found.get("lr_scheduler_kwargs")) and schedule in _NO_OPTIONS:
        notes.append(f"lr_scheduler_kwargs: no effect: lr_scheduler_type: {schedule} reads none")
    elif options:
        _check_items("lr_scheduler_kwargs", options, _of_schedule(schedule), origin, problems)
    return notes + _check_optimizer(values, origin, problems)


def _mapping(key: str, value: Any, origin: Origin, problems: Problems) -> dict[str, Any] | None:
    """Return the mapping that a key has or names, None where there is none, which is noted."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        return None  # its type is noted already
    if value.startswith("{"):
        try:
            return dict(json.loads(value))
        except (ValueError, TypeError, RecursionError):
            problems.add(origin, key, "a mapping, or JSON of one", value)
    elif key not in _FILES:
        problems.add(origin, key, "a mapping of keys to values", value)
    elif not os.path.isfile(value):
        problems.add(origin, key, "a JSON file that exists", value)
    else:
        return json_object(Path(value), problems)
    return None


def _check_items(
    key: str, items: Mapping[str, Any], known: Mapping[str, Key | None] | None, origin: Origin, problems: Problems
) -> None:
    """Check a mapping's keys and values against those that are known; None if it is not known what it takes."""
    if known is None:
        return
    for name, value in items.items():
        what = known.get(name)
        if name not in known:
            problems.add_unknown(origin, f"{key}.{name}", "key", known)
        elif what is not None and (expected := fault_of(what, f"{key}.{name}", value)):
            problems.add(origin, f"{key}.{name}", expected, value)


def _of_schedule(schedule: str) -> dict[str, Key | None] | None:
    """Return what a learning-rate schedule takes; None if that is not known, because it hands on whatever it gets."""
    # By the sources, as with the keys: importing Transformers to look at signatures would take seconds.
    text = source("transformers", "optimization.py")
    functions = {match["member"]: match["function"] for match in _SCHEDULES.finditer(text)}
    names = re.findall(r'^    (\w+) = "(\w+)"$', source("transformers", "trainer_utils.py"), re.MULTILINE)
    member = next((member for member, value in names if value == schedule and member in functions), None)
    found = function_keys(text, functions[member]) if member is not None else {}
    return None if "kwargs" in found or not found else {name: key for name, key in found.items() if name not in _GIVEN}


def _check_optimizer(values: Mapping[str, Any], origin: Origin, problems: Problems) -> list[str]:
    given, optimizer = values.get("optim_args"), values.get("optim", "adamw_torch")
    if not isinstance(given, str) or not given:
        return []
    if not all(re.fullmatch(r"[^=]+=[^=]+", part) for part in given.replace(" ", "").split(",")):
        problems.add(origin, "optim_args", "name=value, several with commas between", given)
    elif optimizer in _NO_OPTIM_ARGS:
        return [f"optim_args: no effect: optim: {optimizer} reads none"]
    return []
