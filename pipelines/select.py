"""`dataflex select`: choose rows once, from the stores, and write them as a dataset that LLaMA-Factory can train on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex import distributed
from dataflex.config.outputs import refuse_unwritable
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError
from dataflex.pipelines.featurize import FeaturizeDirector, begin_to_update, run_until_update
from dataflex.pipelines.selecting.beginning import Begun
from dataflex.pipelines.selecting.update import choose
from dataflex.rows import Rows
from dataflex.schedule import Round
from dataflex.selectors.base import Selection
from dataflex.trainers.directing import DirectedTrainer
from dataflex.whole import replacing

log = logging.getLogger(__name__)

_NO_RECORDS = "tokenized_path: the raw records of a tokenized dataset are unknown; remove the key"


def select(settings: Settings, num: int, output: Path) -> None:
    """Choose `num` rows with the run's method and write them; missing features are computed first.

    Writes `output` (JSON, the raw records with all their fields, best first), an entry for it in the
    `dataset_info.json` beside it, and a Parquet of the same name with `index` (position in the training set),
    `row_key`, `score`, `rank`, `dataset` and `record` (position in that dataset).

    Raises:
        ConfigError: the run file's rows are not records (packed blocks, a tokenized dataset), or `num` is not positive.
        CoverageError: fewer than `num` rows can be chosen.
    """
    if num < 1:
        raise ConfigError(f"--num: found {num}; expected at least 1")
    if output.suffix != ".json":
        raise ConfigError(f"--output: found {output}; expected a name that ends in .json")
    for written in (output, output.with_suffix(".parquet"), output.with_name("dataset_info.json")):
        refuse_unwritable("--output", written)
    if settings.component is None:
        raise ConfigError("component_name: found none; expected a selector, with train_type: dynamic_select")
    arguments = settings.llamafactory
    if arguments.get("stage") == "pt" and arguments.get("packing") is not False:
        raise ConfigError(
            "packing: a packed block is not one record, so it cannot be written as one; set packing: false"
        )
    tokenized = str(arguments.get("tokenized_path") or "")
    if os.path.isdir(tokenized) and os.listdir(tokenized):  # LLaMA-Factory's own rule for a dataset that is there
        raise ConfigError(_NO_RECORDS)
    run_until_update(settings, SelectDirector.verb, partial(_directed, settings, num, output))


def _directed(
    settings: Settings, num: int, output: Path, trainer: DirectedTrainer, checkpoint: str | None
) -> SelectDirector:
    if not trainer.row_sets.raw:
        raise ConfigError(_NO_RECORDS)
    return SelectDirector(begin_to_update(settings, trainer, checkpoint, SelectDirector.verb, num), num, output)


class SelectDirector(FeaturizeDirector):
    """Stops at the first update, with its choice written."""

    verb = "select"

    def __init__(self, begun: Begun, num: int, output: Path):
        super().__init__(begun)
        self.num = num
        self.output = output
        self._found: list[dict[str, Any]] = []

    def at_update(self, round: Round) -> None:
        """Choose and write."""
        raw = self.run.trainer.row_sets.raw
        chosen = choose(self.run, round, self.num)
        selection = chosen.selection
        self._found = [chosen.diagnostics.plain()]
        log.info("%d rows: %s", self.num, chosen.diagnostics)
        if distributed.is_main():
            directory = Path(self.settings.llamafactory.get("dataset_dir") or "data")
            write_selection(self.output, selection, self.run.rows, raw, _entries(directory))
            log.info("wrote %d rows to %s", self.num, self.output)
        distributed.barrier()

    def diagnostics(self) -> list[dict[str, Any]]:
        """Return the record of the one choice."""
        return self._found


def write_selection(
    output: Path, selection: Selection, rows: Rows, raw: Mapping[str, Any], entries: Mapping[str, Any]
) -> None:
    """Write records, their registration and the Parquet.

    Datasets that are registered alike (same columns, formatting and tags) share a file; the records of others go to
    `<stem>_<dataset>.json`, each with an entry of its own.
    """
    chosen = selection.rows
    shapes = {
        name: {k: v for k, v in entries.get(name, {}).items() if k in ("columns", "formatting", "tags")} for name in raw
    }
    groups: dict[str, list[int]] = {}
    for row in chosen.tolist():
        groups.setdefault(json.dumps(shapes[rows.names[rows.dataset[row]]], sort_keys=True), []).append(row)
    registered = {}
    for number, (shape, members) in enumerate(groups.items()):
        stem = output.stem if number == 0 else f"{output.stem}_{rows.names[rows.dataset[members[0]]]}"
        records = [raw[rows.names[rows.dataset[row]]][int(rows.index[row])] for row in members]
        _put(output.with_name(f"{stem}{output.suffix}"), json.dumps(records, indent=1, default=str))
        registered[stem] = {"file_name": f"{stem}{output.suffix}", **json.loads(shape)}
    info = output.with_name("dataset_info.json")
    known = json.loads(info.read_text("utf-8")) if info.is_file() else {}
    _put(info, json.dumps(known | registered, indent=1, ensure_ascii=False))
    scores = np.full(len(chosen), np.nan) if selection.scores is None else np.asarray(selection.scores, np.float64)
    table = pa.table(
        {
            "index": chosen,
            "row_key": pa.array([key.tobytes() for key in rows.keys[chosen]], pa.binary(16)),
            "score": pa.array(scores, pa.float64(), mask=np.isnan(scores)),
            "rank": np.arange(len(chosen)),
            "dataset": pa.array([rows.names[i] for i in rows.dataset[chosen]]),
            "record": rows.index[chosen],
        }
    )
    with replacing(output.with_suffix(".parquet")) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def _entries(directory: Path) -> dict[str, Any]:
    """Return the registrations of the run's datasets; none where they come from a hub."""
    info = directory / "dataset_info.json"
    return json.loads(info.read_text("utf-8")) if info.is_file() else {}


def _put(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")
