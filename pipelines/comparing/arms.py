"""What is compared: the name of each method as the command line has it, turned into keys of an ordinary run file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dataflex.components.registry import MIXERS, SELECTORS, WEIGHTERS, did_you_mean
from dataflex.config.idle import known_steps
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError
from dataflex.schedule import MOST_STEPS

SPECIAL = {
    "base": "the model before any training",
    "full": "the whole pool in a random order, as many steps as the others, no row twice before all were trained on",
    "full_epoch": "one pass over the whole pool, however many steps that takes",
    "random_length": "random rows whose lengths are distributed as those of another method: random_length:rds_plus",
}
"""Names that stand for no method, and what they mean."""
_KINDS = {"dynamic_select": SELECTORS, "dynamic_mix": MIXERS, "dynamic_weight": WEIGHTERS}
_MIRRORS = "random_length"


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
        name: as the command line has it.
        keys: dotted keys of a run file and their values, which take the place of the run's.
        is_trained: whether it is trained at all.
        mirrors: name of the arm whose lengths it has.
    """

    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    is_trained: bool = True
    mirrors: str | None = None

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "arm"


def overrides(keys: Mapping[str, Any]) -> list[str]:
    """Return keys and values as the command line takes them; JSON is YAML too."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]


def arms_of(names: Sequence[str], run: Settings) -> list[Arm]:
    """Turn names into arms.

    Args:
        names: methods, entries of `dataflex.arms`, and those of `SPECIAL`.
        run: the run file that all of them vary.

    Raises:
        ConfigError: a name stands twice, or for nothing; or the number of steps is not known, and an arm needs it.
    """
    found: dict[str, Arm] = {}
    for name in names:
        if name in found:
            raise ConfigError(f"--methods: found {name} twice; expected each method once")
        found[name] = _arm(name, names, run)
    folders: dict[str, str] = {}
    for arm in found.values():
        if (other := folders.setdefault(arm.folder, arm.name)) != arm.name:
            raise ConfigError(
                f"--methods: {other} and {arm.name} would share the folder {arm.folder}; give one of them another name "
                "under dataflex.arms"
            )
    return list(found.values())


def _arm(name: str, names: Sequence[str], run: Settings) -> Arm:
    if name in run.dataflex.arms:
        return Arm(name, dict(run.dataflex.arms[name]))
    special, _, of = name.partition(":")
    if special == _MIRRORS:
        return _mirror(name, of, names, run)
    if name == "base":
        return Arm(name, is_trained=False)
    random = {**_kind("dynamic_select", run), "component_name": "random", "dataflex.params": {}}
    if name == "full":
        steps = _steps(name, run)
        return Arm(name, {**random, "warmup_step": steps, "train_step": steps})
    if name == "full_epoch":
        whole = {"warmup_step": MOST_STEPS, "update_step": 0, "update_times": 1, "train_step": 0}
        return Arm(name, {**random, **whole, "num_train_epochs": 1.0})
    return Arm(name, _method(name, run))


def _mirror(name: str, of: str, names: Sequence[str], run: Settings) -> Arm:
    """Return an arm of random rows with another arm's lengths."""
    others = [each for each in names if each not in SPECIAL and each != "random" and not each.startswith(_MIRRORS)]
    of = of or next(iter(others), "")
    if of not in others:
        raise ConfigError(
            f"--methods: found {name}; expected {_MIRRORS}:METHOD with another method of the list, whose lengths it "
            f"takes ({', '.join(others) or 'there is none'})"
        )
    keys = {**_kind("dynamic_select", run), "component_name": "random", "dataflex.params": {}}
    return Arm(name, keys, mirrors=of)


def _method(name: str, run: Settings) -> dict[str, Any]:
    """Return the keys under which a method is trained; the run's own keeps its parameters."""
    if name == run.component_name:
        return {}
    own = _KINDS.get(run.train_type)
    order = sorted(_KINDS.items(), key=lambda item: item[1] is not own)
    kind = next((kind for kind, registry in order if name in registry.places()), None)
    if kind is None and ":" in name:
        kind = order[0][0]
    if kind is None:
        known = [*SPECIAL, *run.dataflex.arms, *(each for _, registry in order for each in sorted(registry.places()))]
        raise ConfigError(
            f"--methods: found {name!r}; expected {', '.join(SPECIAL)}, an entry of dataflex.arms, or a method that "
            f"`dataflex ls` lists{did_you_mean(name, known)}"
        )
    keys: dict[str, Any] = {**_kind(kind, run), "component_name": name, "dataflex.params": {}}
    if kind != run.train_type:  # kinds count steps differently, and all are to train as long
        keys["train_step"] = _steps(name, run)
    return keys


def _kind(kind: str, run: Settings) -> dict[str, Any]:
    """Return the keys that make a run one of another method; only a mixer has a weighter beside.

    A prefilter is the run's own method's; an entry of `dataflex.arms` may name one for another.
    """
    alone = kind != run.train_type and run.dataflex.weighter is not None
    before = {} if run.dataflex.prefilter is None else {"dataflex.prefilter": None}
    return {"train_type": kind} | ({"dataflex.weighter": None} if alone else {}) | before


def _steps(name: str, run: Settings) -> int:
    """Return the optimizer steps of the run.

    Raises:
        ConfigError: they follow from its rows.
    """
    steps = known_steps(run.keys, run.schedule, run.llamafactory)
    if steps is None:
        raise ConfigError(
            f"--methods: {name} is trained for as many steps as the run, and how many these are follows from its rows; "
            "set train_step"
        )
    return steps
