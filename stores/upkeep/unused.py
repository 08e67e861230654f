"""Files under a root that no reader ever opens: what crashes and lost races leave behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dataflex.stores.files import Files, Stored
from dataflex.stores.log import Log
from dataflex.stores.record import find_record
from dataflex.stores.root import NAME


def by_folder(files: Sequence[Stored]) -> dict[str, list[Stored]]:
    """Return the files of a root, or of a part of it, by the folder that they belong to.

    That is a store's, `states/<lineage>`, or the first part of any other path.
    """
    found: dict[str, list[Stored]] = {}
    for file in files:
        parts = file.path.split("/")
        is_state = parts[0] == "states" and len(parts) > 2 and parts[1] != "tmp"
        found.setdefault("/".join(parts[: 2 if is_state else 1]), []).append(file)
    return found


def is_there(folder: str, files: Sequence[Stored]) -> bool:
    """Say whether a store's folder has a recipe, or a state's a manifest, even a damaged one: else nobody finds it."""
    stem = "manifest" if folder.startswith("states/") else "recipe"
    names = [file.path.removeprefix(f"{folder}/") for file in files]
    return any(name.startswith(stem) and name.endswith(".json") and "/" not in name for name in names)


def unused(files: Files, folder: str, listed: Sequence[Stored]) -> Iterator[tuple[str, list[Stored]]]:
    """Yield groups of unused files of one folder, each with the reason; a group goes entirely or not at all.

    `listed` has to be older than the call: the log is read now, so that what was committed meanwhile counts as used.

    Raises:
        MismatchError: a newer DataFlex wrote there.
    """
    for file in listed:
        if "tmp" in file.path.split("/")[:-1][:2]:  # under it; a file that is called so is none of ours
            yield "a write that was broken off", [file]
    if folder.startswith("states/"):
        yield from _of_state(files, folder, listed)
    elif NAME.fullmatch(folder) and is_there(folder, listed):
        yield from _of_store(files, folder, listed)


def _of_store(files: Files, folder: str, listed: Sequence[Stored]) -> Iterator[tuple[str, list[Stored]]]:
    log = Log(files, f"{folder}/log")
    log.refresh()
    data = {f"{folder}/data/{entry.data}.parquet" for entry in log.entries.values()}
    for file in listed:
        # A damaged entry may stand for any of the files: `store repair` decides first.
        if file.path.startswith(f"{folder}/data/") and file.path not in data and not log.damaged:
            yield "in no log entry", [file]
        if file.path.startswith(f"{folder}/log/") and not file.path.endswith(".json"):
            yield "no log entry", [file]


def _of_state(files: Files, folder: str, listed: Sequence[Stored]) -> Iterator[tuple[str, list[Stored]]]:
    manifest = find_record(files, folder, "manifest")
    if manifest is None and is_there(folder, listed):
        return  # damaged, or put there after the listing
    copies: dict[str, list[Stored]] = {}
    for file in listed:
        parts = file.path.split("/")
        if len(parts) > 3:
            copies.setdefault(parts[2], []).append(file)
    for copy, several in copies.items():
        if manifest is None or copy != manifest["folder"]:
            yield "in no manifest", several  # one copy of a state: its last file may be young while its first is old
