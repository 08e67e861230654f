"""A table of finished runs that is kept: JSON Lines that grow as runs finish, and are read on any machine."""

from __future__ import annotations

import datetime
import fcntl
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from dataflex.config.outputs import refuse_unwritable
from dataflex.errors import CorruptionError
from dataflex.fingerprint import digest, plain
from dataflex.pipelines.comparing.trials import Trial

_PART = 8
"""Digits that a part of an identity is named by: enough to tell what differs."""


class KeptLine(BaseModel):
    """A finished run on one test set. Losses are nats per supervised token; null is not finite, as JSON has no NaN."""

    model_config = ConfigDict(frozen=True, strict=True)

    arm: str
    target: str | None
    seed: int | None
    target_seed: int | None
    test: str
    loss: float | None
    reward: float | None
    rows: int = Field(description="of the test set")
    tokens: int = Field(description="supervised ones of the test set")
    scored: int | None = Field(description="rows that the reward could score")
    steps: int
    seconds: float = Field(description="of the training itself, without starting and measuring")
    feature_seconds: float
    computed: int
    reused: int
    gradients: int
    gradients_per_chosen_row: float
    chosen: int | None = Field(description="rows that were chosen once")
    choice_seconds: float | None
    choice_feature_seconds: float | None
    choice_computed: int | None
    choice_reused: int | None
    choice_gradients: int | None
    wall_seconds: float | None = Field(description="of its processes from start to end, if one launch saw them all")
    device: str | None
    threads: int | None = Field(description="of each process")
    processes: int
    versions: dict[str, str]
    time: str
    identity: Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
    parts: dict[str, str] = Field(description="what the identity is made of, each named by a digest")

    @property
    def run(self) -> tuple[str, str | None, int | None, int | None]:
        """What it is of, whatever its settings."""
        return self.arm, self.target, self.seed, self.target_seed

    def record(self) -> dict[str, Any]:
        """Return it as `dataflex.pipelines.comparing.records` has it; it lies in no folder here."""
        return {**self.model_dump(), "folder": None, "loss": math.nan if self.loss is None else self.loss}


class Kept:
    """The table in one file.

    Args:
        path: the file; one that is not there has no lines.

    Raises:
        ConfigError: it cannot be written.
        CorruptionError: a line of it is damaged.
    """

    def __init__(self, path: Path):
        refuse_unwritable("--table", path)
        self.path = path
        self._lines = _read(path)

    def find(self, trial: Trial, identity: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Return the records of a run, one for each test set, by the first line of each; None if one is missing.

        What an arm is called is no part of an identity, so the records are called as the run is here.
        """
        named, tests = digest(plain(dict(identity))), trial.settings.dataflex.test_dataset
        found: dict[str, KeptLine] = {}
        for line in self._lines:
            if line.identity == named:
                found.setdefault(line.test, line)
        if not all(test in found for test in tests):
            return None
        called = dict(zip(("arm", "target", "seed", "target_seed"), _run(trial), strict=True))
        return [{**found[test].record(), **called} for test in tests]

    def add(self, identity: Mapping[str, Any], found: Iterable[Mapping[str, Any]], wall: float | None) -> None:
        """Append the records of a finished run, all at once: no other process's lines come in between.

        Raises:
            OSError: the file cannot be written; it is as it was.
        """
        whole = plain(dict(identity))
        more: dict[str, Any] = {
            "wall_seconds": None if wall is None else round(wall, 1),
            "processes": whole["processes"],
            "versions": {name: str(version) for name, version in whole["versions"].items()},
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "identity": digest(whole),
            "parts": _parts(whole),
        }
        lines = []
        for record in found:
            loss = None if math.isnan(record["loss"]) else record["loss"]
            values = {**record, **more, "loss": loss}
            lines.append(KeptLine.model_validate({name: values[name] for name in KeptLine.model_fields}))
        _append(self.path, "".join(line.model_dump_json() + "\n" for line in lines))
        self._lines += lines

    def others(self, wanted: Iterable[tuple[Trial, Mapping[str, Any]]]) -> str | None:
        """Say how many lines are of the wanted runs under other settings, and in what they differ; None if none are."""
        names = {_run(trial): plain(dict(identity)) for trial, identity in wanted}
        strange = [line for line in self._lines if line.run in names and line.identity != digest(names[line.run])]
        if not strange:
            return None
        differ: set[str] = set()
        for line in strange:
            ours = _parts(names[line.run])
            differ |= {each for each in ours.keys() | line.parts.keys() if ours.get(each) != line.parts.get(each)}
        return f"{len(strange)} lines of {self.path} are of other settings, and not used: {', '.join(sorted(differ))}"


def _run(trial: Trial) -> tuple[str, str | None, int | None, int | None]:
    return trial.arm.name, trial.target, trial.seed, trial.target_seed


def _parts(identity: Mapping[str, Any]) -> dict[str, str]:
    return {name: digest(part)[:_PART] for name, part in identity.items() if part is not None}


def _read(path: Path) -> list[KeptLine]:
    """Read every line.

    Raises:
        CorruptionError: one is damaged.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        text = file.read()
    found = []
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(KeptLine.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CorruptionError(
                f"{path}: line {number}: found {f'{where}: ' if where else ''}{first['msg']}; expected a line that "
                "`dataflex compare --table` has written\n  Put it right from a copy, or remove the line: its run is "
                "made again"
            ) from error
    return found


def _append(path: Path, text: str) -> None:
    """Append lines, whole or not at all, whoever else does so at the same time."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            text = text if file.read(1) == b"\n" else "\n" + text  # an editor may have left the last line open
        raw = text.encode()
        try:
            if os.write(file.fileno(), raw) != len(raw):
                raise OSError(f"{path}: only a part of a line could be written")
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
