"""What came out of a comparison: means and intervals over seeds, and the difference from random rows, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dataflex.pipelines.comparing.estimate import Estimate
from dataflex.pipelines.comparing.trials import Trial

BASELINE = "random"


@dataclass(frozen=True)
class Line:
    """One line of the table: an arm, shown a target, measured on a test set.

    Attributes:
        arm: the arm.
        target: the target set that it was shown; None where it was shown none.
        test: the test set.
        loss: nats per supervised token, over training seeds; of each the mean over draws of targets.
        by_draw: the same over draws of targets, of each the mean over training seeds; None without several draws.
        gain: `loss` less that of random rows under the same seed; None of random rows, and without them.
        reward: mean reward of the responses, over training seeds; None where none is named.
        reward_gain: as `gain`, of rewards: above 0 is better.
        seconds: of a run, mean.
        choice_seconds: of what chose its rows once, mean; None where each run chooses its own.
        gradients: that the run itself computed per chosen row, mean; None where nothing is trained. What was shared
            or found in the stores is none of its own.
        steps: optimizer steps of a run.
        missing: runs that did not come to their end.
    """

    arm: str
    target: str | None
    test: str
    loss: Estimate | None
    by_draw: Estimate | None
    gain: Estimate | None
    reward: Estimate | None
    reward_gain: Estimate | None
    seconds: float | None
    choice_seconds: float | None
    gradients: float | None
    steps: int | None
    missing: int


def lines(trials: Sequence[Trial], found: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Summarise records, arm by arm in the order of the trials."""
    out = []
    keys = list(dict.fromkeys((t.arm.name, t.target) for t in trials))
    tests = list(dict.fromkeys(record["test"] for record in found))
    for arm, target in keys:
        planned = [t for t in trials if (t.arm.name, t.target) == (arm, target)]
        for test in tests:
            own = [r for r in found if (r["arm"], r["target"], r["test"]) == (arm, target, test)]
            random = [r for r in found if (r["arm"], r["test"]) == (BASELINE, test)] if arm != BASELINE else []
            draws = _means(own, "target_seed", "loss")
            out.append(
                Line(
                    arm,
                    target,
                    test,
                    Estimate.of(list(_means(own, "seed", "loss").values())),
                    Estimate.of(list(draws.values())) if len(draws) > 1 else None,
                    _gain(own, random, "loss"),
                    Estimate.of(list(_means(own, "seed", "reward").values())),
                    _gain(own, random, "reward"),
                    _mean([r["seconds"] for r in own]),
                    _mean([r["choice_seconds"] for r in own if r.get("choice_seconds") is not None]),
                    _mean([r["gradients_per_chosen_row"] for r in own if r["steps"]]),
                    max((r["steps"] for r in own), default=None),
                    len(planned) - len(own),
                )
            )
    return out


def shown(table: Sequence[Line]) -> list[str]:
    """Return the table as Markdown, which reads well in a terminal too."""
    has = {
        "target": any(line.target for line in table),
        "by_draw": any(line.by_draw for line in table),
        "reward": any(line.reward for line in table),
        "choice": any(line.choice_seconds is not None for line in table),
        "missing": any(line.missing for line in table),
    }
    head = ["method", *(["target"] if has["target"] else []), "test set", "runs", "loss"]
    head += ["loss, over draws"] if has["by_draw"] else []
    head += ["less random"]
    head += ["reward", "less random"] if has["reward"] else []
    head += ["steps", "seconds", *(["to choose"] if has["choice"] else []), "own gradients a row"] + (
        ["not finished"] if has["missing"] else []
    )
    rows = []
    for line in table:
        row = [line.arm, *([line.target or "-"] if has["target"] else []), line.test]
        row += [str(line.loss.count if line.loss else 0), _text(line.loss)]
        row += [_text(line.by_draw)] if has["by_draw"] else []
        row += [_text(line.gain, sign=True)]
        row += [_text(line.reward), _text(line.reward_gain, sign=True)] if has["reward"] else []
        row += [str(line.steps) if line.steps else "-", _seconds(line.seconds)]
        row += [_seconds(line.choice_seconds)] if has["choice"] else []
        row += ["-" if line.gradients is None else f"{line.gradients:.1f}"]
        rows.append(row + ([str(line.missing)] if has["missing"] else []))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    layout = [head, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |" for cells in layout]


def plain(line: Line) -> dict[str, Any]:
    """Return a line as plain data; JSON has no NaN, so that is null."""
    return {k: _without_nan(v) for k, v in asdict(line).items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(estimate: Estimate | None, sign: bool = False) -> str:
    if estimate is None:
        return "-"
    text = str(estimate)
    return f"+{text}" if sign and estimate.mean > 0 else text


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _means(found: Sequence[Mapping[str, Any]], by: str, what: str) -> dict[Any, float]:
    """Return the mean of a figure for each value of a column, over the records that have both."""
    groups: dict[Any, list[float]] = {}
    for record in found:
        if record[what] is not None:
            groups.setdefault(record[by], []).append(record[what])
    return {key: float(np.mean(values)) for key, values in groups.items()}


def _gain(own: Sequence[Mapping[str, Any]], random: Sequence[Mapping[str, Any]], what: str) -> Estimate | None:
    """Estimate the difference from random rows under the same seed; what has no seed is compared with each of them."""
    ours, theirs = _means(own, "seed", what), _means(random, "seed", what)
    if set(ours) == {None}:
        return Estimate.of([ours[None] - other for other in theirs.values()])
    return Estimate.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
