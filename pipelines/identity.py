"""What the decisions of a run are known by: everything they depend on but the trained weights, as plain data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex import distributed
from dataflex.checkpoints.marks import recorded
from dataflex.components.registry import import_plugin
from dataflex.components.user_code import code_digest, modules_digest
from dataflex.config.arguments import settings_in_identity, values
from dataflex.config.settings import Settings
from dataflex.features.need import Need
from dataflex.features.spec import BASE
from dataflex.fingerprint import digest, file_digest, keys_digest, plain
from dataflex.folders import folder_digest, model_folder
from dataflex.live.moments import MOMENTS_FILE
from dataflex.live.state import ModelState
from dataflex.live.weights import adapter_config
from dataflex.method import Method
from dataflex.rewards import build_reward, reward_identity
from dataflex.trainers.directing import DirectedTrainer
from dataflex.trainers.lineage import training_arguments

_SCRATCH = "cache_dir"
"""The parameter that names a folder to write to; its content is no input."""


def run_identity(
    settings: Settings, trainer: DirectedTrainer, state: ModelState, methods: Sequence[Method]
) -> dict[str, Any]:
    """Return everything that a decision depends on but the trained weights, as plain data. Collective.

    A file or folder that a parameter names stands there by its content, not by its path. Plugins enter whether the run
    names what they register or not: importing one may change anything.

    Raises:
        DataflexError: an encoder or reference that is named is not there.
    """
    sets, plugins = trainer.row_sets, settings.dataflex.plugins
    given = settings.params, settings.weighter_params, settings.prefilter_params
    params, beside, before = (None if some is None else plain(some.model_dump(mode="json")) for some in given)
    needs = [need for each in methods for need in each.needs()]
    rewards = [each for need in needs for each in need.spec.rewards]
    named: dict[str, Any] = {}
    with distributed.together():
        if distributed.is_main():
            named = _files(settings, params, beside, before) | _models(state, needs, methods)
    named = distributed.broadcast(named)
    state.encoders.update({text: about["encoder"] for text, about in named.items() if "encoder" in about})
    return {
        "component": settings.component_name or "",
        "code": [code_digest(settings.component), code_digest(settings.weighter)],
        "plugins": modules_digest(import_plugin(name).__name__ for name in plugins),
        "params": _by_content(params, named),
        "weighter": _by_content(beside, named),
        **({} if before is None else {"prefilter": [_by_content(before, named), code_digest(settings.prefilter)]}),
        "unnamed": sorted(digest(named[text]) for text in named.keys() - set(_texts([params, beside, before]))),
        "rewards": [reward_identity(build_reward(each.type, each.params(), plugins)) for each in rewards],
        "settings": settings_in_identity(settings.keys, settings.dataflex),
        "schedule": values(("schedule", "order"), trainer.args, trainer.finetuning_args),
        "base": state.loaded,
        "numerics": state.numerics(),
        "rows": keys_digest(sets.train.keys),
        "targets": {name: keys_digest(rows.keys) for name, rows in sets.targets.items()},
        "global batch": trainer.global_batch,
        **training_arguments(trainer),
    }


def _models(state: ModelState, needs: Sequence[Need], methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    """Return the content of the models that methods name: checkpoints, encoders, a reference that stands beside."""
    found: dict[str, dict[str, Any]] = {}
    specs = [need.spec for need in needs] + [spec for each in methods for spec in each.asked]
    for spec in specs:
        if (name := spec.encoder) is not None:
            found[name] = {"encoder": state.encoder(name)}
    for folder in dict.fromkeys(need.state for need in needs):
        if folder is not None and folder != BASE:
            asked = [need.spec for need in needs if need.state == folder]
            has_moments = any(spec.needs_moments for spec in asked)
            found.setdefault(folder, {})["checkpoint"] = _checkpoint(state, Path(folder), has_moments)
    for each in methods:
        reference = each.reference_model_path
        if reference is not None and "checkpoint" not in found.get(reference, {}):
            found[reference] = {"reference": _reference(state, Path(reference))}
    return found


def _checkpoint(state: ModelState, folder: Path, has_moments: bool) -> dict[str, Any]:
    """Name a checkpoint whose weights are put into the model; what its mark has sums of is not read again."""
    noted = recorded(folder).get("files", {})
    sums = {name: about["sha256"] for name, about in noted.items() if isinstance(about, dict)}
    more = ["trainer_state.json"]  # its learning rates weigh a checkpoint among others
    if has_moments:
        more += [MOMENTS_FILE if (folder / MOMENTS_FILE).is_file() else "optimizer.pt"]
    beside = {name: sums.get(name) or file_digest(folder / name) for name in more if (folder / name).is_file()}
    return {"model": _model(state, folder, sums), **beside}


def _reference(state: ModelState, folder: Path) -> list[str | None]:
    """Name a model that is loaded by itself; beside an adapter PEFT loads the base that it names."""
    is_adapter = (folder / "adapter_config.json").is_file()
    base = adapter_config(folder).get("base_model_name_or_path") if is_adapter else None
    return [_model(state, each) for each in (folder, *([model_folder(base)] if base else []))]


def _model(state: ModelState, folder: Path, sums: Mapping[str, str] | None = None) -> str | None:
    """Return a model's digest; None of a broken one, which is refused in words when it is looked at."""
    try:
        return state.model_digest(folder, sums)
    except (OSError, ValueError, RecursionError):
        return None


def _files(settings: Settings, params: Any, beside: Any, before: Any) -> dict[str, dict[str, Any]]:
    """Return the content of the files that parameters name, and of the folders that those of a user's class name.

    A built-in's folders are those of `_models`; any other text of its is a word, even if a folder is called so.
    """
    outputs = [Path(text).resolve() for text in (settings.llamafactory["output_dir"], settings.store_root)]
    found: dict[str, dict[str, Any]] = {}
    for cls, given in ((settings.component, params), (settings.weighter, beside), (settings.prefilter, before)):
        is_users = cls is not None and cls.__module__.partition(".")[0] != "dataflex"
        for text in _texts(given):
            path = Path(os.path.expanduser(text))
            if os.path.isfile(path):
                found[text] = {"file": file_digest(path)}
            elif is_users and text and os.path.isdir(path):
                if not any(path.resolve().is_relative_to(output) for output in outputs):
                    found[text] = {"folder": folder_digest(path)}
    return found


def _by_content(value: Any, named: Mapping[str, Any]) -> Any:
    """Return a parameter with what it names, at any depth, by content."""
    if isinstance(value, str):
        return named.get(value, value)
    if isinstance(value, Mapping):
        return {key: _by_content(part, named) for key, part in value.items()}
    return [_by_content(part, named) for part in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    """List the texts in a parameter, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, each in pairs:
            if key != _SCRATCH:
                yield from _texts(each)
