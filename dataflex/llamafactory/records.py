"""Raw records, loaded by LLaMA-Factory and numbered on the way, so that each row knows where it came from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
from datasets import Dataset
from llamafactory.data import loader

from dataflex.errors import DataflexError

INDEX, DATASET = "__dataflex_index__", "__dataflex_dataset__"
"""Columns that travel with each record: its position in its dataset, and the dataset's number."""

MEDIA = ("images", "videos", "audios")


def load_records(names: Sequence[str], first: int, stage: str, *arguments: Any) -> tuple[list[Dataset], list[Dataset]]:
    """Load datasets as LLaMA-Factory does.

    Args:
        names: datasets, none of them twice.
        first: number of the first of them.
        stage: `sft` or `pt`.
        arguments: LLaMA-Factory's model, data and training arguments.

    Returns:
        For each dataset its records in LLaMA-Factory's standard format, with the columns `INDEX` and `DATASET`; and its
        raw records, all of them and with all their fields.

    Raises:
        DataflexError: a dataset is empty, has images, videos or audios, or cannot be numbered.
    """
    if not names:
        return [], []
    with _numbered(names) as raw:
        loaded = loader._get_merged_dataset(list(names), *arguments, stage, return_dict=True)
    numbers = [np.full(len(part), first + i, dtype=np.int32) for i, part in enumerate(loaded.values())]
    aligned = [part.add_column(DATASET, column) for part, column in zip(loaded.values(), numbers, strict=True)]
    return aligned, raw


@contextlib.contextmanager
def _numbered(names: Sequence[str]) -> Iterator[list[Dataset]]:
    """Number the records as they are loaded, and carry the number through the conversion.

    LLaMA-Factory samples (`num_samples`, `max_samples`) between loading and converting, so the number has to be there
    before, and the conversion removes every column.
    """
    load, align, cloud = loader.load_dataset, loader.align_dataset, loader.read_cloud_json
    pending = iter(names)
    raw: list[Dataset] = []

    def load_numbered(*args: Any, **kwargs: Any) -> Dataset:
        dataset = load(*args, **kwargs)
        if len(dataset) == 0:
            where = kwargs.get("data_files") or kwargs.get("path")
            raise DataflexError(f"{where}: found 0 rows; expected at least one")
        raw.append(dataset)
        return dataset.add_column(INDEX, np.arange(len(dataset)))

    def cloud_numbered(path: str) -> list[Any]:
        records = cloud(path)
        raw.append(Dataset.from_list(records))
        return [record | {INDEX: i} for i, record in enumerate(records)]

    def align_numbered(dataset: Dataset, attr: Any, data_args: Any, training_args: Any) -> Dataset:
        name = next(pending)
        if INDEX not in dataset.column_names:
            raise DataflexError(
                f"dataset {name}: records from {attr.load_from} cannot be numbered; use files or the hub"
            )
        for kind in MEDIA:
            column = getattr(attr, kind)
            if column and any(bool(value) for value in dataset[column]):
                raise DataflexError(
                    f"dataset {name}: found rows with {kind} (column {column!r}); expected text only: per-example "
                    "features of media are not supported. Leave the column out of dataset_info.json's columns."
                )
        index = column_of(dataset, INDEX)
        return align(dataset, attr, data_args, training_args).add_column(INDEX, index)

    with (
        patch.object(loader, "load_dataset", load_numbered),
        patch.object(loader, "read_cloud_json", cloud_numbered),
        patch.object(loader, "align_dataset", align_numbered),
    ):
        yield raw


def column_of(dataset: Dataset, name: str) -> np.ndarray:
    """Read one column of numbers."""
    # Through Arrow: the NumPy format of `datasets` imports parts of torchvision that newer versions lack.
    table = dataset.select_columns([name]).with_format("arrow")[:]
    return np.asarray(table[name].to_numpy())


def origins(dataset: Dataset) -> np.ndarray:
    """Return one number per row that stands for (dataset, index), (R,) int64; `origin` takes it apart."""
    return (column_of(dataset, DATASET).astype(np.int64) << 40) | column_of(dataset, INDEX).astype(np.int64)


def origin(number: int) -> tuple[int, int]:
    """Return (dataset, index)."""
    return number >> 40, number & ((1 << 40) - 1)
