"""Removal of what `dataflex.stores.upkeep.gc` planned: each thing only while it is still as planned. Run one at a time.

A store goes in two phases. First a mark is put into its folder: a run that opens the store after that is refused, and
of every run before it there is a record, which is looked for now. Only then its recipe goes, so that no reader finds
it, then its log, then the rest, the mark last. What a crash leaves of it is finished by the next removal.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import replace

from dataflex.stores.files import Files, Stored
from dataflex.stores.record import claim
from dataflex.stores.root import REMOVING
from dataflex.stores.runs import FOLDER, read_runs
from dataflex.stores.upkeep.gc import Item, Scope, leftovers, named_runs, users
from dataflex.stores.upkeep.unused import by_folder, is_there


def carry_out(files: Files, planned: list[Item], scope: Scope) -> list[Item]:
    """Remove what the plan says; return the plan as it was carried out, with what was spared in the end.

    Args:
        files: the root's.
        planned: by `dataflex.stores.upkeep.gc.plan`.
        scope: the one it was planned for.

    Raises:
        MismatchError: a newer DataFlex wrote a run's description meanwhile.
    """
    remove = {"store": _store, "state": _state, "leftovers": _leftovers, "run": _run}
    return [remove[item.kind](files, item, scope) if item.goes else item for item in planned]


def _store(files: Files, item: Item, scope: Scope) -> Item:
    claim(files, item.name, REMOVING.removesuffix(".json"), {"by": uuid.uuid4().hex})
    listed = files.stored(item.name)
    # Where the recipe is gone, an earlier removal has looked already, and no run has opened the store since.
    if is_there(item.name, listed) and (spared := _spared(files, item, scope, listed)):
        files.remove(f"{item.name}/{REMOVING}")
        return spared

    def order(file: Stored) -> int:
        name = file.path.removeprefix(f"{item.name}/")
        # Log entries before the data that they name, as anywhere; the mark last.
        return 0 if name.startswith("recipe") else 1 if name.startswith("log/") else 3 if name == REMOVING else 2

    _remove(files, item.name, sorted(listed, key=order))
    return item


def _state(files: Files, item: Item, scope: Scope) -> Item:
    folder = f"states/{item.name}"
    listed = files.stored(folder)  # before the manifest goes: what another writer puts there after that stays
    if spared := _spared(files, item, scope, listed):
        return spared
    _remove(files, folder, sorted(listed, key=lambda file: file.path.count("/")))  # the manifest lies on top
    return item


def _leftovers(files: Files, item: Item, scope: Scope) -> Item:
    # Planned anew, as a writer may have committed some of the files since; only what both plans name goes.
    listing = by_folder(files.stored(item.name))
    now = {
        file.path
        for found in leftovers(files, listing, users(read_runs(files), Scope()), scope)
        for file in found.files
        if found.goes and found.name == item.name
    }
    gone = tuple(file for file in item.files if file.path in now)
    for file in gone:
        files.remove(file.path)
    if not files.stored(item.name):
        files.prune(item.name)
    return replace(item, files=gone)


def _run(files: Files, item: Item, scope: Scope) -> Item:
    runs = read_runs(files)
    if all(run.id != item.name for run in named_runs(runs, scope)[0]):
        return replace(item, why="it was started again", files=(), goes=False)
    folder = f"{FOLDER}/{item.name}"
    # Its description last: as long as it is there, the run can be named.
    _remove(files, folder, sorted(item.files, key=lambda file: file.path.startswith(f"{folder}/begun.")))
    return item


def _spared(files: Files, item: Item, scope: Scope, listed: Iterable[Stored]) -> Item | None:
    """Return the item as spared if a run protects it now, or somebody wrote to it since it was planned."""
    others = [
        run for used, runs in users(read_runs(files), scope).items() if used == (item.kind, item.name) for run in runs
    ]
    written = {file for file in listed if not file.path.endswith(f"/{REMOVING}")} - set(item.files)
    if not others and not written:
        return None
    why = (
        f"run {others[0].id[:8]} ({others[0].output_dir}) refers to it now" if others else "it was written to just now"
    )
    return replace(item, why=why, files=(), goes=False)


def _remove(files: Files, folder: str, ordered: Iterable[Stored]) -> None:
    for file in ordered:
        files.remove(file.path)
    files.prune(folder)
