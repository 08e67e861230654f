"""Words and plain data for what `dataflex store` prints: runs and what they use, checks, repairs, removals."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from dataflex.fingerprint import ABSENT, differing
from dataflex.stores.files import Files
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.problem import Problem
from dataflex.stores.root import NAME
from dataflex.stores.runs import read_runs
from dataflex.stores.upkeep.gc import Item, Scope
from dataflex.stores.upkeep.inspection import Inspected
from dataflex.stores.upkeep.unused import by_folder, is_there


def by_runs(files: Files) -> list[dict[str, Any]]:
    """Return each run with what it refers to, the one that wrote last first, and at the end what no run refers to.

    Each is plain data: `id` (None at the end), `stage` (the verb), `method`, `state`, `output_dir`, `started` and
    `modified` (first start and last record, seconds since 1970; `started` None where that is not known any more), and
    `uses`: `kind`, `name`, `bytes` (None where it is gone).
    """
    listing = by_folder(files.stored(""))
    sizes = {
        ("store" if NAME.fullmatch(folder) else "state", folder.removeprefix("states/")): sum(f.bytes for f in listed)
        for folder, listed in listing.items()
        if (NAME.fullmatch(folder) or folder.startswith("states/")) and is_there(folder, listed)
    }
    young_since = Scope().young_since
    runs = read_runs(files)
    found: list[dict[str, Any]] = [
        {
            "id": run.id,
            "stage": run.verb,
            "method": run.method,
            "state": run.state(young_since),
            "output_dir": run.output_dir,
            "started": run.started or None,
            "modified": run.modified,
            "uses": [{"kind": kind, "name": name, "bytes": sizes.get((kind, name))} for kind, name in run.uses],
        }
        for run in runs
    ]
    used = {each for run in runs for each in run.uses}
    rest = [
        {"kind": kind, "name": name, "bytes": size} for (kind, name), size in sizes.items() if (kind, name) not in used
    ]
    return [*found, {"id": None, "uses": rest}] if rest else found


def lines_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Describe what `by_runs` found."""
    lines = []
    for run in runs:
        if run["id"] is None:
            lines.append("no run")
        else:
            what = f"{run['stage'] or '?'} {run['method']}".strip()
            when = f"started {_minute(run['started'])}, last active {_minute(run['modified'])}"
            lines.append(f"{run['id'][:8]}  {run['output_dir'] or '?'}  {what}, {run['state']}, {when}")
        for used in run["uses"]:
            size = "removed" if used["bytes"] is None else f"{used['bytes']:,} bytes"
            lines.append(f"  {used['kind']:<5} {size:>21}  {used['name']}")
    return lines or ["no runs and no stores"]


def _minute(seconds: float | None) -> str:
    return "?" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def compared(store: ParquetStore, other: ParquetStore) -> dict[str, Any]:
    """Return the fields in which two stores' recipes differ: `differing` is a list of `field`, `store`, `other`.

    A field that one of them does not have lacks there the key of that side.
    """
    pairs = differing({"kind": store.kind, **store.recipe}, {"kind": other.kind, **other.recipe})
    fields = [
        {"field": path} | {side: value for side, value in (("store", a), ("other", b)) if value is not ABSENT}
        for path, a, b in pairs
    ]
    return {"store": store.path, "other": other.path, "differing": fields}


def lines_of_comparison(found: dict[str, Any]) -> list[str]:
    """Describe what `compared` found: the field, then its value in each store."""

    def shown(field: dict[str, Any], side: str) -> str:
        return json.dumps(field[side], ensure_ascii=False) if side in field else "(none)"

    if not found["differing"]:
        return [f"no difference: {found['store']} and {found['other']} have the same recipe"]
    lines = [f"- {found['store']}", f"+ {found['other']}"]
    for field in found["differing"]:
        lines += [f"{field['field']}", f"  - {shown(field, 'store')}", f"  + {shown(field, 'other')}"]
    return lines


def lines_of_removal(items: Sequence[Item], is_done: bool) -> list[str]:
    """Describe a plan or, if `is_done`, what came of it."""
    said = {True: "removed" if is_done else "would go", False: "stays"}
    lines = [f"{said[i.goes]:<8}  {i.bytes:>15,} bytes  {i.kind:<9}  {i.name}: {i.why}" for i in items]
    going = [item for item in items if item.goes]
    total = f"{len(going)} things, {sum(item.bytes for item in going):,} bytes"
    if not going:
        return [*lines, "nothing to remove"]
    return [*lines, f"removed {total}" if is_done else f"{total} would go; --delete removes them"]


def inspected(parts: Sequence[Inspected]) -> dict[str, Any]:
    """Return what was looked at as plain data, by name: `kind`, `bytes`, `faults`, `unused` files, `unread`."""
    return {
        part.name: {
            "kind": part.kind,
            "bytes": part.bytes,
            "faults": [str(fault) for fault in part.faults],
            "unused": part.unused,
            "unread": part.unread,
        }
        for part in parts
    }


def lines_of_inspection(parts: Sequence[Inspected]) -> list[str]:
    """Describe what was looked at: a line for each store, kept state and unknown thing, damaged runs, and a total."""
    lines = []
    for part in parts:
        if part.kind == "unknown":
            lines.append(f"{part.name}: not DataFlex's, {part.bytes:,} bytes, not looked into")
        elif part.kind != "run" or part.problems or part.unread:
            state = "damaged" if part.faults else "not looked into" if part.unread else "intact"
            first = next((f" (first: {problem})" for problem in part.problems if problem.harmless), "")
            lines.append(f"{part.name}: {state}, {part.unused} unused files{first}")
    count = {kind: sum(part.kind == kind for part in parts) for kind in ("store", "state", "run", "unknown")}
    seen = sum(part.bytes for part in parts if part.kind != "unknown")
    kinds = f"{count['store']} stores, {count['state']} kept states and {count['run']} records of runs"
    faults = sum(len(part.faults) for part in parts)
    total = f"{kinds}, {seen:,} bytes; {faults} {'fault' if faults == 1 else 'faults'}"
    return [
        *lines,
        f"looked at {total}; {count['unknown']} unknown things left alone" if parts else "nothing there yet",
    ]


def repaired(parts: Sequence[Inspected]) -> dict[str, Any]:
    """Return what a repair did as plain data, by name: `kind`, `mended`, `left`; intact parts are left out."""
    return {
        part.name: {
            "kind": part.kind,
            "mended": [_mended(fault) for fault in part.faults if fault.is_mendable],
            "left": [str(fault) for fault in part.faults if not fault.is_mendable],
        }
        for part in parts
        if part.faults
    }


def lines_of_repair(parts: Sequence[Inspected]) -> list[str]:
    """Describe what a repair did, and what it looked at."""
    lines = [_mended(fault) for part in parts for fault in part.faults if fault.is_mendable]
    return [*lines, lines_of_inspection(parts)[-1]]


def _mended(fault: Problem) -> str:
    done = "removed" if fault.remove else "written again" if fault.put and fault.put[0] == fault.path else "kept"
    done = "put aside" if fault.aside else done
    more = f" (and the {len(fault.remove) - 1} files with it)" if len(fault.remove) > 1 else ""
    return f"{done}: {fault}{more}"
