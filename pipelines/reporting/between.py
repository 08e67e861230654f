"""What several runs have in common, and what came out of them. R runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex.fingerprint import digest
from dataflex.fingerprint import plain as as_plain
from dataflex.pipelines.comparing.estimate import Estimate
from dataflex.pipelines.reporting.arrays import heads
from dataflex.pipelines.reporting.facts import Facts

_SEEDS = ("seed", "data_seed", "output_dir", "run_name", "logging_dir", "overwrite_output_dir")
"""Keys in which repetitions of one experiment differ."""
_OURS = ("target_seed", "store")
_OF_METHOD = (
    "component_name", "components_cfg_file", "train_type", "warmup_step", "update_step", "update_times", "train_step",
    "params", "refresh", "features", "plugins", "weighter", "mixture", "keep_texts", "arms",
)  # fmt: skip
"""Keys that say which method, and how it is timed."""
_BASELINE = "random"
_LONGEST = 60


@dataclass(frozen=True)
class Held:
    """What runs of one kind came to on a test set.

    Attributes:
        group: what they are called.
        test: the test set.
        loss: nats per supervised token, over seeds.
        gain: loss less that of random rows in a run that is alike but for the method, under the same seed; None without
            such.
        reward: mean reward of responses, or None.
        seconds: of a run, mean.
        runs: how many.
    """

    group: str
    test: str
    loss: Estimate | None
    gain: Estimate | None
    reward: Estimate | None
    seconds: float | None
    runs: int


def differences(found: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """Return the keys in which run files differ, and the value of each run.

    What only some of the methods have is left out: that follows from the method.
    """
    flat = [dict(_flat(each.arrays.run.about.get("settings") or {})) for each in found]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    out = []
    for key in keys:
        values = [_cut(each.get(key)) for each in flat]
        is_of_some = key.startswith("dataflex.params.") and any(key not in each for each in flat)
        if len(set(values)) > 1 and key != "output_dir" and not is_of_some:
            out.append((key, values))
    return out


def overlap(found: Sequence[Facts]) -> tuple[list[str], np.ndarray]:
    """Return labels of the runs that chose rows, and (R, R) of the distinct rows of two the share that both chose."""
    keyed = zip(found, heads([each.arrays.run for each in found]), strict=True)
    chosen = [(each.label, keys) for each, keys in keyed if len(keys)]
    values = np.ones((len(chosen), len(chosen)))
    for i, (_, one) in enumerate(chosen):
        for j, (_, other) in enumerate(chosen[:i]):
            both = len(np.intersect1d(one, other, assume_unique=True))
            values[i, j] = values[j, i] = both / (len(one) + len(other) - both)
    return [label for label, _ in chosen], values


def held_out(found: Sequence[Facts]) -> list[Held]:
    """Return what runs came to on their test sets, those together that differ in nothing but seeds."""
    groups: dict[str, list[Facts]] = {}
    for each in found:
        groups.setdefault(_kind(each), []).append(each)
    names = _names(list(groups.values()))
    random: dict[tuple[str, Any, str], list[float]] = {}
    for each in found:
        if _is_random(each):
            for test, measured in _measured(each).items():
                if measured["loss"] is not None:
                    random.setdefault((_setting(each), _seed(each), test), []).append(measured["loss"])
    return [
        _held(name, test, group, random)
        for name, group in zip(names, groups.values(), strict=True)
        for test in dict.fromkeys(test for each in group for test in _measured(each))
    ]


def _held(name: str, test: str, group: Sequence[Facts], random: Mapping[tuple[str, Any, str], Sequence[float]]) -> Held:
    some = [(each, _measured(each)[test]) for each in group if test in _measured(each)]
    losses = [(each, math.nan if m["loss"] is None else m["loss"]) for each, m in some]
    beside = [(each, loss, random.get((_setting(each), _seed(each), test))) for each, loss in losses]
    gains = [(each, loss - float(np.mean(r))) for each, loss, r in beside if r and not _is_random(each)]
    rewards = [(each, m["reward"]) for each, m in some if m.get("reward") is not None]
    seconds = [s for each, _ in some if (s := each.arrays.run.summary.get("seconds")) is not None]
    mean = float(np.mean(seconds)) if seconds else None
    return Held(name, test, _estimate(losses), _estimate(gains), _estimate(rewards), mean, len(some))


def _estimate(values: Sequence[tuple[Facts, float]]) -> Estimate | None:
    """Estimate a mean over seeds: runs of one seed are not independent, so of those the mean counts."""
    by_seed: dict[Any, list[float]] = {}
    for each, value in values:
        by_seed.setdefault(_seed(each), []).append(value)
    return Estimate.of([float(np.mean(some)) for some in by_seed.values()])


def _measured(each: Facts) -> Mapping[str, Any]:
    return each.arrays.run.summary.get("test") or {}


def _seed(each: Facts) -> Any:
    return (each.arrays.run.about.get("settings") or {}).get("seed", 42)


def _kind(each: Facts) -> str:
    settings = dict(each.arrays.run.about.get("settings") or {})
    if not settings:
        return each.label
    ours = {k: v for k, v in (settings.pop("dataflex", None) or {}).items() if k not in _OURS}
    return digest(as_plain({**{k: v for k, v in settings.items() if k not in _SEEDS}, "dataflex": ours}))


def _is_random(each: Facts) -> bool:
    return each.arrays.run.about.get("method") == _BASELINE


def _setting(each: Facts) -> str:
    """Return what a run must share with one of random rows for the difference to be the method's: all but that."""
    settings = dict(each.arrays.run.about.get("settings") or {})
    ours = {k: v for k, v in (settings.pop("dataflex", None) or {}).items() if k not in (*_OURS, *_OF_METHOD)}
    shared = {k: v for k, v in settings.items() if k not in (*_SEEDS, *_OF_METHOD)}
    return digest(as_plain({**shared, "dataflex": ours, "steps": each.arrays.run.summary.get("steps")}))


def _names(groups: Sequence[Sequence[Facts]]) -> list[str]:
    """Return what groups are called: the method, where that tells them apart, else the label of the first run."""
    methods = [str(g[0].arrays.run.about.get("method") or g[0].label) for g in groups]
    return [m if methods.count(m) == 1 else g[0].label for m, g in zip(methods, groups, strict=True)]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, value


def _cut(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
