"""What the result of a run depends on: told quickly for the run's own folder, and wholly by content for elsewhere."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex import __version__
from dataflex.components.registry import import_plugin
from dataflex.components.user_code import code_digest, modules_digest
from dataflex.config.arguments import ARGUMENTS, SETTINGS
from dataflex.config.paths import dataset_files, names
from dataflex.config.settings import Settings
from dataflex.features.spec import ENGINE_VERSION
from dataflex.fingerprint import file_digest, model_digest
from dataflex.folders import folder_digest
from dataflex.pipelines.comparing.reading import json_object
from dataflex.rewards import build_reward, reward_identity

if TYPE_CHECKING:
    from dataflex.pipelines.comparing.trials import Trial

_MEASURED = ("target_rows", "target_seed", "test_dataset", "test_reward", "test_reward_dataset", "test_tokens")
"""Keys that reach no value of a given run, and yet what is compared."""
_CHOOSING = (
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps", "eval_delay",
    "save_strategy", "save_steps", "early_stopping_steps", "resume_from_checkpoint",
)  # fmt: skip
"""Keys that move no step, and yet say which model a training ends with."""
_MODELS = ("model_name_or_path", "adapter_name_or_path", "tokenized_path")
"""Keys that name folders."""
_BESIDE_WEIGHTS = (".json", ".txt", ".model", ".jinja")
"""Files of a model's folder that its tokenizer and its generation are read from."""
_IN_MODEL_DIGEST = ("config.json", "adapter_config.json")
PACKAGES = ("torch", "transformers", "peft", "llamafactory")


def identity(trial: Trial, mirrored: Trial | None, processes: int, is_portable: bool = False) -> dict[str, Any]:
    """Return what a run's result depends on.

    Data and files that keys name are told by content. A model's folder is told by the name, size and time of its files,
    which needs no weights; portably, by their content, and then no path and no time is in the answer. A name on the Hub
    stands for itself.

    Args:
        trial: the run.
        mirrored: the run whose lengths it has.
        processes: that it is trained by, which the global batch follows from.
        is_portable: whether another machine is to come to the same.
    """
    settings, llamafactory = trial.settings, trial.settings.llamafactory
    without = {k for k, way in ARGUMENTS.items() if way == "no value"} - set(_CHOOSING) | {"dataset_dir"}
    # A prefilter stands by itself, where there is one: what was known before there were any keeps its name.
    ours = {k for k, way in SETTINGS.items() if way == "identity"} - {"prefilter"} | set(_MEASURED)
    if is_portable:
        without |= set(_MODELS)
        ours -= {"test_reward"}  # may name a file by its place; `reward` has what it is
    params = [
        None if some is None else some.model_dump(mode="json") for some in (settings.params, settings.weighter_params)
    ]
    models = {key: names(llamafactory.get(key)) for key in _MODELS}
    reward = settings.dataflex.test_reward
    sets = {"dataset", "eval_dataset"}
    wanted = [*(each for key in sets for each in names(llamafactory.get(key))), *settings.dataflex.test_dataset]
    rows = trial if trial.choice is None else trial.choice
    return {
        "verb": trial.verb,
        "arguments": _by_content({k: v for k, v in llamafactory.items() if k not in without}, is_portable),
        "settings": {
            k: v
            for holder in (settings.keys, settings.dataflex)
            for k, v in holder.model_dump(mode="json", include=ours | {"early_stopping_min_delta"}).items()
        },
        "component": settings.component_name,
        "params": _by_content(params, is_portable),
        "reward": None
        if reward is None
        else reward_identity(build_reward(reward.type, reward.params(), settings.dataflex.plugins)),
        "code": [code_digest(settings.component), code_digest(settings.weighter)],
        "plugins": modules_digest(import_plugin(name).__name__ for name in settings.dataflex.plugins),
        "data": _data(sorted(set(wanted)), llamafactory.get("dataset_dir", "data"), is_portable),
        "models": {key: [_model(name) for name in found] for key, found in models.items() if found}
        if is_portable
        else {name: _files(Path(name).expanduser()) for found in models.values() for name in found},
        "processes": processes,
        "versions": {
            "dataflex": __version__,
            "engine": ENGINE_VERSION,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "lengths of": identity(mirrored, None, processes, is_portable)
        if mirrored is not None and rows is trial
        else None,
        **({} if settings.prefilter is None else {"prefilter": _prefilter(settings, is_portable)}),
        **({} if trial.num is None else {"rows chosen": trial.num}),
        **({} if rows is trial else {"choice": identity(rows, mirrored, processes, is_portable)}),
    }


def _prefilter(settings: Settings, is_portable: bool) -> dict[str, Any]:
    """Return what a prefilter keeps by."""
    options = settings.dataflex.prefilter
    assert options is not None
    params = settings.prefilter_params.model_dump(mode="json")
    code = code_digest(settings.prefilter)
    return {**options.model_dump(mode="json"), "params": _by_content(params, is_portable), "code": code}


def _data(wanted: Sequence[str], directory: str, is_portable: bool) -> dict[str, Any]:
    """Return the registration of each dataset and the content of its files; nothing more of one that is elsewhere."""
    info = Path(directory) / "dataset_info.json"
    entries = json_object(info) if info.is_file() else {}
    found = dataset_files(wanted, directory)
    if not is_portable:
        return {
            name: [entries.get(name), {file.name: _digest(file) for file in files}] for name, files in found.items()
        }
    return {
        name: [{k: v for k, v in (entries.get(name) or {}).items() if k != "file_name" or not files},
               [_digest(file) for file in files]]
        for name, files in found.items()
    }  # fmt: skip


def _by_content(value: Any, is_portable: bool) -> Any:
    """Return plain data with the content beside each text that is the path of a file; portably, in its place.

    Portably, folders are told by content as well, where the text can be nothing else than a path.
    """
    if isinstance(value, Mapping):
        scratch = {"cache_dir"} if is_portable else set()
        return {key: _by_content(each, is_portable) for key, each in value.items() if key not in scratch}
    if isinstance(value, list | tuple):
        return [_by_content(each, is_portable) for each in value]
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    if os.path.isfile(path):
        return {"sha256": _digest(path)} if is_portable else [value, _digest(path)]
    if is_portable and "/" in value and path.is_dir():
        return {"folder": _folder_digest(path.resolve(), _listed(path))}
    return value


def _model(name: str) -> Any:
    """Return the content of a model's folder: weights, configuration, tokenizer. A name on the Hub stays one."""
    folder = Path(name).expanduser()
    return _model_digests(folder.resolve(), _listed(folder)) if folder.is_dir() else name


@functools.cache
def _model_digests(folder: Path, listed: tuple[Any, ...]) -> dict[str, str]:
    """Return the digests of a folder, read once as long as no file of it changes."""
    beside = [
        each for each in sorted(folder.iterdir())
        if each.suffix in _BESIDE_WEIGHTS and each.name not in _IN_MODEL_DIGEST and each.is_file()
    ]  # fmt: skip
    found = {each.name: file_digest(each) for each in beside}
    try:
        return {"weights and configuration": model_digest(folder), **found}
    except FileNotFoundError:  # a tokenized dataset
        return {"folder": folder_digest(folder)}


@functools.cache
def _folder_digest(folder: Path, listed: tuple[Any, ...]) -> str:
    return folder_digest(folder)


def _listed(folder: Path) -> tuple[Any, ...]:
    """Return path, bytes and time of each file below a folder: as long as they stay, so does its content."""
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return tuple((str(each), each.stat().st_size, each.stat().st_mtime_ns) for each in files)


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file, which is read once."""
    about = file.stat()
    return _digest_of(file.resolve(), about.st_size, about.st_mtime_ns)


@functools.cache
def _digest_of(file: Path, size: int, time: int) -> str:
    return file_digest(file)


def _files(folder: Path) -> list[list[Any]] | None:
    """Return name, bytes and time of each file of a folder; None where there is no folder."""
    if not folder.is_dir():
        return None
    return [[each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in sorted(folder.iterdir())]
