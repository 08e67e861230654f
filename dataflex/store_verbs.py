"""The verbs `dataflex store ...`, which look at stores of features and make room."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from dataflex.answer import Json, answer
from dataflex.errors import CorruptionError, MismatchError

log = logging.getLogger(__name__)

app = typer.Typer(help="Look at stores of features, and make room.", no_args_is_help=True, rich_markup_mode=None)

Root = Annotated[str | None, typer.Option(help="Path or URL; default: as for a run file that names no store.")]
ByRun = Annotated[bool, typer.Option("--by-run", help="By the runs that refer to them.")]
Runs = Annotated[list[str] | None, typer.Option("--run", metavar="RUN", help="Output folder or id; repeatable.")]
Unreferenced = Annotated[bool, typer.Option("--unreferenced", help="What no run refers to.")]
Leftovers = Annotated[bool, typer.Option("--leftovers", help="Files of crashes that no reader opens.")]
Older = Annotated[bool, typer.Option("--older-engine", help="What an older version computed and no run refers to.")]
Finished = Annotated[bool, typer.Option("--include-finished", help="The runs named may be finished ones.")]
Grace = Annotated[float, typer.Option(metavar="HOURS", help="What is younger is taken to be in use.")]
Delete = Annotated[bool, typer.Option("--delete", help="Remove; without it, only say what would go.")]
Name = Annotated[str, typer.Argument(metavar="STORE", help="Name of a store, or how it begins.")]
OtherName = Annotated[str, typer.Argument(metavar="OTHER", help="Likewise.")]
OtherRoot = Annotated[str | None, typer.Option(help="Root of OTHER; default: that of STORE.")]


@app.command("ls")
def list_stores(by_run: ByRun = False, root: Root = None, as_json: Json = False) -> None:
    """List the stores: name, rows, bytes."""
    if by_run:
        from dataflex.stores.upkeep.listing import by_runs, lines_of

        listed = by_runs(_files(root))
        answer(listed, as_json, lines_of(listed))
        return
    where, stores = _stores(root)
    found = []
    for store in stores:
        try:
            found.append(_about(store))
        except (CorruptionError, MismatchError) as error:  # of one of them: the rest is listed
            log.warning("%s; left out", error)
    lines = [f"{s['rows']:>12,} rows {s['bytes']:>15,} bytes  {s['storage']:<7}  {s['name']}" for s in found]
    answer(found, as_json, lines or [f"no stores under {where}"])


@app.command("show")
def show_store(name: Name, root: Root = None, as_json: Json = False) -> None:
    """Show a store's recipe: everything but the row that its values depend on."""
    import json

    store = _named(name, root)
    about = _about(store) | {"recipe": store.recipe}
    answer(about, as_json, [json.dumps(about, indent=2, ensure_ascii=False)])


@app.command("diff")
def compare_stores(
    name: Name, other: OtherName, root: Root = None, other_root: OtherRoot = None, as_json: Json = False
) -> None:
    """Say in which fields the recipes of two stores differ; exit with 3 if they do."""
    from dataflex.stores.upkeep.listing import compared, lines_of_comparison

    second = (root, "--root") if other_root is None else (other_root, "--other-root")
    found = compared(_named(name, root), _named(other, *second))
    answer(found, as_json, lines_of_comparison(found))
    if found["differing"]:
        raise typer.Exit(MismatchError.exit_code)


@app.command("verify")
def verify_stores(root: Root = None, as_json: Json = False) -> None:
    """Read every byte under the root; exit with 4 if any is not what was committed."""
    from dataflex.stores.upkeep.inspection import inspect, refuse
    from dataflex.stores.upkeep.listing import inspected, lines_of_inspection

    with _unwarned():
        parts = list(inspect(_files(root)))
    answer(inspected(parts), as_json, lines_of_inspection(parts))
    refuse(parts)


@app.command("repair")
def repair_stores(root: Root = None, as_json: Json = False) -> None:
    """Remove what is damaged, so that the next run computes it again; exit with 4 if something cannot be mended."""
    from dataflex.stores.upkeep.inspection import refuse, repair
    from dataflex.stores.upkeep.listing import lines_of_repair, repaired

    with _unwarned():
        parts = list(repair(_files(root)))
    answer(repaired(parts), as_json, lines_of_repair(parts))
    refuse(parts, after_repair=True)


@app.command("gc")
def collect_garbage(
    run: Runs = None,
    unreferenced: Unreferenced = False,
    leftovers: Leftovers = False,
    older_engine: Older = False,
    include_finished: Finished = False,
    grace: Grace = 24.0,
    delete: Delete = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Remove stores, kept states and unused files: what --run, --unreferenced, --older-engine and --leftovers name.

    Without --delete it only says what would go. What a finished run refers to stays unless the run is named and
    --include-finished is given; what a running one refers to stays always.
    """
    from dataflex.features.spec import ENGINE_VERSION
    from dataflex.stores.upkeep.gc import Scope, plan
    from dataflex.stores.upkeep.listing import lines_of_removal
    from dataflex.stores.upkeep.removal import carry_out

    files = _files(root)
    scope = Scope(tuple(run or ()), unreferenced, leftovers, include_finished, older_engine, grace)
    items = plan(files, scope, ENGINE_VERSION)
    if delete:
        items = carry_out(files, items, scope)
    about = [{"kind": i.kind, "name": i.name, "bytes": i.bytes, "goes": i.goes, "why": i.why} for i in items]
    answer({"deleted": delete, "items": about}, as_json, lines_of_removal(items, delete))


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Keep the stores from warning of what is reported in full afterwards."""
    logger = logging.getLogger("dataflex.stores")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _stores(root: str | None, option: str = "--root") -> tuple[str, list[Any]]:
    from dataflex.stores.root import StoreRoot

    files = _files(root, option)
    return files.url, StoreRoot(files).stores()


def _named(name: str, root: str | None, option: str = "--root") -> Any:
    """Return the one store that a name stands for, or the beginning of one."""
    where, stores = _stores(root, option)
    names = [store.folder for store in stores]
    matching = [store for store in stores if store.folder.startswith(name)]
    if len(matching) != 1:
        found = f"{len(matching)} stores called {name}..." if matching else f"no store {name}"
        raise MismatchError(f"{found} under {where}; expected one of {', '.join(names) or 'none'}")
    return matching[0]


def _files(root: str | None, option: str = "--root") -> Any:
    from dataflex.config import store_root
    from dataflex.stores.root import existing_files

    named_by = option if root is not None else "DATAFLEX_HOME" if os.environ.get("DATAFLEX_HOME") else None
    return existing_files(store_root(root), named_by)


def _about(store: Any) -> dict[str, Any]:
    layout = store.layout
    return {
        "name": store.folder,
        "kind": store.kind,
        "rows": store.rows,
        "bytes": store.bytes,
        "fragments": len(store.committed_fragments()),
        "width": layout.width,
        "storage": layout.storage,
        "path": store.path,
    }
