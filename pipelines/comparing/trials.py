"""The runs of a comparison: one for each arm, seed, target and draw of targets, in a folder of its own."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflex import __version__
from dataflex.components.registry import import_plugin
from dataflex.components.user_code import code_digest, modules_digest
from dataflex.config import load
from dataflex.config.arguments import ARGUMENTS, SETTINGS
from dataflex.config.paths import dataset_files, names
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError, CorruptionError, MismatchError
from dataflex.features.spec import ENGINE_VERSION
from dataflex.fingerprint import difference, file_digest, plain
from dataflex.pipelines.comparing.arms import Arm, overrides
from dataflex.rewards import build_reward, reward_identity
from dataflex.status import file_of
from dataflex.whole import replacing

_MEASURED = ("target_rows", "target_seed", "test_dataset", "test_reward", "test_tokens")
"""Keys that reach no value of a given run, and yet what is compared."""
_CHOOSING = (
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps", "eval_delay",
    "save_strategy", "save_steps", "early_stopping_steps", "resume_from_checkpoint",
)  # fmt: skip
"""Keys that move no step, and yet say which model a training ends with."""
_MODELS = ("model_name_or_path", "adapter_name_or_path", "tokenized_path")
"""Keys that name folders."""
_PACKAGES = ("torch", "transformers", "peft", "llamafactory")
_NAMED = 5


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Attributes:
        arm: what is trained.
        verb: `train`, or `evaluate` of a model that is not.
        root: the folder of all runs of the comparison.
        folder: its output folder; beside it, under the same name, `.json` says what it is and `.log` what it printed.
        keys: dotted keys that take the place of the run file's.
        seed: of the training; None where nothing is trained.
        target: the target set that the method is shown; None where it is shown none.
        target_seed: of the draw of target rows; None where none are drawn.
        settings: the whole run.
    """

    arm: Arm
    verb: str
    root: Path
    folder: Path
    keys: Mapping[str, Any]
    seed: int | None
    target: str | None
    target_seed: int | None
    settings: Settings = field(repr=False)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        parts = [self.arm.name]
        parts += [f"for {self.target}"] if self.target else []
        parts += [f"targets {self.target_seed}"] if self.target_seed is not None else []
        return " ".join([*parts, f"seed {self.seed}"] if self.seed is not None else parts)

    def command(self, run: Path, given: Sequence[str], more: Mapping[str, Any]) -> list[str]:
        """Return the command that makes it."""
        keys = {**self.keys, **more}
        return [sys.executable, "-m", "dataflex.cli", self.verb, str(run), *given, *overrides(keys)]

    @property
    def about(self) -> Path:
        """The file that says what it is."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def log(self) -> Path:
        """The file with what it printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run came to; None of one that has not come to its end.

        Raises:
            CorruptionError: its files cannot be read.
        """
        verb = "summary" if self.verb == "train" else self.verb
        status, summary = self.folder / file_of(self.verb), self.folder / f"dataflex_{verb}.json"
        if not status.is_file() or not summary.is_file():
            return None
        return dict(_json(summary)) if _json(status).get("state") == "finished" else None

    def check(self, identity: Mapping[str, Any]) -> bool:
        """Hold its folder against what it is to be; return whether it has been finished so before.

        Raises:
            MismatchError: the folder holds another run.
        """
        if not self.about.is_file():
            if self.folder.exists():
                raise MismatchError(
                    f"{self.folder}: found what no comparison made; remove it, or name another output_dir"
                )
            return False
        changed = difference(plain(dict(identity)), _json(self.about)["identity"])
        if changed and self._is_begun:
            more = f"; and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            raise MismatchError(
                f"{self.folder}: found a run that was begun otherwise (there → here): {'; '.join(changed[:_NAMED])}"
                f"{more}\n  expected the same comparison, whose finished runs are kept, or none\n  remove "
                f"{self.folder} and {self.about.name} beside it, or name another output_dir"
            )
        return not changed and self.summary is not None

    @property
    def _is_begun(self) -> bool:
        """Whether anything was trained there."""
        return (self.folder / "rounds").exists() or any(self.folder.glob("checkpoint-*")) or self.summary is not None

    def note(self, identity: Mapping[str, Any], command: Sequence[str]) -> None:
        """Write what it is beside its folder, as it begins."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.about) as temporary:
            about = {"name": self.name, "command": list(command), "identity": plain(dict(identity))}
            temporary.write_text(json.dumps(about, indent=1) + "\n", "utf-8")

    def identity(self, mirrored: Trial | None, processes: int) -> dict[str, Any]:
        """Return what its result depends on, as far as that can be told without reading weights.

        Data and files that keys name are told by content, a model's folder by the name, size and time of its files, a
        name on the Hub by itself.

        Args:
            mirrored: the run whose lengths it has.
            processes: that it is trained by, which the global batch follows from.
        """
        settings, llamafactory = self.settings, self.settings.llamafactory
        without = {k for k, way in ARGUMENTS.items() if way == "no value"} - set(_CHOOSING) | {"dataset_dir"}
        ours = {k for k, way in SETTINGS.items() if way == "identity"} | set(_MEASURED)
        params = [
            None if some is None else some.model_dump(mode="json")
            for some in (settings.params, settings.weighter_params)
        ]
        models = [each for key in _MODELS for each in names(llamafactory.get(key))]
        reward = settings.dataflex.test_reward
        sets = {"dataset", "eval_dataset"}
        wanted = [*(each for key in sets for each in names(llamafactory.get(key))), *settings.dataflex.test_dataset]
        return {
            "verb": self.verb,
            "arguments": _by_content({k: v for k, v in llamafactory.items() if k not in without}),
            "settings": {
                k: v
                for holder in (settings.keys, settings.dataflex)
                for k, v in holder.model_dump(mode="json", include=ours | {"early_stopping_min_delta"}).items()
            },
            "component": settings.component_name,
            "params": _by_content(params),
            "reward": None
            if reward is None
            else reward_identity(build_reward(reward.type, reward.params(), settings.dataflex.plugins)),
            "code": [code_digest(settings.component), code_digest(settings.weighter)],
            "plugins": modules_digest(import_plugin(name).__name__ for name in settings.dataflex.plugins),
            "data": _data(sorted(set(wanted)), llamafactory.get("dataset_dir", "data")),
            "models": {name: _files(Path(name).expanduser()) for name in models},
            "processes": processes,
            "versions": {
                "dataflex": __version__,
                "engine": ENGINE_VERSION,
                **{name: importlib.metadata.version(name) for name in _PACKAGES},
            },
            "lengths of": mirrored.identity(None, processes) if mirrored is not None else None,
        }


def trials_of(
    run: Path,
    given: Sequence[str],
    arms: Sequence[Arm],
    seeds: int,
    targets: Sequence[str],
    target_seeds: int,
    base: Settings,
) -> list[Trial]:
    """Lay out the runs of a comparison, every run file checked.

    A method that is shown no target is trained once for all of them.

    Args:
        run: the run file.
        given: what the command line puts in place of its values.
        arms: what is compared.
        seeds: runs of each that is trained: the run file's `seed` and the ones that follow it.
        targets: target sets, each of which methods are shown alone; none: those of the run file, together.
        target_seeds: draws of target rows for each, where methods are shown some of them.
        base: the run file, read.

    Raises:
        ConfigError: a run file that follows is wrong, or draws are asked for where all rows are shown.
    """
    if target_seeds > 1 and base.dataflex.target_rows is None:
        raise ConfigError(
            "--target-seeds: found no dataflex.target_rows in the run file; expected how many of each target set's "
            "rows are drawn"
        )
    root, first = Path(base.llamafactory["output_dir"]) / "compare", base.llamafactory.get("seed", 42)
    if not arms or len(set(targets)) < len(targets):
        named = ",".join(targets) if arms else "no method"
        raise ConfigError(f"--methods, --targets: found {named}; expected methods, and each target set once")
    found: list[Trial] = []
    for arm in arms:
        settings = load(run, [*given, *overrides(arm.keys)])
        is_shown = arm.is_trained and _is_shown_targets(settings)
        trainings = range(first, first + seeds) if arm.is_trained else [None]
        is_drawn, least = settings.dataflex.target_rows is not None, settings.dataflex.target_seed
        draws = range(least, least + target_seeds) if is_shown and is_drawn else [None]
        for target, draw, seed in itertools.product(targets if is_shown and targets else [None], draws, trainings):
            chosen = {"eval_dataset": target, "dataflex.target_seed": draw, "seed": seed}
            drawn = None if draw is None else f"targets-{draw}"
            parts = [each for each in (arm.folder, target, drawn) if each is not None]
            folder = root.joinpath(*parts, "model" if seed is None else f"seed-{seed}")
            keys = {**arm.keys, **{k: v for k, v in chosen.items() if v is not None}, "output_dir": str(folder)}
            whole = load(run, [*given, *overrides(keys)])
            shown = target or (str(whole.llamafactory.get("eval_dataset")) if is_shown else None)
            verb = "train" if arm.is_trained else "evaluate"
            found.append(Trial(arm, verb, root, folder, keys, seed, shown, draw, whole))
    return found


def _is_shown_targets(settings: Settings) -> bool:
    """Say whether a method compares rows with target rows."""
    methods = [each for each in (settings.new_method(), settings.new_weighter()) if each is not None]
    return any(need.of == "targets" for need in settings.needs) or any(each.needs_targets for each in methods)


def _data(wanted: Sequence[str], directory: str) -> dict[str, Any]:
    """Return the registration of each dataset and the content of its files; nothing more of one that is elsewhere."""
    info = Path(directory) / "dataset_info.json"
    entries = _json(info) if info.is_file() else {}
    found = dataset_files(wanted, directory)
    return {name: [entries.get(name), {file.name: _digest(file) for file in files}] for name, files in found.items()}


def _by_content(value: Any) -> Any:
    """Return plain data with the content beside each text that is the path of a file."""
    if isinstance(value, Mapping):
        return {key: _by_content(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(each) for each in value]
    is_file = isinstance(value, str) and os.path.isfile(os.path.expanduser(value))
    return [value, _digest(Path(value).expanduser())] if is_file else value


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


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise CorruptionError(f"{path}: not readable ({error}); remove it and what is beside it") from error
