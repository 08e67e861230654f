"""What the result of a run depends on: told quickly for the run's own folder, and wholly by content for elsewhere."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex import __version__
from dataflex.components.params import without_added
from dataflex.components.registry import import_plugin
from dataflex.components.user_code import code_digest, modules_digest
from dataflex.config.arguments import ARGUMENTS, SETTINGS, of_evaluation
from dataflex.config.paths import names
from dataflex.config.settings import Settings
from dataflex.features.spec import ENGINE_VERSION
from dataflex.pipelines.comparing import content
from dataflex.rewards import build_reward, reward_identity

if TYPE_CHECKING:
    from dataflex.pipelines.comparing.trials import Trial

_TESTS = {"test_dataset", "test_reward", "test_reward_dataset", "test_tokens"}
"""Keys that say what is measured."""
_SHOWN = {"target_rows", "target_seed"}
"""Keys that reach no value of a given run, and yet what a method is shown."""
_CHOOSING = {
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps", "eval_delay",
    "save_strategy", "save_steps", "early_stopping_steps", "resume_from_checkpoint",
}  # fmt: skip
"""Keys that move no step, and yet say which model a training ends with."""
_MODELS = ("model_name_or_path", "adapter_name_or_path", "tokenized_path")
"""Keys that name folders."""
PACKAGES = ("torch", "transformers", "peft", "llamafactory")


def identity(trial: Trial, mirrored: Trial | None, processes: int, is_portable: bool = False) -> dict[str, Any]:
    """Return what a run's result depends on.

    Data and files that keys name are told by content. A model's folder is told by the name, size and time of its files,
    which needs no weights; portably, by their content, and then no path and no time is in the answer. A name on the Hub
    stands for itself. Parameters and keys that came later are left out where they do what was done before.

    Args:
        trial: the run.
        mirrored: the run whose lengths it has.
        processes: that it is trained by, which the global batch follows from.
        is_portable: whether another machine is to come to the same.
    """
    settings = trial.settings
    if trial.verb == "evaluate":  # of a model that no method has touched
        given = of_evaluation(settings.llamafactory)
        return _measured(trial, given, {"dataset"}, _TESTS, processes, is_portable)
    without = {k for k, way in ARGUMENTS.items() if way == "no value"} - _CHOOSING
    given = {k: v for k, v in settings.llamafactory.items() if k not in without}
    # A prefilter stands by itself, where there is one: what was known before there were any keeps its name.
    keys = {k for k, way in SETTINGS.items() if way == "identity"} - {"prefilter"} | _SHOWN | _TESTS
    keys |= {"early_stopping_min_delta"}
    params = [None if some is None else without_added(some) for some in (settings.params, settings.weighter_params)]
    rows = trial if trial.choice is None else trial.choice
    return {
        **_measured(trial, given, {"dataset", "eval_dataset"}, keys, processes, is_portable),
        "component": settings.component_name,
        "params": content.by_content(params, is_portable),
        "code": [code_digest(settings.component), code_digest(settings.weighter)],
        "lengths of": identity(mirrored, None, processes, is_portable)
        if mirrored is not None and rows is trial
        else None,
        **({} if settings.prefilter is None else {"prefilter": _prefilter(settings, is_portable)}),
        **({} if trial.num is None else {"rows chosen": trial.num}),
        **({} if rows is trial else {"choice": identity(rows, mirrored, processes, is_portable)}),
    }


def _measured(
    trial: Trial,
    given: Mapping[str, Any],
    sets: Collection[str],
    keys: Collection[str],
    processes: int,
    is_portable: bool,
) -> dict[str, Any]:
    """Return what any figure of a model depends on: the model, its rows, what judges it, and what computes.

    Args:
        trial: the run.
        given: arguments of LLaMA-Factory that matter.
        sets: those of them that name datasets, beside the test sets.
        keys: DataFlex's own that matter.
        processes: of the run.
        is_portable: whether another machine is to come to the same.
    """
    settings, without = trial.settings, {"dataset_dir"}
    if is_portable:
        without |= set(_MODELS)
        keys = set(keys) - {"test_reward"}  # may name a file by its place; `reward` has what it is
    reward, plugins = settings.dataflex.test_reward, settings.dataflex.plugins
    wanted = [*(each for key in sets for each in names(given.get(key))), *settings.dataflex.test_dataset]
    models = {key: names(given.get(key)) for key in _MODELS}
    return {
        "verb": trial.verb,
        "arguments": content.arguments({k: v for k, v in given.items() if k not in without}, is_portable),
        "settings": {
            k: v for each in (settings.keys, settings.dataflex) for k, v in without_added(each, set(keys)).items()
        },
        "reward": None if reward is None else reward_identity(build_reward(reward.type, reward.params(), plugins)),
        "plugins": modules_digest(import_plugin(name).__name__ for name in plugins),
        "data": content.datasets(sorted(set(wanted)), settings.llamafactory.get("dataset_dir", "data"), is_portable),
        "models": {key: [content.model(name) for name in found] for key, found in models.items() if found}
        if is_portable
        else {name: content.folder_files(Path(name).expanduser()) for found in models.values() for name in found},
        "processes": processes,
        "versions": {
            "dataflex": __version__,
            "engine": ENGINE_VERSION,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def _prefilter(settings: Settings, is_portable: bool) -> dict[str, Any]:
    """Return what a prefilter keeps by."""
    options = settings.dataflex.prefilter
    assert options is not None
    params = content.by_content(without_added(settings.prefilter_params), is_portable)
    return {**without_added(options), "params": params, "code": code_digest(settings.prefilter)}
