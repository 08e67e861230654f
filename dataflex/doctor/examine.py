"""Everything that `dataflex doctor` looks at, in the order of what depends on what."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dataflex.doctor.disk import hub_cache, room
from dataflex.doctor.finding import Finding
from dataflex.doctor.imports import NEEDED, devices, imports, mismatches, optional
from dataflex.doctor.versions import disagreements, side_by_side
from dataflex.errors import DataflexError

NEEDED_BY = {"deepspeed": "deepspeed", "quantization_bit": "bitsandbytes"}
"""Key of LLaMA-Factory's -> the module that a run needs where it is set."""

READ_BY = {"pydantic", "omegaconf"}
"""Packages that run files are read with; if one is broken, no run file can be looked at."""


def examine(run: Path | None = None, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield what is found, as it is found: the imports take a minute.

    Args:
        run: a run file, whose store and output are looked at and whose optional packages are needed.
        overrides: as for `dataflex train`.
    """
    yield _python()
    faiss = side_by_side()
    if faiss is not None:
        yield faiss
    yield from disagreements()
    yield from mismatches()
    broken = set()
    for finding in imports(NEEDED, critical=NEEDED):
        yield finding
        if finding.level == "error":
            broken.add(finding.about)
    if "torch" not in broken:
        yield devices()
    keys, places, faults = _run(run, overrides, broken)
    yield from faults
    also = [module for key, module in NEEDED_BY.items() if keys.get(key)]
    yield from imports(optional(also), critical=["faiss", *also])
    yield from room(places)


def _run(
    run: Path | None, overrides: Sequence[str], broken: set[str]
) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    """Return the run's keys of LLaMA-Factory, the places that it writes to, and what is wrong with its file."""
    places = {"output": ".", "Hugging Face cache": hub_cache()}
    if broken & READ_BY:  # to import what is broken may end in anything
        first = f"mend {' and '.join(sorted(broken & READ_BY))} first"
        return {}, places, [Finding("error", "configuration", "cannot be read", first)]
    from dataflex.config import load, store_root

    places["store"] = store_root(None)
    if run is None:
        return {}, places, []
    try:
        settings = load(run, overrides)
    except DataflexError as error:
        advice = f"`dataflex validate {run}` says all that is wrong"
        return {}, places, [Finding("error", str(run), str(error).splitlines()[0], advice)]
    keys = settings.llamafactory
    return keys, places | {"store": settings.store_root, "output": str(keys.get("output_dir", "."))}, []


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12), (3, 13)):
        return Finding("ok", "python", version)
    return Finding("warning", "python", f"{version} was not tested", "use 3.11, 3.12 or 3.13")
