"""What a reader should look at: signs in a run's own figures that its choice, or the run, may not be sound."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np

from dataflex.pipelines.reporting.arrays import Arrays
from dataflex.pipelines.reporting.statuses import Statuses

_CORRELATED = 0.5
_ONE_SIGN = 0.95
_COMMON = 0.5
_SAME = 0.95
_OF_ONE_SOURCE = 0.95
_TRUNCATED = 0.1
_LOST = 0.1


def looks(arrays: Arrays, statuses: Statuses) -> list[str]:
    """Return a sentence for each sign, the gravest first; docs/diagnostics.md says what to do about each."""
    return [
        *_ended(arrays),
        *_of_data(statuses),
        *_of_updates(arrays),
        *_of_losses(arrays),
        *arrays.run.warnings,
        *_torn(arrays),
    ]


def _ended(arrays: Arrays) -> list[str]:
    status = arrays.run.status
    state = status.get("state")
    if state in (None, "finished"):
        return []
    more = f": {status['message']}" if status.get("message") else ""
    if state == "running" and _is_gone(status):
        return [
            "The training was killed before its end; everything below is of what there is. The same command goes on."
        ]
    return [f"The training has not finished ({state}{more}); everything below is of what there is so far."]


def _is_gone(status: Mapping[str, Any]) -> bool:
    """Say whether the process that wrote a status ran on this machine and does no more."""
    pid = status.get("pid")
    if status.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _of_data(statuses: Statuses) -> list[str]:
    found = []
    total = sum(statuses.counts.values())
    if dropped := statuses.counts.get("dropped", 0):
        found.append(f"LLaMA-Factory dropped {dropped:,} of {total:,} records (no prompt or no response in the form).")
    if empty := statuses.counts.get("no_labels", 0):
        found.append(f"{empty:,} of {total:,} rows have no supervised token; they are never chosen.")
    if lost := statuses.counts.get("nonfinite", 0):
        found.append(f"The features of {lost:,} of {total:,} rows were NaN or infinite at the last update.")
    if statuses.truncated is not None and statuses.truncated > _TRUNCATED:
        found.append(f"cutoff_len shortened {statuses.truncated:.0%} of the rows: what was cut was not learned from.")
    return found


def _of_updates(arrays: Arrays) -> list[str]:
    if not arrays.updates:
        return []
    last = arrays.updates[-1]
    known: Mapping[str, Any] = last.info.get("diagnostics", {})
    found = []
    for name, what in (("length_correlation", "the row's length"), ("norm_correlation", "the gradient's norm")):
        value = known.get(name)
        if value is not None and abs(value) >= _CORRELATED:
            found.append(
                f"At {last.name}, scores go with {what} (rank correlation {value:.2f}): the method may choose that and "
                "not content. Compare with random rows of the same lengths."
            )
    scored, below = known.get("scored"), known.get("below_zero")
    common = max(known.get("common_direction", {"": 0.0}).values())
    if scored and below is not None and max(below, scored - below) / scored >= _ONE_SIGN and common >= _COMMON:
        found.append(
            f"At {last.name}, {max(below, scored - below):,} of {scored:,} scores have one sign, and vectors share a "
            f"direction (mean cosine {common:.2f}): scores rank rows by what is left beside it."
        )
    told = [update.info.get("diagnostics", {}).get("lost") for update in arrays.updates]
    lost = [share for share in told if share is not None]
    if lost and np.mean(lost) >= _LOST:
        found.append(
            f"The prefilter keeps about {np.mean(lost):.0%} of the choice from the method (mean of {len(lost)} "
            "updates): raise its keep, or take another."
        )
    alike = known.get("overlap")
    if alike is not None and alike >= _SAME:
        found.append(f"{last.name.capitalize()} chose {alike:.0%} of the rows of the update before: fewer would do.")
    chosen: Mapping[str, int] = known.get("sources", {})
    pool = {name for name, count in zip(*_pool(arrays), strict=True) if count}
    if chosen and len(pool) > 1 and max(chosen.values()) / sum(chosen.values()) >= _OF_ONE_SOURCE:
        most = max(chosen, key=lambda name: chosen[name])
        share = chosen[most] / sum(chosen.values())
        found.append(f"At {last.name}, {share:.0%} of the rows are of one source, {most}; the pool has {len(pool)}.")
    return found


def _of_losses(arrays: Arrays) -> list[str]:
    found = []
    table = arrays.run.losses()
    names = {line["step"]: line.get("loss") for line in arrays.run.log if "loss" in line}
    lost = [step for step, loss in names.items() if not isinstance(loss, int | float) or not math.isfinite(loss)]
    if lost:
        found.append(f"The training loss was not a number at {len(lost)} steps, first at step {lost[0]}.")
    held = [x for x in table["eval_loss"].to_pylist() if x is not None]
    if len(held) > 1 and held[-1] > held[0]:
        found.append(f"The evaluation loss rose, from {held[0]:.3f} to {held[-1]:.3f}.")
    for name, measured in (arrays.run.summary.get("test") or {}).items():
        if measured.get("nonfinite"):
            found.append(f"On {name}, the loss of {measured['nonfinite']:,} rows is not a number.")
    return found


def _torn(arrays: Arrays) -> list[str]:
    torn = arrays.run.torn
    return [f"{len(torn)} lines of its logs cannot be read and are left out: {', '.join(torn[:3])}."] if torn else []


def _pool(arrays: Arrays) -> tuple[list[str], np.ndarray]:
    names, codes = arrays.sources
    return names, np.bincount(codes[codes >= 0], minlength=len(names))
