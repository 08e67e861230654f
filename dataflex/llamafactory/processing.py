"""LLaMA-Factory's processors, run so that what is known about each row is noted beside its tokens."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from llamafactory.data import loader
from llamafactory.extras.constants import IGNORE_INDEX

from dataflex.errors import DataflexError
from dataflex.explanation import at_record, explained
from dataflex.fingerprint import row_key
from dataflex.llamafactory.place import Place
from dataflex.llamafactory.records import DATASET, INDEX, MEDIA, column_of

KEY, LENGTH, SUPERVISED, TRUNCATED = (f"__dataflex_{name}__" for name in ("key", "length", "supervised", "truncated"))
log = logging.getLogger(__name__)

NOTES = (INDEX, DATASET, KEY, LENGTH, SUPERVISED, TRUNCATED)
"""Columns beside the tokens, taken off before a trainer sees the rows."""


class RecordSource(NamedTuple):
    """A dataset: where it comes from, and its raw records."""

    place: Place
    raw: Dataset

    def about(self, index: int) -> str:
        """Return which record this is, what is odd about it, and how it begins."""
        return self.place.about(index, self.raw[index])


@dataclass(frozen=True)
class Processing:
    """How records become rows.

    Attributes:
        stage: `sft` or `pt`.
        data_args: LLaMA-Factory's data arguments.
        training_args: its training arguments.
        template: its template.
        tokenizer: the run's tokenizer.
        processor: the run's multimodal processor, or None.
    """

    stage: str
    data_args: Any
    training_args: Any
    template: Any
    tokenizer: Any
    processor: Any

    @property
    def is_packed(self) -> bool:
        """Whether a row is a block made of several documents."""
        return self.stage == "pt" and bool(self.data_args.packing)

    def rows(self, records: Dataset, is_eval: bool, sources: Sequence[RecordSource]) -> Dataset:
        """Return the rows with `NOTES`; blocks are packed within their dataset, dataset after dataset.

        Args:
            records: in LLaMA-Factory's standard format, with `DATASET` and `INDEX`.
            is_eval: whether they are evaluation rows.
            sources: the datasets, by number.

        Raises:
            DataflexError: not one record gives a row, or one cannot be made into a row.
        """
        if not self.is_packed:
            return self._map(records, is_eval, sources)
        # Each dataset for itself: a block of two datasets would have no domain that a mixer could give a share.
        numbers = column_of(records, DATASET)
        parts = [records.select(np.flatnonzero(numbers == n)) for n in dict.fromkeys(numbers.tolist())]
        return concatenate_datasets([self._map(part, is_eval, sources) for part in parts])

    def noting(self) -> Noting:
        """Return the function that turns a batch of records into rows with `NOTES`."""
        args = self.data_args
        encoder = loader._get_dataset_processor(
            args, self.stage, self.template, self.tokenizer, self.processor, do_generate=False
        )
        # Truncation drops what it cuts; only the same processor without a limit tells how long a row would be.
        free = copy.copy(args)
        free.cutoff_len = 1 << 30
        columns = ("input_ids", "attention_mask") + (("labels", *MEDIA) if self.stage == "sft" else ())
        whole = None if self.is_packed else replace(encoder, data_args=free)
        return Noting(encoder, whole, args.cutoff_len, self.tokenizer.pad_token_id, columns)

    def _map(self, records: Dataset, is_eval: bool, sources: Sequence[RecordSource]) -> Dataset:
        args, noting = self.data_args, self.noting()
        of_these = dict.fromkeys(column_of(records, DATASET).tolist())
        places = ", ".join(str(sources[number].place) for number in of_these)
        one = partial(_alone, noting)
        with explained(places), at_record(records, one, lambda record: sources[record[DATASET]].about(record[INDEX])):
            rows = records.map(
                noting,
                batched=True,
                batch_size=args.preprocessing_batch_size,
                remove_columns=records.column_names,
                num_proc=args.preprocessing_num_workers,
                load_from_cache_file=(not args.overwrite_cache) or (self.training_args.local_process_index != 0),
                desc="Running tokenizer on dataset",
            )
        if len(rows) == 0:
            found = f"found no usable row among {len(records)} records"
            if self.is_packed:
                raise DataflexError(f"{places}: {found}; expected at least cutoff_len tokens in all, for one block")
            first = records[0]
            raise DataflexError(f"{found}; {sources[first[DATASET]].about(first[INDEX])}")
        if self.training_args.should_log and log.isEnabledFor(logging.DEBUG):
            print("eval example:" if is_eval else "training example:")
            noting.encoder.print_data_example(next(iter(rows)))
        return rows


def _alone(noting: Noting, record: Mapping[str, Any]) -> None:
    noting({key: [value] for key, value in record.items()})


@dataclass
class Noting:
    """A `datasets.map` function: run the processor record by record and note what is known about each row.

    A packing processor is run on the whole batch, since a block is made of several documents.

    Attributes:
        encoder: LLaMA-Factory's processor.
        whole: the same without a length limit, to see what truncation removed; None if it packs.
        cutoff_len: tokens of a row, at most.
        pad_token_id: what the causal collator does not train on.
        columns: the columns that the processor makes.
    """

    encoder: Any
    whole: Any
    cutoff_len: int
    pad_token_id: int | None
    columns: tuple[str, ...]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Process one batch of records."""
        if self.whole is None:
            out = {key: list(values) for key, values in self.encoder.preprocess_dataset(batch).items()}
            blocks = len(out["input_ids"])
            # A block has no record of its own: rows are numbered within their dataset when all are made.
            out |= {DATASET: [batch[DATASET][0]] * blocks, INDEX: [-1] * blocks, TRUNCATED: [False] * blocks}
        else:
            out = {name: [] for name in (*self.columns, INDEX, DATASET, TRUNCATED)}
            for i in range(len(batch["_prompt"])):
                self._one({key: [values[i]] for key, values in batch.items()}, out)
        out |= {note: [] for note in (KEY, LENGTH, SUPERVISED)}
        for i in range(len(out["input_ids"])):
            example = {key: out[key][i] for key in ("input_ids", "labels", "attention_mask") if key in out}
            labels = labels_of(example, self.pad_token_id)
            out[KEY].append(row_key(example["input_ids"], labels, example["attention_mask"]))
            out[LENGTH].append(len(labels))
            out[SUPERVISED].append(supervised(labels))
        return out

    def _one(self, record: dict[str, list[Any]], out: dict[str, list[Any]]) -> None:
        rows = self.encoder.preprocess_dataset(record)
        if not rows.get("input_ids"):
            return  # dropped
        for key, values in rows.items():
            out.setdefault(key, []).extend(values)
        length = len(rows["input_ids"][0])
        # Only a row that fills the limit can have been cut, so nearly all rows are processed once.
        cut = length >= self.cutoff_len and len(self.whole.preprocess_dataset(record)["input_ids"][0]) > length
        for note, value in ((DATASET, record[DATASET][0]), (INDEX, record[INDEX][0]), (TRUNCATED, cut)):
            out[note].append(value)


def labels_of(example: Mapping[str, Any], pad_token_id: int | None) -> list[int]:
    """Return the example's labels; in stage `pt` those of transformers' causal collator: every token but padding."""
    if "labels" in example:
        return list(example["labels"])
    return [IGNORE_INDEX if token == pad_token_id else token for token in example["input_ids"]]


def labels_of_tokens(tokens: np.ndarray, pad_token_id: int | None) -> np.ndarray:
    """Return the labels that `labels_of` gives an example of these tokens alone."""
    return tokens if pad_token_id is None else np.where(tokens == pad_token_id, IGNORE_INDEX, tokens)


def supervised_each(labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return what `supervised` counts in each of several examples, (R,), whose labels stand one after the other.

    Args:
        labels: of all.
        sizes: (R,) labels of each.
    """
    counted = labels != IGNORE_INDEX
    ends = np.cumsum(sizes)
    first = (ends - sizes)[sizes > 0]
    counted[first] = False
    before = np.concatenate([[0], np.cumsum(counted)])
    found: np.ndarray = before[ends] - before[ends - sizes]
    return found


def supervised(labels: list[int]) -> int:
    """Count the labels that are trained on; the first token has no predecessor, so it is never one."""
    return sum(label != IGNORE_INDEX for label in labels[1:])
