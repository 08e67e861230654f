"""The runs of a comparison: one for each arm, seed, target and draw of targets, in a folder of its own."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dataflex.config import load
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError, MismatchError
from dataflex.fingerprint import difference, plain
from dataflex.pipelines.comparing.arms import Arm, overrides
from dataflex.pipelines.comparing.identity import identity
from dataflex.pipelines.comparing.once import CHOSEN, Once
from dataflex.pipelines.comparing.reading import json_object
from dataflex.status import file_of
from dataflex.whole import replacing

_NAMED = 5


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Attributes:
        arm: what is trained.
        verb: `train`, `evaluate` of a model that is not, or `select` of rows that another run is trained on.
        root: the folder of all runs of the comparison.
        folder: its output folder; beside it, under the same name, `.json` says what it is and `.log` what it printed.
        keys: dotted keys that take the place of the run file's.
        seed: of the training; None where nothing is trained.
        target: the target set that the method is shown; None where it is shown none.
        target_seed: of the draw of target rows; None where none are drawn.
        settings: the whole run.
        num: rows to choose, of a `select`.
        choice: the run that chooses, once, the rows that this one is trained on.
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
    num: int | None = None
    choice: Trial | None = None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        parts = [self.arm.name if self.num is None else f"choice of {self.arm.name}"]
        parts += [f"for {self.target}"] if self.target else []
        parts += [f"targets {self.target_seed}"] if self.target_seed is not None else []
        return " ".join([*parts, f"seed {self.seed}"] if self.seed is not None else parts)

    def command(self, run: Path, given: Sequence[str], more: Mapping[str, Any]) -> list[str]:
        """Return the command that makes it."""
        keys = {**self.keys, **more}
        if self.choice is not None:
            keys |= {"component_name": "static", "dataflex.params": {"path": str(self.choice.chosen)}}
        options = (
            [] if self.num is None else ["--num", str(self.num), "--output", str(self.chosen.with_suffix(".json"))]
        )
        return [sys.executable, "-m", "dataflex.cli", self.verb, str(run), *given, *overrides(keys), *options]

    @property
    def chosen(self) -> Path:
        """The rows that a `select` chose."""
        return self.folder / CHOSEN

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
        """What the run came to; None of one that has not come to its end, or whose choice is gone.

        Raises:
            CorruptionError: its files cannot be read.
        """
        if self.choice is not None and self.choice.summary is None:
            return None  # what it has cost to choose its rows is not known
        return self._own_summary

    @property
    def _own_summary(self) -> dict[str, Any] | None:
        verb = "summary" if self.verb == "train" else self.verb
        status, summary = self.folder / file_of(self.verb), self.folder / f"dataflex_{verb}.json"
        if not status.is_file() or not summary.is_file():
            return None
        return dict(json_object(summary)) if json_object(status).get("state") == "finished" else None

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
        changed = difference(plain(dict(identity)), json_object(self.about)["identity"])
        if changed and self._is_begun:
            more = f"; and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            raise MismatchError(
                f"{self.folder}: found a run that was begun otherwise (there → here): {'; '.join(changed[:_NAMED])}"
                f"{more}\n  expected the same comparison, whose finished runs are kept, or none\n  remove "
                f"{self.folder} and {self.about.name} beside it, or name another output_dir"
            )
        return not changed and self.summary is not None

    def require_choice(self) -> None:
        """Refuse what has come to its end, where what its choice has cost is not there any more.

        Raises:
            MismatchError: it is so.
        """
        if self.choice is not None and self.summary is None and self._own_summary is not None:
            raise MismatchError(
                f"{self.folder}: found a finished run whose choice is not finished, or gone; expected it in "
                f"{self.choice.folder}, with what choosing has cost\n  put it back, or remove {self.folder} and "
                f"{self.about.name} beside it: both are then made again"
            )

    @property
    def _is_begun(self) -> bool:
        """Whether anything was trained there."""
        is_stepped = (self.folder / "rounds").exists() or any(self.folder.glob("checkpoint-*"))
        return is_stepped or self._own_summary is not None

    def note(self, identity: Mapping[str, Any], command: Sequence[str]) -> None:
        """Write what it is beside its folder, as it begins."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.about) as temporary:
            about = {"name": self.name, "command": list(command), "identity": plain(dict(identity))}
            temporary.write_text(json.dumps(about, indent=1) + "\n", "utf-8")

    def identity(self, mirrored: Trial | None, processes: int, is_portable: bool = False) -> dict[str, Any]:
        """Return what its result depends on, see `dataflex.pipelines.comparing.identity`."""
        return identity(self, mirrored, processes, is_portable)


def trials_of(
    run: Path,
    given: Sequence[str],
    arms: Sequence[Arm],
    seeds: int,
    targets: Sequence[str],
    target_seeds: int,
    base: Settings,
    once: Once | None = None,
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
        once: how rows are chosen once; None: by every run, at each of its updates.

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
    shown_to = {
        arm.name: arm.is_trained and _is_shown_targets(load(run, [*given, *overrides(arm.keys)])) for arm in arms
    }
    for arm in arms:
        settings = load(run, [*given, *overrides(arm.keys)])
        # What has the lengths of another's rows has them for each target that those were chosen for.
        is_shown = shown_to[arm.mirrors or arm.name]
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
            trial = Trial(arm, verb, root, folder, keys, seed, shown, draw, whole)
            found.append(trial if once is None or not once.chooses(arm, whole) else _of_choice(trial, run, given, once))
    return found


def _of_choice(trial: Trial, run: Path, given: Sequence[str], once: Once) -> Trial:
    """Return a run that is trained on what the given one, as far as its first update, chooses."""
    folder = trial.folder.with_name(f"{trial.folder.name}-choice")
    keys = {**trial.keys, "output_dir": str(folder)}
    choice = replace(trial, verb="select", folder=folder, keys=keys, num=once.rows)
    trained = once.training(trial.keys)
    return replace(trial, keys=trained, settings=load(run, [*given, *overrides(trained)]), choice=choice)


def _is_shown_targets(settings: Settings) -> bool:
    """Say whether a method compares rows with target rows."""
    methods = [each for each in (settings.new_method(), settings.new_weighter()) if each is not None]
    return any(need.of == "targets" for need in settings.needs) or any(each.needs_targets for each in methods)
