"""`dataflex select`: choose rows once, from the stores, and write them as a dataset that LLaMA-Factory can train on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex import distributed
from dataflex.config.outputs import refuse_unwritable
from dataflex.config.paths import dataset_files, names
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError
from dataflex.pipelines.featurize import FeaturizeDirector, begin_to_update, run_until_update
from dataflex.pipelines.selecting.beginning import Begun
from dataflex.pipelines.selecting.update import choose
from dataflex.results.row_map import key_column
from dataflex.rows import Rows
from dataflex.schedule import Round
from dataflex.selectors.base import Selection
from dataflex.trainers.directing import DirectedTrainer
from dataflex.whole import replacing

log = logging.getLogger(__name__)

_NO_RECORDS = "tokenized_path: the raw records of a tokenized dataset are unknown; remove the key"


@dataclass(frozen=True)
class Selected:
    """Rows that were chosen once, best first.

    Attributes:
        table: `index` (position in the training set), `row_key`, `score` (null where the method gives none), `rank`,
            `dataset`, `record` (position in that dataset) and `tokens`, its length.
        records: their raw records with all fields, in that order.
    """

    table: pa.Table
    records: Sequence[Mapping[str, Any]]


def select(settings: Settings, num: int, output: Path | None) -> Selected:
    """Choose `num` rows with the run's method and write them; missing features are computed first.

    Writes `output` (JSON, the raw records with all their fields, best first), an entry for it in the
    `dataset_info.json` beside it, and a Parquet of the same name with the table of `Selected`. None writes nothing.

    Raises:
        ConfigError: the run file's rows are not records (packed blocks, a tokenized dataset), or `num` is not positive.
        CoverageError: fewer than `num` rows can be chosen.
    """
    if num < 1:
        raise ConfigError(f"--num: found {num}; expected at least 1")
    if output is not None:
        _refuse(settings, output)
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
    found: list[Selected] = []
    run_until_update(settings, SelectDirector.verb, partial(_directed, settings, num, output, found))
    return found[0]


def _refuse(settings: Settings, output: Path) -> None:
    """Refuse a name under which the choice cannot be written."""
    if output.suffix != ".json":
        raise ConfigError(f"--output: found {output}; expected a name that ends in .json")
    given = settings.llamafactory
    sets = [name for key in ("dataset", "eval_dataset") for name in names(given.get(key))]
    read = dataset_files([*sets, *settings.dataflex.test_dataset], given.get("dataset_dir") or "data")
    if any(file.resolve() == output.resolve() for files in read.values() for file in files):
        raise ConfigError(f"--output: found {output}, which the run reads its data from; expected another file")
    for written in (output, output.with_suffix(".parquet"), output.with_name("dataset_info.json")):
        refuse_unwritable("--output", written)


def _directed(
    settings: Settings,
    num: int,
    output: Path | None,
    found: list[Selected],
    trainer: DirectedTrainer,
    checkpoint: str | None,
) -> SelectDirector:
    if not trainer.row_sets.raw:
        raise ConfigError(_NO_RECORDS)
    begun = begin_to_update(settings, trainer, checkpoint, SelectDirector.verb, num)
    return SelectDirector(begun, num, output, found)


class SelectDirector(FeaturizeDirector):
    """Stops at the first update, with its choice put into `selected`, and written where there is an output."""

    verb = "select"

    def __init__(self, begun: Begun, num: int, output: Path | None, selected: list[Selected]):
        super().__init__(begun)
        self.num = num
        self.output = output
        self._selected = selected
        self._found: list[dict[str, Any]] = []

    def at_update(self, round: Round) -> None:
        """Choose and write."""
        raw = self.run.trainer.row_sets.raw
        chosen = choose(self.run, round, self.num)
        selection = chosen.selection
        self._found = [chosen.diagnostics.plain()]
        log.info("%d rows: %s", self.num, chosen.diagnostics)
        self._selected.append(selected(selection, self.run.rows, raw))
        if distributed.is_main() and self.output is not None:
            directory = Path(self.settings.llamafactory.get("dataset_dir") or "data")
            write_selection(self.output, self._selected[0], _entries(directory))
            log.info("wrote %d rows to %s", self.num, self.output)
        distributed.barrier()

    def diagnostics(self) -> list[dict[str, Any]]:
        """Return the record of the one choice."""
        return self._found


def selected(selection: Selection, rows: Rows, raw: Mapping[str, Any]) -> Selected:
    """Return what a selection says of the training rows, with their raw records by dataset."""
    chosen = selection.rows
    scores = np.full(len(chosen), np.nan) if selection.scores is None else np.asarray(selection.scores, np.float64)
    table = pa.table(
        {
            "index": chosen,
            "row_key": key_column(rows.keys[chosen]),
            "score": pa.array(scores, pa.float64(), mask=np.isnan(scores)),
            "rank": np.arange(len(chosen)),
            "dataset": pa.array([rows.names[i] for i in rows.dataset[chosen]], pa.string()),
            "record": rows.index[chosen],
            "tokens": rows.length[chosen].astype(np.int64),
        }
    )
    return Selected(table, [raw[rows.names[rows.dataset[row]]][int(rows.index[row])] for row in chosen.tolist()])


def write_selection(output: Path, found: Selected, entries: Mapping[str, Any]) -> None:
    """Write records, their registration and the Parquet.

    Datasets that are registered alike (same columns, formatting and tags) share a file; the records of others go to
    `<stem>_<dataset>.json`, each with an entry of its own.
    """
    names = found.table["dataset"].to_pylist()
    shapes = {
        name: {k: v for k, v in entries.get(name, {}).items() if k in ("columns", "formatting", "tags")}
        for name in dict.fromkeys(names)
    }
    groups: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        groups.setdefault(json.dumps(shapes[name], sort_keys=True), []).append(at)
    registered = {}
    for number, (shape, members) in enumerate(groups.items()):
        stem = output.stem if number == 0 else f"{output.stem}_{names[members[0]]}"
        records = [found.records[at] for at in members]
        _put(output.with_name(f"{stem}{output.suffix}"), json.dumps(records, indent=1, default=str))
        registered[stem] = {"file_name": f"{stem}{output.suffix}", **json.loads(shape)}
    info = output.with_name("dataset_info.json")
    known = json.loads(info.read_text("utf-8")) if info.is_file() else {}
    _put(info, json.dumps(known | registered, indent=1, ensure_ascii=False))
    with replacing(output.with_suffix(".parquet")) as temporary:
        pq.write_table(found.table, temporary, write_page_checksum=True)


def _entries(directory: Path) -> dict[str, Any]:
    """Return the registrations of the run's datasets; none where they come from a hub."""
    info = directory / "dataset_info.json"
    return json.loads(info.read_text("utf-8")) if info.is_file() else {}


def _put(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")
