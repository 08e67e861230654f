"""What a run was, what it cost, and which rows it chose, as words and figures for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex.pipelines import showing
from dataflex.pipelines.reporting.arrays import Arrays
from dataflex.pipelines.reporting.looks import looks
from dataflex.pipelines.reporting.statuses import MEANINGS, Statuses

EXAMPLES = 8
"""Best, and worst, rows that a page shows."""
_TO_JUDGE = 32
"""Rows computed from which a speed is read."""
_DIAGNOSED = ("score_mean", "length_correlation", "norm_correlation", "overlap")
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """What a page says of a run.

    Attributes:
        label: the run's name in the page.
        arrays: its numbers.
        identity: what it was, (name, value) each.
        cost: what it cost.
        statuses: what became of records: status, meaning, count.
        looks: what a reader should look at.
        rounds: a line for each round.
        best: rows with the highest scores at the last update, with their texts; without scores, some of its rows.
        worst: rows with the lowest scores.
        is_scored: whether there are scores.
    """

    label: str
    arrays: Arrays
    identity: Pairs
    cost: Pairs
    statuses: list[tuple[str, str, int]]
    looks: list[str]
    rounds: list[dict[str, Any]]
    best: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    is_scored: bool

    def plain(self) -> dict[str, Any]:
        """Return all but the arrays, for programs."""
        names = ("label", "identity", "cost", "statuses", "looks", "rounds", "best", "worst")
        return {"folder": str(self.arrays.run.path), **{name: getattr(self, name) for name in names}}


def facts(label: str, arrays: Arrays) -> Facts:
    """Gather what a page says of a run."""
    statuses = Statuses.of(arrays)
    best, worst, is_scored = _examples(arrays)
    return Facts(
        label,
        arrays,
        _identity(arrays),
        _cost(arrays),
        [(name, meaning, statuses.counts[name]) for name, meaning in MEANINGS.items() if statuses.counts.get(name)],
        looks(arrays, statuses),
        _rounds(arrays),
        best,
        worst,
        is_scored,
    )


def _identity(arrays: Arrays) -> Pairs:
    run = arrays.run
    about = run.about
    settings: Mapping[str, Any] = about.get("settings") or {}
    model, data, machine = (about.get(name) or {} for name in ("model", "data", "machine"))
    found: list[tuple[str, Any]] = [
        ("folder", run.path),
        ("method", about.get("method") or about.get("train_type")),
        ("model", settings.get("model_name_or_path")),
        ("parameters", _of(model.get("parameters"), model.get("trained"), "{:,}, of which {:,} are trained")),
        ("training rows", _sized(settings.get("dataset"), data.get("train"))),
        *(("target set", _sized(name, size)) for name, size in (data.get("targets") or {}).items()),
        *(("test set", _sized(name, size)) for name, size in (data.get("tests") or {}).items()),
        ("rows of a step", about.get("global_batch")),
        ("learning rate", settings.get("learning_rate")),
        ("seed", settings.get("seed", 42) if settings else None),
        ("parameters of the method", _listed((settings.get("dataflex") or {}).get("params") or {})),
        ("refresh", _listed((settings.get("dataflex") or {}).get("refresh") or {})),
        ("state", run.status.get("state")),
        ("launches", ", ".join(each["time"] for each in (about.get("launches") or [])[-5:])),
        ("machine", _listed(machine)),
        ("versions", _listed(about.get("versions") or {})),
        ("store", about.get("store") or run.summary.get("store")),
        ("identity", about.get("digest")),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "", {})]


def _cost(arrays: Arrays) -> Pairs:
    run, about = arrays.run, arrays.run.about
    infos = [each.info for each in run.recorded if "computed" in each.info]
    computed, reused = (sum(info[name] for info in infos) for name in ("computed", "reused"))
    seconds = sum(info["seconds"] for info in infos)
    measured = [info for info in infos if "feature_seconds" in info]
    spent = sum(info["feature_seconds"] for info in measured) if len(measured) == len(infos) else None
    summary = run.summary
    found: list[tuple[str, Any]] = [
        ("all, last launch: seconds", _number(summary.get("seconds"))),
        ("features, last launch: seconds", _number(summary.get("feature_seconds"))),
        ("features computed at updates", f"{computed:,}" if infos else None),
        ("features reused", f"{reused:,}" if infos else None),
        ("seconds at updates", _number(seconds) if infos else None),
        ("saved by reuse", _saved(computed, reused, spent)),
        ("gradients of the last launch for each row trained on", _number(summary.get("gradients_per_chosen_row"))),
        ("bytes of features written, last launch", f"{summary['bytes']:,}" if summary.get("bytes") else None),
        ("tokens gone through for features, last launch", f"{summary['tokens']:,}" if summary.get("tokens") else None),
        ("seconds, as planned", _planned(about.get("planned"))),
    ]
    return [(name, value) for name, value in found if value is not None]


def _saved(computed: int, reused: int, seconds: float | None) -> str | None:
    """Say what reading features from the stores saved, at the speed of those that were computed."""
    if not reused:
        return None
    if not seconds or computed < _TO_JUDGE:
        return f"{reused:,} rows of features; how long they take was not measured in this run"
    return f"about {_number(reused * seconds / computed)} s, at {computed / seconds:,.1f} rows/s"


def _planned(seconds: Any) -> str | None:
    """Return the time that had been planned when the training began."""
    if not isinstance(seconds, Mapping) or not isinstance(seconds.get("estimate"), int | float):
        return None
    return f"{_number(seconds['estimate'])} (by {seconds.get('from', 'an unknown rule')})"


def _rounds(arrays: Arrays) -> list[dict[str, Any]]:
    found = []
    for each in arrays.run.recorded:
        known = each.info.get("diagnostics", {})
        index = each.rows["index"].to_numpy()
        found.append(
            {
                "name": each.name,
                "steps": f"{each.first_step + 1}–{each.first_step + each.steps}",
                "rows": len(index),
                "distinct": len(np.unique(index)),
                "tokens": _number(np.mean(each.rows["tokens"].drop_null().to_numpy())) if len(index) else None,
                **{name: known.get(name) for name in _DIAGNOSED},
                **{name: each.info.get(name) for name in ("computed", "reused", "seconds")},
            }
        )
    return found


def _examples(arrays: Arrays) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bool]:
    """Return the best and the worst rows of the last update, and whether there are scores to tell them by."""
    run = arrays.run
    if not arrays.updates:
        return [], [], False
    last = arrays.updates[-1]
    best = showing.table(run, [last], top=EXAMPLES)
    if best["score"].null_count == len(best):
        return _said(arrays, best), [], False
    has_pool = run.rows is not None and run.pool(last.number) is not None
    worst = showing.table(run, [last], bottom=EXAMPLES, whole_pool=has_pool)
    return _said(arrays, best), _said(arrays, worst), True


def _said(arrays: Arrays, rows: pa.Table) -> list[dict[str, Any]]:
    return showing.plain(showing.with_texts(arrays.run, rows))


def _sized(name: Any, size: Mapping[str, int] | None) -> str | None:
    return f"{name}: {size['rows']:,} rows, {size['tokens']:,} tokens" if size else name


def _of(first: int | None, second: int | None, text: str) -> str | None:
    return None if first is None or second is None else text.format(first, second)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, [], ""))


def _number(value: Any) -> str | None:
    if value is None:
        return None
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def labels(paths: Sequence[Any]) -> list[str]:
    """Return short names that tell folders apart: what follows the path they share."""
    parts = [path.resolve().parts for path in paths]
    if len(parts) == 1:
        return [parts[0][-1]]
    shared = next(i for i in range(min(map(len, parts)) + 1) if len({each[: i + 1] for each in parts}) > 1)
    return ["/".join(each[shared:]) or each[-1] for each in parts]
