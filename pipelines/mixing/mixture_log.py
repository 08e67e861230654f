"""What a mixture leaves behind: a log of its shares, its state in checkpoints, the proportions that came out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import distributed
from dataflex.checkpoints.marks import FOLDER
from dataflex.errors import MismatchError
from dataflex.results import opening

_STATE = f"{FOLDER}/mixture.json"
_MARK = "as it was"
"""The only key around an object that `in_order` shall not take for a list."""


class MixRecord:
    """Files of one run, written on rank 0, and its state, written wherever a checkpoint is.

    `mixture.jsonl` has a line for every update and is only ever appended to; after a line `resumed`, the lines from
    that step on count. `mixture_proportions.json` has what came out, by name, for `static` to read.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path):
        self._log, self._outcome = folder / "mixture.jsonl", folder / "mixture_proportions.json"

    def begin(self) -> None:
        """Take what an earlier run left out of the way."""
        if distributed.is_main():
            for path in (self._log, self._outcome):
                opening.set_aside(path)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line to the log."""
        if distributed.is_main():
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def save(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Write a state into a checkpoint; JSON keeps every float64 exactly."""
        path = checkpoint / _STATE
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(state, indent=1) + "\n", "utf-8")

    def restore(self, checkpoint: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a checkpoint, and say in the log that the run goes on from there.

        Args:
            checkpoint: its folder.
            expected: what must be as in this run.

        Raises:
            MismatchError: the checkpoint has no state, or one of another mixture.
        """
        path = checkpoint / _STATE
        if not path.is_file():
            raise MismatchError(f"{path}: missing; expected a checkpoint of a run with train_type: dynamic_mix")
        state: dict[str, Any] = json.loads(path.read_text("utf-8"))
        for name, value in expected.items():
            if (kept := state.get(name, {})) != value:
                raise MismatchError(
                    f"{path}: found {name} {kept}, this run has {value}; resume with the methods, the data and "
                    "the global batch the run was begun with, or start anew with another output_dir"
                )
        self.add({"resumed": state["step"]})
        return state

    def outcome(self, names: Sequence[str], found: np.ndarray, unit: str, steps: int, method: str) -> None:
        """Write the proportions that came out."""
        if distributed.is_main():
            said = {"proportions": named(names, found), "unit": unit, "steps": steps, "method": method}
            self._outcome.write_text(json.dumps(said, indent=1) + "\n", "utf-8")


def by_name(names: Sequence[str], state: Any) -> Any:
    """Return a state with every list of one number for each domain, (K,), as numbers by name; `in_order` undoes it."""
    if isinstance(state, dict):
        found = {key: by_name(names, value) for key, value in state.items()}
        # A mixer may itself keep numbers by name: what would be taken for a list is marked, and what has the mark too.
        return {_MARK: found} if list(found) in (list(names), [_MARK]) else found
    if not isinstance(state, list):
        return state
    is_of_domains = len(state) == len(names) and all(isinstance(x, int | float | None) for x in state)
    return dict(zip(names, state, strict=True)) if is_of_domains else [by_name(names, value) for value in state]


def in_order(names: Sequence[str], state: Any) -> Any:
    """Undo `by_name`: objects whose keys are exactly the domains become lists again, but for those that are marked."""
    if isinstance(state, dict):
        if list(state) == [_MARK] and isinstance(state[_MARK], dict):
            state = state[_MARK]
        elif list(state) == list(names):
            return list(state.values())
        return {key: in_order(names, value) for key, value in state.items()}
    return [in_order(names, value) for value in state] if isinstance(state, list) else state


def named(names: Sequence[str], values: Any) -> dict[str, Any]:
    """Return values by domain."""
    return dict(zip(names, np.asarray(values).tolist(), strict=True))


def metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """Return a line of the log as numbers by name, for a training log: one for each domain, or one alone."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if key not in ("step", "steps", "kind", "unit", "rows_before"):
            parts = {f"{key}/{n}": each for n, each in value.items()} if isinstance(value, Mapping) else {key: value}
            found |= {f"dataflex/{name}": each for name, each in parts.items() if type(each) in (int, float)}
    return found
