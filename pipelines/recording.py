"""What a run writes down of itself as it begins: what it is, where it runs, and which row each record became."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dataflex import __version__, distributed
from dataflex.config.settings import Settings
from dataflex.fingerprint import digest, plain
from dataflex.redaction import redacted
from dataflex.results import opening, row_map
from dataflex.results.names import ABOUT, PLAN, ROWS, name_of
from dataflex.rows import RowSets
from dataflex.trainers.directing import DirectedTrainer
from dataflex.whole import replacing

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "llamafactory", "peft", "accelerate", "datasets", "pyarrow")


def record(
    verb: str,
    settings: Settings,
    trainer: DirectedTrainer,
    identity: Mapping[str, Any],
    named: str,
    is_resumed: bool = False,
) -> None:
    """Write `dataflex_run.json` and `dataflex_rows.parquet` into the run's folder; verbs but `train` add their name.

    The first holds `settings` as they were in force, `identity` and its digest, `versions`, `machine`, what the data
    came to, and a line under `launches` for each start under that identity; what may be a secret is left out.
    A training writes them at its first step, with what an earlier one has left removed if it begins anew.

    Args:
        verb: the verb.
        settings: the run file.
        trainer: of the run.
        identity: everything that a decision depends on.
        named: its digest.
        is_resumed: whether it goes on from a checkpoint.
    """
    if not distributed.is_main():
        return
    sets = trainer.row_sets
    more = {
        "model": {"parameters": _parameters(trainer), "trained": _parameters(trainer, trained=True)},
        "global_batch": trainer.global_batch,
        "data": _data(sets),
        "machine": _machine(trainer),
        "identity": plain(dict(identity)),
    }
    # Not the trainer's folder: that of other verbs is removed.
    out = Path(settings.llamafactory["output_dir"])

    def write(_: int) -> None:
        if verb == "train" and not is_resumed:
            opening.clear(out, settings.train_type == "dynamic_select", settings.train_type == "dynamic_mix")
        _write(verb, settings, named, more)
        row_map.write(out / name_of(ROWS, verb), row_map.table(sets.train, sets.targets, sets.tests))

    if verb == "train":
        opening.at_first_step(write)
    else:
        write(0)


def record_untouched(settings: Settings) -> None:
    """Write `dataflex_run.json` of a training that LLaMA-Factory does alone, as far as the run file tells it."""
    if not distributed.is_main() or not settings.llamafactory.get("output_dir"):
        return

    def write(before: int) -> None:
        if not before:
            opening.clear(Path(settings.llamafactory["output_dir"]), keeps_rounds=False, keeps_mixture=False)
        named = digest(plain(shown_settings(settings)))
        _write("train", settings, named, {"machine": {"host": platform.node()}})

    opening.at_first_step(write)


def _write(verb: str, settings: Settings, named: str, more: Mapping[str, Any]) -> None:
    path = Path(settings.llamafactory["output_dir"]) / name_of(ABOUT, verb)
    launch = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "host": platform.node()}
    earlier = _earlier(path, named)
    about = {
        "verb": verb,
        "run_file": str(settings.path),
        "method": settings.component_name,
        "train_type": settings.train_type,
        "digest": named,
        "launches": [*(earlier.get("launches") or []), launch],
        "planned": earlier.get("planned") or _planned(path.parent, named),
        "settings": shown_settings(settings),
        "store": settings.store_root,
        "versions": _versions(),
        **more,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(redacted(about), indent=1, default=str) + "\n", "utf-8")


def shown_settings(settings: Settings) -> dict[str, Any]:
    """Return a run file as plain data, the parameters of its methods whole; what may be a secret is left out."""
    dataflex = settings.dataflex.model_dump(mode="json", exclude_unset=True)
    params, beside, before = (
        {} if some is None else some.model_dump(mode="json")
        for some in (settings.params, settings.weighter_params, settings.prefilter_params)
    )
    for name, given in (("weighter", beside), ("prefilter", before)):
        if dataflex.get(name):
            dataflex[name] = {**dataflex[name], "params": given}
    keys = settings.keys.model_dump(mode="json", exclude_unset=True)
    return dict(redacted({**settings.llamafactory, **keys, "dataflex": {**dataflex, "params": params}}))


def _earlier(path: Path, named: str) -> dict[str, Any]:
    """Return what an earlier launch of the same run wrote; nothing of another run, or where it cannot be read."""
    try:
        earlier = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return earlier if earlier.get("digest") == named else {}


def _planned(folder: Path, named: str) -> Any:
    """Return the time that a plan of this very run, made before it, had estimated."""
    try:
        plan = dict(json.loads((folder / PLAN).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return plan.get("seconds") if plan.get("digest") == named else None


def _parameters(trainer: DirectedTrainer, trained: bool = False) -> int:
    # Under ZeRO-3 a parameter's own storage is empty on every rank, and `ds_numel` says how large it is.
    return sum(
        int(getattr(p, "ds_numel", p.numel())) for p in trainer.model.parameters() if p.requires_grad or not trained
    )


def _data(sets: RowSets) -> dict[str, Any]:
    """Return rows and tokens of each set."""
    found: dict[str, Any] = {"train": {"rows": len(sets.train), "tokens": int(sets.train.length.sum())}}
    for role, named in (("targets", sets.targets), ("tests", sets.tests)):
        found[role] = {name: {"rows": len(rows), "tokens": int(rows.length.sum())} for name, rows in named.items()}
    return found


def _machine(trainer: DirectedTrainer) -> dict[str, Any]:
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "host": platform.node(),
        "device": f"{device.type}: {name}",
        "processes": distributed.world(),
        "threads": torch.get_num_threads(),
    }


def _versions() -> dict[str, str]:
    found = {"dataflex": __version__, "python": sys.version.partition(" ")[0]}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}
