"""What the finished runs of a comparison came to, as plain data: one record for each run and test set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from dataflex.pipelines.comparing.reading import json_object
from dataflex.pipelines.comparing.trials import Trial
from dataflex.results.names import ABOUT, name_of

_COSTS = ("seconds", "feature_seconds", "computed", "reused", "gradients")
SCHEMA = pa.schema(
    {
        **dict.fromkeys(("arm", "target", "test", "folder"), pa.string()),
        **dict.fromkeys(("seed", "target_seed", "steps", "rows", "tokens", "scored"), pa.int64()),
        **dict.fromkeys(("computed", "reused", "gradients"), pa.int64()),
        **dict.fromkeys(("loss", "reward", "seconds", "feature_seconds", "gradients_per_chosen_row"), pa.float64()),
        **dict.fromkeys(("chosen", "choice_computed", "choice_reused", "choice_gradients"), pa.int64()),
        **dict.fromkeys(("choice_seconds", "choice_feature_seconds"), pa.float64()),
    }
)
"""Columns of `compare.parquet`. `choice_*` are what choosing once has cost, the others what the training has."""


def records(trials: Sequence[Trial], kept: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> list[Any]:
    """Return the records of every finished run.

    Args:
        trials: the runs.
        kept: by the name of a run, records of it that a table has; they stand for the run.
    """
    known = kept or {}
    return [record for trial in trials for record in known.get(trial.name) or records_of(trial)]


def records_of(trial: Trial) -> list[dict[str, Any]]:
    """Return what one run came to, once for each test set; nothing of one that is not finished.

    Beside the table's columns, `device` says what it was computed on, and `threads` of each process.
    """
    summary = trial.summary
    if summary is None:
        return []
    about = {
        "arm": trial.arm.name,
        "target": trial.target,
        "seed": trial.seed,
        "target_seed": trial.target_seed,
        "folder": str(trial.folder),
        "steps": summary.get("steps", 0),
        **{name: summary[name] for name in _COSTS},
        "gradients_per_chosen_row": summary["gradients_per_chosen_row"],
        **_of_choice(trial.choice),
        **_machine(trial),
    }
    out = []
    for test, measured in summary["test"].items():
        loss = math.nan if measured["loss"] is None else measured["loss"]
        out.append({**about, "test": test, "reward": None, "scored": None, **measured, "loss": loss})
    return out


def several_devices(found: Sequence[Mapping[str, Any]]) -> str | None:
    """Say which runs were made on which device, where these are several; None where there is one."""
    arms: dict[str, dict[str, None]] = {}
    for record in found:
        if (device := record.get("device")) is not None:
            arms.setdefault(device, {})[record["arm"]] = None
    if len(arms) < 2:
        return None
    told = "; ".join(f"{device} ({', '.join(names)})" for device, names in arms.items())
    return f"the runs were made on several devices, whose arithmetic enters the differences seed by seed: {told}"


def _machine(trial: Trial) -> dict[str, Any]:
    """Return what a run has written down of its machine."""
    file = trial.folder / name_of(ABOUT, trial.verb)
    machine = json_object(file).get("machine", {}) if file.is_file() else {}
    return {name: machine.get(name) for name in ("device", "threads")}


def _of_choice(choice: Trial | None) -> dict[str, Any]:
    """Return what a choice has cost; gradients are then told by the row that was chosen by them."""
    if choice is None:
        return dict.fromkeys(["chosen", *(f"choice_{name}" for name in _COSTS)])
    found = choice.summary
    assert choice.num is not None
    assert found is not None  # else the run on it is not finished
    costs = {f"choice_{name}": found[name] for name in _COSTS}
    return {"chosen": choice.num, **costs, "gradients_per_chosen_row": round(found["gradients"] / choice.num, 3)}
