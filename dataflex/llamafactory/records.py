"""Raw records, loaded by LLaMA-Factory and numbered on the way, so that each row knows where it came from.

N records, R rows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from llamafactory.data import loader
from llamafactory.data.converter import get_dataset_converter

from dataflex.draws import generator
from dataflex.errors import DataflexError
from dataflex.explanation import at_record, explained
from dataflex.llamafactory.columns import unfit
from dataflex.llamafactory.place import Place, place_of
from dataflex.rows import Rows

log = logging.getLogger(__name__)

INDEX, DATASET = "__dataflex_index__", "__dataflex_dataset__"
"""Columns that travel with each record: its position in its dataset, and the dataset's number."""

MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class Sample:
    """Some records of each dataset that stand for all.

    Attributes:
        count: records of a dataset, at most.
        totals: dataset -> records that it would have in the run; filled in as datasets are loaded.
    """

    count: int
    totals: dict[str, int] = field(default_factory=dict)

    def of(self, name: str, dataset: Dataset) -> Dataset:
        """Return the records of a dataset that are looked at, drawn evenly at random, in their order."""
        self.totals[name] = len(dataset)
        if len(dataset) <= self.count:
            return dataset
        return dataset.select(np.sort(generator(0, "sample", name).permutation(len(dataset))[: self.count]))

    def plain(self) -> dict[str, dict[str, int]]:
        """Return by dataset how many records were looked at, and of how many."""
        looked = {name: min(total, self.count) for name, total in self.totals.items()}
        return {"records": looked, "of": dict(self.totals)}

    def scaled(self, rows: Rows) -> int:
        """Return how many rows those that were looked at stand for."""
        counts = np.bincount(rows.dataset, minlength=len(rows.names))
        return round(sum(n * self.factor(name) for n, name in zip(counts.tolist(), rows.names, strict=True)))

    def factor(self, name: str) -> float:
        """Return how many records each that was looked at stands for."""
        total = self.totals.get(name, 0)
        return total / min(total, self.count) if total else 1.0


def load_records(
    names: Sequence[str], first: int, stage: str, *arguments: Any, sample: Sample | None = None
) -> tuple[list[Dataset], list[Dataset]]:
    """Load datasets as LLaMA-Factory does.

    Args:
        names: datasets, none of them twice.
        first: number of the first of them.
        stage: `sft` or `pt`.
        arguments: LLaMA-Factory's model, data and training arguments.
        sample: takes some of each; None: all are taken.

    Returns:
        For each dataset its records in LLaMA-Factory's standard format, with the columns `INDEX` and `DATASET`; and its
        raw records, all of them and with all their fields.

    Raises:
        ConfigError: a dataset is not registered, or not so that it can be loaded.
        UnavailableError: the server that has it does not answer.
        DataflexError: a dataset is empty or cannot be read or converted, has images, videos or audios, or cannot be
            numbered.
    """
    aligned: list[Dataset] = []
    raw: list[Dataset] = []
    for number, name in enumerate(names, first):
        place = place_of(name, arguments[1].dataset_dir)
        with explained(str(place), place.fault), _numbered(place, stage, raw, sample):
            place.check()
            part = loader._get_merged_dataset([name], *arguments, stage, return_dict=True)[name]
        aligned.append(part.add_column(DATASET, np.full(len(part), number, dtype=np.int32)))
    return aligned, raw


@contextlib.contextmanager
def _numbered(place: Place, stage: str, raw: list[Dataset], sample: Sample | None) -> Iterator[None]:
    """Number the records of a dataset as they are loaded, and carry the number through the conversion.

    LLaMA-Factory samples (`num_samples`, `max_samples`) between loading and converting, so the number has to be there
    before, and the conversion removes every column.
    """
    # Patched, not copied: what LLaMA-Factory does between the two stays its own, whatever its version.
    load, align, cloud = loader.load_dataset, loader.align_dataset, loader.read_cloud_json

    def load_numbered(*args: Any, **kwargs: Any) -> Dataset:
        dataset = load(*args, **kwargs)
        if len(dataset) == 0:
            raise DataflexError(f"{place}: found 0 rows; expected at least one")
        raw.append(dataset)
        return dataset.add_column(INDEX, np.arange(len(dataset)))

    def cloud_numbered(path: str) -> list[Any]:
        records = cloud(path)
        raw.append(Dataset.from_list(records))
        return [record | {INDEX: i} for i, record in enumerate(records)]

    def align_numbered(dataset: Dataset, attr: Any, data_args: Any, training_args: Any) -> Dataset:
        if INDEX not in dataset.column_names:
            raise DataflexError(f"{place}: records from {attr.load_from} cannot be numbered; use files or the hub")
        if sample is not None:
            dataset = sample.of(place.name, dataset)
        if (found := unfit(dataset, attr, stage)) is not None:
            raise DataflexError(f"{place}: {found}")
        for kind in MEDIA:
            column = getattr(attr, kind)
            if column and any(bool(value) for value in dataset[column]):
                raise DataflexError(
                    f"{place}: found rows with {kind} (column {column!r}); expected text only: per-example "
                    "features of media are not supported. Leave the column out of dataset_info.json's columns."
                )
        index = column_of(dataset, INDEX)  # aside for the conversion, which keeps no column that it does not know
        convert = get_dataset_converter(attr.formatting, attr, data_args)
        with at_record(dataset, convert, lambda record: place.about(record[INDEX], record)):
            aligned = align(dataset, attr, data_args, training_args)
        if len(empty := _without_prompt(aligned)):
            first = ", ".join(map(str, index[empty[:10]]))
            log.warning(
                "%s: %d records have an empty %s and are used all the same; the first: %s",
                place, len(empty), "text" if stage == "pt" else "prompt", first,
            )  # fmt: skip
        return aligned.add_column(INDEX, index)

    with (
        patch.object(loader, "load_dataset", load_numbered),
        patch.object(loader, "read_cloud_json", cloud_numbered),
        patch.object(loader, "align_dataset", align_numbered),
    ):
        yield


def _without_prompt(aligned: Dataset) -> np.ndarray:
    """Return the positions of records whose last turn before the answer has no text, (N,)."""
    turns = aligned.select_columns(["_prompt"]).with_format("arrow")[:]["_prompt"]
    if not pa.types.is_struct(turns.type.value_type):
        return np.zeros(0, np.int64)  # no turn in any record
    parents = pc.list_parent_indices(turns).to_numpy()
    text = pc.utf8_trim_whitespace(pc.struct_field(pc.list_flatten(turns), "content"))
    is_last = np.append(parents[1:] != parents[:-1], True)[: len(parents)]
    return parents[is_last & pc.equal(pc.fill_null(text, ""), "").to_numpy(zero_copy_only=False)]


def column_of(dataset: Dataset, name: str) -> np.ndarray:
    """Read one column of numbers."""
    # Through Arrow: the NumPy format of `datasets` imports parts of torchvision that newer versions lack.
    table = dataset.select_columns([name]).with_format("arrow")[:]
    return np.asarray(table[name].to_numpy())


def origins(dataset: Dataset) -> np.ndarray:
    """Return one number per row for the pair (dataset, index), (R,) int64; `origin` gives the pair back."""
    return (column_of(dataset, DATASET).astype(np.int64) << 40) | column_of(dataset, INDEX).astype(np.int64)


def origin(number: int) -> tuple[int, int]:
    """Return (dataset, index)."""
    return number >> 40, number & ((1 << 40) - 1)
