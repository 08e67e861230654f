"""Everything that `dataflex doctor` looks at, in the order of what depends on what."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataflex.doctor.disk import hub_cache, room
from dataflex.doctor.finding import Finding
from dataflex.doctor.imports import devices, imports, mismatches
from dataflex.doctor.versions import disagreements, side_by_side
from dataflex.errors import DataflexError

NEEDED_BY = {"deepspeed": "deepspeed", "quantization_bit": "bitsandbytes"}
"""Key of LLaMA-Factory's -> the module that a run needs where it is set."""


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
    keys, places, faults = _run(run, overrides)
    yield from imports(also=[module for key, module in NEEDED_BY.items() if keys.get(key)])
    yield devices()
    yield from faults
    yield from room(places)


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12), (3, 13)):
        return Finding("ok", "python", version)
    return Finding("warning", "python", f"{version} was not tested", "use 3.11, 3.12 or 3.13")


def _run(run: Path | None, overrides: Sequence[str]) -> tuple[dict[str, object], dict[str, str], list[Finding]]:
    """Return the run's keys of LLaMA-Factory, the places that it writes to, and what is wrong with the file."""
    places = {"output": ".", "Hugging Face cache": hub_cache()}
    try:
        from dataflex.config import load, store_root  # pydantic and OmegaConf, which may be what is broken

        places["store"] = store_root(None)
        if run is None:
            return {}, places, []
        settings = load(run, overrides)
    except ImportError as error:
        return {}, places, [Finding("error", "configuration", f"cannot be read: {error}", "see the imports above")]
    except DataflexError as error:
        first = str(error).splitlines()[0]
        return {}, places, [Finding("error", str(run), first, f"`dataflex validate {run}` says all that is wrong")]
    keys = settings.llamafactory
    places |= {"store": settings.store_root, "output": str(keys.get("output_dir", "."))}
    return keys, places, []
