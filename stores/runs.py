"""Which run uses which stores and kept states: small documents under `runs/` of a root, which are only ever added.

runs/<id>/begun.<launch>.json     what the run is; one for each time it was started
runs/<id>/store.<folder>.json     it reads or writes that store; there before the store is opened
runs/<id>/state.<lineage>.json    it keeps that state or starts from it; there before the state is looked for
runs/<id>/finished.<launch>.json  that launch came to its end, and how fast it worked
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dataflex.errors import CorruptionError, DataflexError
from dataflex.fingerprint import digest
from dataflex.stores.files import Files, Stored
from dataflex.stores.problem import Problem
from dataflex.stores.record import claim, read_records, seal

Kind = Literal["store", "state"]
State = Literal["running", "finished", "not finished"]
Used = tuple[Kind, str]
"""A store's folder name or a state's lineage."""

FOLDER = "runs"
RUN_ID = re.compile(r"[0-9a-f]{32}")
_NOTE = re.compile(r"(begun|store|state|finished)\.([A-Za-z0-9_-]+)(?:~\d+)?\.json")
_log = logging.getLogger(__name__)


class RunRecord:
    """Writes down what one launch of a run uses; for one of its processes. A run that uses nothing has no record.

    Where a root cannot be written to, the run goes on unrecorded, and a warning says so.

    Args:
        files: the root's files.
        output_dir: the run's output folder.
        verb: the command.
        identity: what the run's decisions depend on.
        method: the selector's name.

    Attributes:
        speeds: how fast the launch worked, as `dataflex.access.speed` has it.
    """

    speeds: Sequence[Mapping[str, Any]] = ()

    def __init__(self, files: Files, output_dir: str | os.PathLike[str], verb: str, identity: str, method: str = ""):
        self.files = files
        self.about = {"output_dir": os.path.abspath(output_dir), "stage": verb, "identity": identity}
        self.id = digest(self.about)
        self._begun = (f"begun.{uuid.uuid4().hex}", {**self.about, "method": method})
        self._written: set[str] = set()
        self._is_refused = False

    def begin(self) -> None:
        """Record that this launch has begun, for commands that must stop if the root cannot be written to.

        Raises:
            DataflexError: the root cannot be written to.
        """
        claim(self.files, f"{FOLDER}/{self.id}", *self._begun)
        self._written.add(self._begun[0])

    def uses(self, kind: Kind, name: str) -> None:
        """Record a store or a kept state, durably, before it is opened; once for each."""
        self._write(*self._begun)
        self._write(f"{kind}.{name}", {kind: name})

    def finish(self) -> None:
        """Record that this launch came to its end, and its speeds."""
        if self._written:
            about = {"speeds": list(self.speeds)} if self.speeds else {}
            self._write(self._begun[0].replace("begun", "finished"), about)

    def _write(self, stem: str, body: dict[str, Any]) -> None:
        if stem in self._written or self._is_refused:
            return
        try:
            claim(self.files, f"{FOLDER}/{self.id}", stem, body)
            self._written.add(stem)
        except (OSError, DataflexError) as error:
            self._is_refused = True
            _log.warning(
                "this run is not recorded, so `dataflex store gc` elsewhere cannot spare what it uses: %s", error
            )


class Unrecorded(RunRecord):
    """The record of a command that only looks: it has none."""

    def begin(self) -> None:
        """Write nothing."""

    def _write(self, stem: str, body: dict[str, Any]) -> None:
        """Write nothing."""


@dataclass(frozen=True)
class KnownRun:
    """A run as its documents tell of it.

    Attributes:
        id: names its folder.
        output_dir: of its latest launch; empty where that document is missing or damaged.
        verb: the command; likewise.
        method: the selector; likewise.
        uses: stores and states, sorted.
        is_over: whether its latest launch came to its end.
        was_finished: whether any launch did.
        started: when it was first started, seconds since 1970; 0 where no description is left.
        modified: when its newest document was written, likewise.
        files: its documents.
    """

    id: str
    output_dir: str
    verb: str
    method: str
    uses: tuple[Used, ...]
    is_over: bool
    was_finished: bool
    started: float
    modified: float
    files: tuple[Stored, ...]

    def state(self, young_since: float) -> State:
        """Return how the run stands; one that has not ended, and wrote nothing since `young_since`, is not running.

        A finished run that was started again and broken off is still a finished one.
        """
        if not self.is_over and self.modified >= young_since:
            return "running"
        return "finished" if self.was_finished else "not finished"

    def is_called(self, name: str) -> bool:
        """Say whether a run is meant by its output folder, its id, or how the id begins (8 digits at least)."""
        return (len(name) >= 8 and self.id.startswith(name)) or self.output_dir == os.path.abspath(name)


def read_runs(files: Files) -> list[KnownRun]:
    """Return the runs that are recorded under a root, the one that wrote last first.

    A damaged document counts by its name, so that it protects the store or state named there. Where something else
    lies in the place of a run's folder, it is logged and that run is left out; whoever has to know every run asks
    `dataflex.stores.upkeep.astray` first.

    Raises:
        MismatchError: a newer DataFlex wrote a run's description.
    """
    found: dict[str, list[Stored]] = {}
    if what := files.misplaced(FOLDER, "folder"):
        _log.warning("%s", what)
        return []
    for file in files.stored(FOLDER):
        _, run, *name = file.path.split("/")
        if RUN_ID.fullmatch(run) and not name and (what := files.misplaced(file.path, "folder")):
            _log.warning("%s; left out", what)
        if RUN_ID.fullmatch(run) and len(name) == 1:
            found.setdefault(run, []).append(file)
    latest = {run: path for run, several in found.items() if (path := _description(several))}
    about = dict(zip(latest, read_records(files, list(latest.values())), strict=True))
    known = (_known(run, several, about.get(run)) for run, several in found.items())
    return sorted(known, key=lambda run: -run.modified)


def read_speeds(files: Files) -> list[dict[str, Any]]:
    """Return how fast runs worked that came to their end under a root, the latest first; damaged notes are left out."""
    if files.misplaced(FOLDER, "folder"):
        return []
    notes = [file for file in files.stored(FOLDER) if (match := _note(file)) and match[1] == "finished"]
    notes.sort(key=lambda file: -file.modified)
    found = read_records(files, [file.path for file in notes])
    return [speed for note in found if isinstance(note, dict) for speed in note.get("speeds", ())]


def note_problems(files: Files, folder: str, documents: Iterable[Stored]) -> Iterator[Problem]:
    """Check the documents of one run; a damaged one is written again from its name and the run's other documents.

    It is never just removed: by its name it protects what it was written for.

    Raises:
        MismatchError: a newer DataFlex wrote one.
    """
    about: dict[str, Any] = {}  # of the run: the same in each description of it, but for the method
    damaged: list[tuple[str, str, re.Match[str]]] = []
    matches = {file.path: _NOTE.fullmatch(file.path.removeprefix(f"{folder}/")) for file in documents}
    for path in (path for path, match in matches.items() if match is None):
        yield Problem(path, f"{files.name(path)} is no record of a run; it is never opened", harmless=True)
    notes = {path: match for path, match in matches.items() if match is not None}
    for (path, match), found in zip(notes.items(), read_records(files, list(notes)), strict=True):
        if isinstance(found, CorruptionError):
            damaged.append((path, str(found), match))
        elif isinstance(found, DataflexError):
            raise found
        elif found is not None and match[1] == "begun":  # None: removed between the listing and now
            about = found
    for path, what, match in damaged:
        kind, name = match[1], match[2]
        body = {kind: name} if kind in ("store", "state") else about if kind == "begun" else {}
        yield Problem(path, what, put=(path, seal(body)))


def _description(documents: Sequence[Stored]) -> str:
    """Return the path of the latest launch's description, or nothing."""
    begun = [(file.modified, file.path) for file in documents if (match := _note(file)) and match[1] == "begun"]
    return max(begun, default=(0.0, ""))[1]


def _started(documents: Sequence[Stored]) -> float:
    return min((f.modified for f in documents if (match := _note(f)) and match[1] == "begun"), default=0.0)


def _note(file: Stored) -> re.Match[str] | None:
    return _NOTE.fullmatch(file.path.split("/")[-1])


def _known(run: str, documents: Sequence[Stored], described: dict[str, Any] | DataflexError | None) -> KnownRun:
    # What a run uses is told by the documents' names alone: one listing suffices, and damage inside takes nothing away.
    notes = [(match[1], match[2]) for file in documents if (match := _note(file))]
    latest = _description(documents)
    if isinstance(described, DataflexError) and not isinstance(described, CorruptionError):
        raise described
    if latest and not isinstance(described, dict):
        _log.warning("%s; the run %s is known by its id only", described or f"{latest} is gone", run)
    about = described if isinstance(described, dict) else {}
    ended = {name for kind, name in notes if kind == "finished"}
    begun = _NOTE.fullmatch(latest.split("/")[-1])
    return KnownRun(
        id=run,
        output_dir=str(about.get("output_dir", "")),
        verb=str(about.get("stage", "")),
        method=str(about.get("method", "")),
        uses=tuple(sorted({(kind, name) for kind, name in notes if kind in ("store", "state")})),  # type: ignore[misc]
        is_over=begun is not None and begun[2] in ended,
        was_finished=bool(ended),
        started=_started(documents),
        modified=max((file.modified for file in documents), default=0.0),
        files=tuple(documents),
    )
