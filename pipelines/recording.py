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
from dataflex.config.problems import is_secret
from dataflex.config.settings import Settings
from dataflex.fingerprint import digest, plain
from dataflex.results import row_map
from dataflex.results.folder import ABOUT, ROWS, name_of
from dataflex.rows import RowSets
from dataflex.trainers.directing import DirectedTrainer
from dataflex.whole import replacing

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "llamafactory", "peft", "accelerate", "datasets", "pyarrow")


def record(verb: str, settings: Settings, trainer: DirectedTrainer, identity: Mapping[str, Any], named: str) -> None:
    """Write `dataflex_run.json` and `dataflex_rows.parquet` into the run's folder; verbs but `train` add their name.

    The first holds `settings` as they were in force (what may be a secret is left out), `identity` and its digest,
    `versions`, `machine`, what the data came to, and a line under `launches` for each start under that identity.

    Args:
        verb: the verb.
        settings: the run file.
        trainer: of the run.
        identity: everything that a decision depends on.
        named: its digest.
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
    _write(verb, settings, named, more)
    # Not the trainer's folder: that of other verbs is removed.
    path = Path(settings.llamafactory["output_dir"]) / name_of(ROWS, verb)
    row_map.write(path, row_map.table(sets.train, sets.targets, sets.tests))


def record_untouched(settings: Settings) -> None:
    """Write `dataflex_run.json` of a training that LLaMA-Factory does alone, as far as the run file tells it."""
    if distributed.is_main() and settings.llamafactory.get("output_dir"):
        settings_digest = digest(plain(shown_settings(settings)))
        _write("train", settings, settings_digest, {"machine": {"host": platform.node()}})


def _write(verb: str, settings: Settings, named: str, more: Mapping[str, Any]) -> None:
    path = Path(settings.llamafactory["output_dir"]) / name_of(ABOUT, verb)
    launch = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "host": platform.node()}
    about = {
        "verb": verb,
        "run_file": str(settings.path),
        "method": settings.component_name,
        "train_type": settings.train_type,
        "digest": named,
        "launches": [*_launches(path, named), launch],
        "settings": shown_settings(settings),
        "store": settings.store_root,
        "versions": _versions(),
        **more,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(about, indent=1, default=str) + "\n", "utf-8")


def shown_settings(settings: Settings) -> dict[str, Any]:
    """Return a run file as plain data, what may be a secret replaced by a word."""
    dataflex = settings.dataflex.model_dump(mode="json", exclude_unset=True)
    params = settings.params.model_dump(mode="json") if settings.params is not None else {}
    keys = settings.keys.model_dump(mode="json", exclude_unset=True)
    return dict(_without_secrets({**settings.llamafactory, **keys, "dataflex": {**dataflex, "params": params}}))


def _without_secrets(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {key: _without_secrets(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(each, name) for each in value]
    return "(not shown)" if is_secret(name) and isinstance(value, str) and value else value


def _launches(path: Path, named: str) -> list[Any]:
    """Return the earlier starts of the same run; none of another one, or where the file cannot be read."""
    try:
        earlier = json.loads(path.read_text("utf-8"))
        return list(earlier["launches"]) if earlier["digest"] == named else []
    except (OSError, ValueError, TypeError, KeyError):
        return []


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
    return {"host": platform.node(), "device": f"{device.type}: {name}", "processes": distributed.world()}


def _versions() -> dict[str, str]:
    found = {"dataflex": __version__, "python": sys.version.partition(" ")[0]}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}
