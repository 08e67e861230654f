"""Check of everything under a root, byte by byte: stores, kept states, records of runs, and files of no kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dataflex.errors import CorruptionError, MismatchError
from dataflex.stores.files import Files, Stored
from dataflex.stores.log import Log
from dataflex.stores.problem import Problem, mend
from dataflex.stores.record import find_record, seal
from dataflex.stores.root import NAME, REMOVING, recorded_store
from dataflex.stores.runs import FOLDER, RUN_ID, note_problems
from dataflex.stores.states import LINEAGE, StateStore
from dataflex.stores.upkeep.astray import astray
from dataflex.stores.upkeep.unused import by_folder, unused
from dataflex.stores.upkeep.verify import document_problems, log_and_data

WAITING = "waiting.json"
"""A repair puts this into a store whose recipe was lost; a run that asks for that recipe finds the data by its name."""

Kind = Literal["store", "state", "run", "unknown"]


@dataclass(frozen=True)
class Inspected:
    """What a check found of one store, kept state, record of a run, or unknown thing under a root.

    Attributes:
        kind: which of these; `unknown` is nothing of DataFlex's, and left alone.
        name: its path, relative to the root.
        bytes: size of all its files.
        problems: what is wrong with it, harmless leftovers included.
        unread: why it was not looked into; empty if it was.
    """

    kind: Kind
    name: str
    bytes: int
    problems: tuple[Problem, ...] = ()
    unread: str = ""

    @property
    def faults(self) -> list[Problem]:
        """What is wrong with it and not harmless."""
        return [problem for problem in self.problems if not problem.harmless]

    @property
    def unused(self) -> int:
        """How many files of it no reader ever opens."""
        return len(self.problems) - len(self.faults)


def inspect(files: Files) -> Iterator[Inspected]:
    """Read every byte under a root and yield what is there, sorted by name; writes nothing."""
    listing = by_folder(files.stored(""))
    misplaced = astray(files)
    # A listing does not follow links, and a store that was moved to another disk and linked is a store.
    linked = [name for name in files.names("") if NAME.fullmatch(name)]
    states = [] if "states" in misplaced else files.names("states")
    linked += [f"states/{name}" for name in states if LINEAGE.fullmatch(name) and name != "tmp"]
    for folder in sorted({*listing, *linked, *misplaced}):
        listed = listing.get(folder) or ([] if folder in misplaced else files.stored(folder))
        if found := misplaced.get(folder):  # what is in it, or should be, is looked at when that is mended
            yield Inspected(_kind(folder), folder, _bytes(listed), tuple(found))
        elif any(file.path == folder for file in listed):  # a file, whatever it is called
            yield Inspected("unknown", folder, _bytes(listed))
        elif NAME.fullmatch(folder):
            yield _part("store", files, folder, listed, _store_problems)
        elif folder.startswith("states/"):
            yield _part("state", files, folder, listed, _state_problems)
        elif folder == FOLDER:
            yield from _runs(files, [file for file in listed if file.path not in misplaced])
        else:
            yield Inspected("unknown", folder, _bytes(listed))


def repair(files: Files) -> Iterator[Inspected]:
    """Mend what `inspect` yields as it goes; what was removed counts as missing, and is made again when it is needed.

    Harmless leftovers stay, because another writer may be about to commit them, and so does what is unknown.
    """
    misplaced = astray(files)
    for problems in misplaced.values():
        mend(files, problems)
    for part in inspect(files):
        mend(files, part.faults)
        if part.kind == "state" and part.faults:
            files.prune(part.name)
        yield replace(part, problems=(*misplaced.pop(part.name, ()), *part.problems))
    yield from (Inspected(_kind(name), name, 0, tuple(problems)) for name, problems in misplaced.items())


def refuse(parts: Sequence[Inspected], after_repair: bool = False) -> None:
    """Raise an error that lists the faults of all parts, or those that a repair could not mend.

    Raises:
        CorruptionError: something is not what was committed.
        MismatchError: all that could be checked is whole, but a newer DataFlex wrote a part.
    """
    faults = [str(p) for part in parts for p in part.faults if not (after_repair and p.is_mendable)]
    unread = [f"{part.name}: {part.unread}" for part in parts if part.unread]
    if faults:
        raise CorruptionError(
            "\n  ".join([f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'}:", *faults, *unread])
        )
    if unread:
        raise MismatchError("\n  ".join([f"{len(unread)} not looked into:", *unread]))


def _part(
    kind: Kind,
    files: Files,
    name: str,
    listed: list[Stored],
    look: Callable[[Files, str, list[Stored]], Iterator[Problem]],
) -> Inspected:
    found: list[Problem] = []
    unread = ""
    try:
        found.extend(look(files, name, listed))
    except MismatchError as error:
        unread = str(error)
    except OSError as error:  # of the disk, or of permissions: what the bytes are is not known, so nothing is removed
        found.append(Problem(name, f"{files.name(name)} cannot be read: {error}"))
    return Inspected(kind, name, _bytes(listed), tuple(found), unread)


def _runs(files: Files, listed: list[Stored]) -> Iterator[Inspected]:
    by_run: dict[str, list[Stored]] = {}
    for file in listed:
        by_run.setdefault(file.path.split("/")[1], []).append(file)
    for run, documents in by_run.items():
        if RUN_ID.fullmatch(run):
            yield _part("run", files, f"{FOLDER}/{run}", documents, note_problems)
        else:
            yield Inspected("unknown", f"{FOLDER}/{run}", _bytes(documents))


def _store_problems(files: Files, folder: str, listed: list[Stored]) -> Iterator[Problem]:
    there = {file.path for file in listed}
    if f"{folder}/{REMOVING}" in there:
        what = f"{files.name(folder)}: its removal was broken off; `dataflex store gc --leftovers --delete` finishes it"
        yield Problem(f"{folder}/{REMOVING}", what, harmless=True)
        return
    damaged = list(document_problems(files, folder, "recipe"))
    yield from damaged
    document = find_record(files, folder, "recipe")
    log = Log(files, f"{folder}/log")
    log.refresh()
    if document is None:
        yield from log_and_data(files, folder, log, None)
        yield _lost_recipe(files, folder, log, bool(damaged), f"{folder}/{WAITING}" in there)
    else:
        try:
            layout = recorded_store(files, folder, document).layout
        except CorruptionError as error:
            yield Problem(f"{folder}/recipe.json", str(error))
            return
        yield from log_and_data(files, folder, log, layout)
    places = ("recipe", "data/", "log/", "derived/", WAITING)
    for path in sorted(there):
        if not path.removeprefix(f"{folder}/").startswith(places):
            yield Problem(path, f"{files.name(path)} has no place in a store; it is never opened", harmless=True)


def _lost_recipe(files: Files, folder: str, log: Log, is_damaged: bool, is_known: bool) -> Problem:
    """Describe a store without a recipe. Its name is the recipe's digest, so a run that asks for it finds it."""
    path, rows = f"{folder}/recipe.json", sum(entry.rows for entry in log.entries.values())
    if not is_damaged and (is_known or not (log.entries or log.damaged)):
        return Problem(path, f"{files.name(folder)} has no recipe; {rows:,} rows wait for a run", harmless=True)
    what = (
        f"{files.name(path)} is lost; the {rows:,} rows beside it stay for the run file that computed them, which "
        "writes the recipe again, or until `dataflex store gc --leftovers`"
    )
    return Problem(path, what, put=(f"{folder}/{WAITING}", seal({"rows": rows})))


def _state_problems(files: Files, folder: str, listed: list[Stored]) -> Iterator[Problem]:
    # The manifest lies on top, and goes first: a state is there entirely or not at all.
    whole = tuple(sorted((file.path for file in listed), key=lambda path: path.count("/")))
    damaged = list(document_problems(files, folder, "manifest"))
    try:
        manifest = StateStore(files).manifest(folder.removeprefix("states/"))
    except CorruptionError as error:
        yield Problem(f"{folder}/manifest.json", str(error), remove=whole)
        return
    if manifest is None:
        yield from (replace(problem, remove=whole) for problem in damaged)
    else:
        yield from damaged
        yield from _copy_problems(files, f"{folder}/{manifest['folder']}", manifest["files"], whole)
    for why, several in unused(files, folder, listed):
        yield from (Problem(file.path, f"{files.name(file.path)}: {why}", harmless=True) for file in several)


def _copy_problems(files: Files, copy: str, sums: Mapping[str, str], whole: tuple[str, ...]) -> Iterator[Problem]:
    """Hold the files of a state against its manifest; one that is damaged takes the `whole` state with it."""
    kept = {f"{copy}/{name}": expected for name, expected in sums.items()}
    for path, expected in kept.items():
        if fault := _fault(files, path, expected):
            yield Problem(path, f"{fault}; the next run that needs this state trains to it again", remove=whole)
    for path in (file.path for file in files.stored(copy)):
        if path not in kept:
            yield Problem(path, f"{files.name(path)} was not kept with this state", remove=(path,))


def _fault(files: Files, path: str, expected: str) -> str | None:
    """Say what is wrong with a file of a state, or None."""
    try:
        found = files.sha256(path)
    except CorruptionError as error:
        return str(error)
    except FileNotFoundError:
        return f"{files.name(path)} is missing although it was kept"
    return None if found == expected else f"{files.name(path)} is damaged: its SHA-256 is not the one kept"


def _kind(folder: str) -> Kind:
    """Tell by its name what a folder of DataFlex's is."""
    return "store" if NAME.fullmatch(folder) else "run" if folder.split("/")[0] == FOLDER else "state"


def _bytes(listed: list[Stored]) -> int:
    return sum(file.bytes for file in listed)
