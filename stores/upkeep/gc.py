"""What can be removed from a root, and why; `dataflex.stores.upkeep.removal` removes it.

Two rules keep what a live run needs: a run is recorded before it opens anything, so what it uses is known; and what is
in no record, or is not committed, is left alone until it is older than a grace period. Clocks matter only for that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from dataflex.errors import ConfigError, CorruptionError, MismatchError
from dataflex.stores.engine_version import older
from dataflex.stores.files import Files, Stored
from dataflex.stores.root import NAME, REMOVING
from dataflex.stores.runs import FOLDER, KnownRun, Used, read_runs
from dataflex.stores.upkeep.astray import astray
from dataflex.stores.upkeep.unused import by_folder, is_there, unused

GRACE_HOURS = 24.0


@dataclass(frozen=True)
class Scope:
    """What may be removed.

    Attributes:
        runs: output folders or ids of runs; stores and states go that these refer to and no other run does.
        unreferenced: whether stores and states go that no run refers to.
        leftovers: whether files go that no reader ever opens, and removals that were broken off are finished.
        include_finished: whether the named runs may be finished ones.
        older_engine: whether stores and states go that no run refers to and an older version of the feature engine
            computed; those that runs refer to are named, and stay.
        grace_hours: things younger than this, and runs that wrote a record within it, are taken to be in use.
    """

    runs: tuple[str, ...] = ()
    unreferenced: bool = False
    leftovers: bool = False
    include_finished: bool = False
    older_engine: bool = False
    grace_hours: float = GRACE_HOURS

    def check(self) -> None:
        """Refuse a scope that is empty or contradicts itself.

        Raises:
            ConfigError: it does.
        """
        if not (self.runs or self.unreferenced or self.leftovers or self.older_engine):
            raise ConfigError(
                "found no scope; say what may go: --run ID-OR-OUTPUT_DIR (what that run and no other refers to), "
                "--unreferenced (what no run refers to), --older-engine (that of it which an older version computed), "
                "--leftovers (unused files of crashes), or several of them"
            )
        if self.include_finished and not self.runs:
            raise ConfigError("--include-finished: found no --run; expected the finished runs by name")
        if not self.grace_hours >= 0:
            raise ConfigError(f"--grace: found {self.grace_hours}; expected hours, 0 or more")

    @property
    def young_since(self) -> float:
        """Where the grace period begins, seconds since 1970."""
        return time.time() - 3600 * self.grace_hours


@dataclass(frozen=True)
class Item:
    """Something that can go, or that was asked for and stays.

    Attributes:
        kind: what it is.
        name: a store's folder, a state's lineage, a run's id, or the folder that leftovers lie in.
        why: the reason that it goes or stays.
        files: those that go.
        goes: whether it goes.
    """

    kind: Literal["store", "state", "leftovers", "run"]
    name: str
    why: str
    files: tuple[Stored, ...] = field(default=(), repr=False)
    goes: bool = True

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(file.bytes for file in self.files)


def plan(files: Files, scope: Scope, engine: int = 0) -> list[Item]:
    """Say what a scope would remove and what it spares, runs last; writes nothing.

    Args:
        files: the root's.
        scope: what may be removed.
        engine: version of the feature engine now; what an older one computed is named as such. 0 does not look.

    Raises:
        ConfigError: the scope is empty or contradicts itself.
        CorruptionError: what runs refer to cannot be told, because something lies where their records belong.
        MismatchError: no run is known by a name, or a newer DataFlex wrote a run's description.
    """
    scope.check()
    misplaced = {name: problems for name, problems in astray(files).items() if name.split("/")[0] in (FOLDER, "states")}
    if wrong := [str(problem) for problems in misplaced.values() for problem in problems]:
        raise CorruptionError("\n  ".join([*wrong, "nothing goes before that: what runs refer to is not known"]))
    listing = by_folder(files.stored(""))  # before the runs and logs: what is committed meanwhile is seen as used
    runs = read_runs(files)
    for name in scope.runs:
        if not any(run.is_called(name) for run in runs):
            known = ", ".join(f"{run.id[:8]} ({run.output_dir})" for run in runs) or "none"
            raise MismatchError(f"no run {name} is recorded under {files.url}; found {known}")
    named, spared = named_runs(runs, scope)
    aged = older(files, engine) if engine else {}
    # `Scope()` names no run: of what no run refers to, and of leftovers, every run protects what it uses, named or not.
    found = [
        *(_of_runs(listing, named, users(runs, scope), scope) if named else ()),
        *(_unreferenced(listing, users(runs, Scope()), scope) if scope.unreferenced else ()),
        *(_older(listing, users(runs, scope), aged, scope) if scope.older_engine else ()),
        *(leftovers(files, listing, users(runs, Scope()), scope) if scope.leftovers else ()),
        *(Item("run", run.id, f"record of {run.output_dir or 'an unknown folder'}", run.files) for run in named),
    ]
    # Scopes overlap; the first reason counts, and a folder's leftovers are told apart by theirs.
    once: dict[tuple[str, str, str], Item] = {}
    for item in found:
        once.setdefault((item.kind, item.name, item.why if item.kind == "leftovers" else ""), item)
    return [*(_told(item, aged, engine) for item in once.values()), *spared]


def named_runs(runs: list[KnownRun], scope: Scope) -> tuple[list[KnownRun], list[Item]]:
    """Return the named runs that may go, and those that may not with the reason."""
    going, spared = [], []
    for run in (run for run in runs if any(run.is_called(name) for name in scope.runs)):
        state = run.state(scope.young_since)
        if state == "running":
            why = f"it has not ended and wrote a record less than {scope.grace_hours:g} h ago: it may be running"
            spared.append(Item("run", run.id, why, goes=False))
        elif state == "finished" and not scope.include_finished:
            spared.append(Item("run", run.id, "it has finished; add --include-finished if it may go", goes=False))
        else:
            going.append(run)
    return going, spared


def users(runs: list[KnownRun], scope: Scope) -> dict[Used, list[KnownRun]]:
    """Return for each store and state the runs that protect it: all but those named that may go."""
    named, _ = named_runs(runs, scope)
    found: dict[Used, list[KnownRun]] = {}
    for run in (run for run in runs if run not in named):
        for used in run.uses:
            found.setdefault(used, []).append(run)
    return found


def leftovers(
    files: Files, listing: dict[str, list[Stored]], protected: dict[Used, list[KnownRun]], scope: Scope
) -> Iterator[Item]:
    """Yield what crashes left: removals broken off, stores without recipe, files that no reader opens."""
    young = scope.young_since
    for folder, listed in listing.items():
        if any(file.path == f"{folder}/{REMOVING}" for file in listed):
            yield _aged("store", folder, "its removal was broken off", listed, young)
        elif NAME.fullmatch(folder) and not is_there(folder, listed):
            if ("store", folder) not in protected:
                yield _aged("leftovers", folder, "it has no recipe", listed, young)
        else:
            try:
                groups = list(unused(files, folder, listed))
            except (CorruptionError, MismatchError) as error:
                yield Item("leftovers", folder, str(error), goes=False)
                continue
            together: dict[tuple[str, bool], list[Stored]] = {}
            for why, several in groups:
                together.setdefault((why, _newest(several) < young), []).extend(several)
            for (why, _), several in together.items():
                yield _aged("leftovers", folder, why, several, young)


def _of_runs(
    listing: dict[str, list[Stored]], named: list[KnownRun], protected: dict[Used, list[KnownRun]], scope: Scope
) -> Iterator[Item]:
    for kind, name in sorted({used for run in named for used in run.uses}):
        listed = listing.get(name if kind == "store" else f"states/{name}")
        if not listed:
            continue
        if others := protected.get((kind, name)):
            yield Item(kind, name, f"run {others[0].id[:8]} ({others[0].output_dir}) refers to it too", goes=False)
        else:
            yield Item(kind, name, "no run but those named refers to it", tuple(listed))


def _unreferenced(
    listing: dict[str, list[Stored]], protected: dict[Used, list[KnownRun]], scope: Scope
) -> Iterator[Item]:
    for folder, listed in listing.items():
        is_store = NAME.fullmatch(folder) is not None
        kind: Literal["store", "state"] = "store" if is_store else "state"
        name = folder.removeprefix("states/")
        if (is_store or folder != name) and is_there(folder, listed) and (kind, name) not in protected:
            yield _aged(kind, name, "no run refers to it", listed, scope.young_since)


def _older(
    listing: dict[str, list[Stored]], protected: dict[Used, list[KnownRun]], aged: dict[Used, int], scope: Scope
) -> Iterator[Item]:
    for kind, name in sorted(aged):
        if others := protected.get((kind, name)):
            why = f"run {others[0].id[:8]} ({others[0].output_dir}) refers to it; name it with --run"
            yield Item(kind, name, why, goes=False)
        elif listed := listing.get(name if kind == "store" else f"states/{name}"):
            yield _aged(kind, name, "no run refers to it", listed, scope.young_since)


def _told(item: Item, aged: dict[Used, int], engine: int) -> Item:
    """Add to the reason of an item that an older version of the engine computed it, if one did."""
    version = aged.get((item.kind, item.name)) if item.kind in ("store", "state") else None
    if version is None:
        return item
    return replace(item, why=f"{item.why}; computed by engine {version}, which this one ({engine}) does not reuse")


def _aged(
    kind: Literal["store", "state", "leftovers"], name: str, why: str, listed: list[Stored], young_since: float
) -> Item:
    """Return an item that goes if all of it is older than the grace period."""
    if _newest(listed) < young_since:
        return Item(kind, name, why, tuple(listed))
    return Item(kind, name, f"{why}, but it may be in use: part of it is younger than the grace period", goes=False)


def _newest(listed: list[Stored]) -> float:
    return max(file.modified for file in listed)
