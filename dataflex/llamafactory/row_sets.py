"""The run's rows: LLaMA-Factory's own preprocessing, with every row keeping its (dataset, index).

Loading, converting, merging, splitting and tokenizing are LLaMA-Factory's. In stage `pt` with packing, each dataset is
packed for itself, so a block never spans two domains.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict
from llamafactory.data import loader
from llamafactory.data.data_utils import get_dataset_module

from dataflex import distributed
from dataflex.errors import DataflexError
from dataflex.explanation import explained
from dataflex.fingerprint import row_key
from dataflex.llamafactory import tokenized
from dataflex.llamafactory.place import place_of
from dataflex.llamafactory.processing import (
    KEY,
    LENGTH,
    NOTES,
    SUPERVISED,
    TRUNCATED,
    Processing,
    RecordSource,
    labels_of,
    labels_of_tokens,
    supervised_each,
)
from dataflex.llamafactory.provenance import made_from
from dataflex.llamafactory.records import DATASET, INDEX, Sample, column_of, load_records, origin, origins
from dataflex.llamafactory.sanity import judge_records
from dataflex.llamafactory.texts import DecodedTexts, RecordTexts
from dataflex.rows import Rows, RowSets, keys_from

log = logging.getLogger(__name__)

_AT_A_TIME = 1000
"""Rows whose tokens are read together."""


class TokenRows:
    """Random access to processed rows with the labels that the collator will make."""

    def __init__(self, dataset: Dataset, pad_token_id: int | None):
        self._dataset = dataset
        self._pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int, /) -> dict[str, Any]:
        example = self._dataset[int(row)]
        labels = labels_of(example, self._pad_token_id)
        return {"input_ids": example["input_ids"], "labels": labels, "attention_mask": example["attention_mask"]}


def load_rows(
    template: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    stage: str,
    tokenizer: Any,
    processor: Any = None,
    sample: Sample | None = None,
) -> RowSets:
    """Load and process the run's datasets as LLaMA-Factory's `get_dataset` does; the arguments are the same.

    With `sample`, some records of each dataset stand for all; nothing is saved then.

    Raises:
        DataflexError: a dataset is empty, has images, videos or audios, cannot be numbered, or gives no usable row;
            datasets are to be interleaved and packed; a tokenized dataset cannot be read or written.
        MismatchError: a tokenized dataset was made under other settings.
    """
    path = data_args.tokenized_path
    made = made_from(stage, data_args, training_args.seed, tokenizer) if path is not None else {}
    if path is not None and tokenized.is_there(path):
        return _tokenized_before(data_args, tokenizer, made)
    names, targets = (list(dict.fromkeys(given or [])) for given in (data_args.dataset, data_args.eval_dataset))
    if not names:
        raise DataflexError("dataset: found none; expected the names of the training datasets")
    processing = Processing(stage, data_args, training_args, template, tokenizer, processor)
    if processing.is_packed and len(names) > 1 and data_args.mix_strategy != "concat":
        raise DataflexError(
            f"mix_strategy: found {data_args.mix_strategy!r}; with packing, blocks are packed within their dataset, so "
            "documents of several datasets cannot be interleaved first. Use mix_strategy: concat, or packing: false."
        )
    # The first process fills the caches of `datasets`, which the others of the node then read.
    one_at_a_time = {"local": not data_args.data_shared_file_system}
    with distributed.together(), training_args.main_process_first(desc="load dataset", **one_at_a_time):
        given = stage, model_args, data_args, training_args
        train_parts, train_raw = load_records(names, 0, *given, sample=sample)
        target_parts, target_raw = load_records(targets, len(names), *given, sample=sample)
    first = training_args.main_process_first(desc="pre-process dataset", **one_at_a_time)
    with distributed.together(), first, explained(f"datasets {', '.join(names + targets)}"):
        evaluation: Any = None
        # As LLaMA-Factory does: one set for each dataset, or all in one; `_target_sets` parts the latter again.
        if target_parts and data_args.eval_on_each_dataset:
            evaluation = dict(zip(targets, target_parts, strict=True))
        elif target_parts:
            evaluation = loader.merge_dataset(target_parts, data_args, seed=training_args.seed)
        merged = loader.merge_dataset(train_parts, data_args, seed=training_args.seed)
        train, rest = loader.split_dataset(merged, evaluation, data_args, seed=training_args.seed)
        records = {**train, **rest}
        sources = [
            RecordSource(place_of(name, data_args.dataset_dir), dataset)
            for name, dataset in zip(names + targets, train_raw + target_raw, strict=True)
        ]
        noted = {key: processing.rows(part, key != "train", sources) for key, part in records.items()}
        judge_records(records["train"], tokenizer)
    fed = {key: part.remove_columns([c for c in NOTES if c in part.column_names]) for key, part in noted.items()}
    sets = {key: _rows(noted[key], fed[key], records[key], processing, names + targets) for key in records}
    if path is not None and sample is None and training_args.should_save:
        tokenized.save(path, DatasetDict(fed), made, sets)
    raw = dict(zip(names + targets, train_raw + target_raw, strict=True))
    return RowSets(get_dataset_module(DatasetDict(fed)), sets.pop("train"), _target_sets(sets, targets), raw)


def load_tests(
    names: Sequence[str],
    template: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    stage: str,
    tokenizer: Any,
    processor: Any = None,
    sample: Sample | None = None,
) -> dict[str, Rows]:
    """Load and process datasets that a run is measured on, each for itself, as its evaluation datasets are.

    The other arguments are those of `load_rows`.

    Raises:
        DataflexError: as `load_rows`.
    """
    processing = Processing(stage, data_args, training_args, template, tokenizer, processor)
    first = training_args.main_process_first(desc="load tests", local=not data_args.data_shared_file_system)
    with distributed.together(), first, explained(f"datasets {', '.join(names)}"):
        parts, raw = load_records(names, 0, stage, model_args, data_args, training_args, sample=sample)
        sources = [RecordSource(place_of(n, data_args.dataset_dir), each) for n, each in zip(names, raw, strict=True)]
        noted = [processing.rows(part, True, sources) for part in parts]
    return {
        name: _rows(rows, rows.remove_columns([c for c in NOTES if c in rows.column_names]), part, processing, names)
        for name, rows, part in zip(names, noted, parts, strict=True)
    }


def _rows(noted: Dataset, fed: Dataset, records: Dataset, processing: Processing, names: Sequence[str]) -> Rows:
    """Read the notes into arrays."""
    examples = TokenRows(fed, processing.tokenizer.pad_token_id)
    number, index = column_of(noted, DATASET).astype(np.int32), column_of(noted, INDEX).astype(np.int64)
    dropped: list[tuple[int, int]] = []
    text: Any = DecodedTexts(examples, processing.tokenizer)
    if processing.is_packed:
        index = np.concatenate([np.arange((number == n).sum()) for n in dict.fromkeys(number.tolist())])
    else:
        # Processors drop records without a word; what has an origin before and none after is lost.
        before, after = origins(records), origins(noted)
        dropped = [origin(int(lost)) for lost in np.setdiff1d(before, after)]
        text = RecordTexts(records, before, after)
    return Rows(
        examples=examples,
        keys=keys_from(noted[KEY][:]),
        dataset=number,
        index=index,
        length=column_of(noted, LENGTH).astype(np.int32),
        supervised=column_of(noted, SUPERVISED).astype(np.int32),
        truncated=column_of(noted, TRUNCATED).astype(bool),
        names=tuple(names),
        dropped=dropped,
        text=text,
    )


def _target_sets(evaluation: Mapping[str, Rows], targets: Sequence[str]) -> dict[str, Rows]:
    """Split evaluation rows by the dataset that they came from: every evaluation dataset is one target set."""
    if not targets:
        return dict(evaluation)
    out: dict[str, Rows] = {}
    for rows in evaluation.values():
        for number in dict.fromkeys(rows.dataset.tolist()):
            dropped = [lost for lost in rows.dropped or () if lost[0] == number]
            out[rows.names[number]] = replace(rows.take(np.flatnonzero(rows.dataset == number)), dropped=dropped)
    return out


def _tokenized_before(data_args: Any, tokenizer: Any, made: dict[str, Any]) -> RowSets:
    """Return the rows of a tokenized dataset that was saved earlier; their records are no longer known.

    Raises:
        DataflexError: LLaMA-Factory saved it, with several evaluation datasets in one.
    """
    path, targets = str(data_args.tokenized_path), made["eval_dataset"]
    log.info("loading the tokenized dataset at %s; its raw records are unknown", path)
    found, about = tokenized.load(path, made)
    if about is None and len(targets) > 1 and not data_args.eval_on_each_dataset:
        raise DataflexError(
            f"tokenized_path: found {len(targets)} evaluation datasets; a tokenized dataset that DataFlex did not make "
            "does not tell which row came from which. Name one, set eval_on_each_dataset: true, or remove the folder"
        )
    module = get_dataset_module(found)
    sets = {"train": module["train_dataset"]}
    evaluation = module.get("eval_dataset")
    if isinstance(evaluation, dict):
        sets |= {f"validation_{name}": part for name, part in evaluation.items()}
    elif evaluation is not None:
        sets["validation"] = evaluation
    rows = {name: _plain(part, path if name == "train" else name, tokenizer) for name, part in sets.items()}
    if about is not None:
        rows = {name: tokenized.described(part, about, name, path) for name, part in rows.items()}
        return RowSets(module, rows.pop("train"), _target_sets(rows, targets), {})
    return RowSets(module, rows.pop("train"), {n.removeprefix("validation_"): part for n, part in rows.items()}, {})


def _plain(dataset: Dataset, name: str, tokenizer: Any) -> Rows:
    """Return rows of which only the tokens are known; they count as one dataset of the given name."""
    keys: list[bytes] = []
    lengths, counts = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    wanted = [column for column in ("input_ids", "labels", "attention_mask") if column in dataset.column_names]
    for table in dataset.select_columns(wanted).with_format("arrow").iter(_AT_A_TIME):
        found = {column: _flat(table.column(column)) for column in wanted}
        tokens, sizes = found["input_ids"]
        if "labels" not in found:
            found["labels"] = labels_of_tokens(tokens, tokenizer.pad_token_id), sizes
        keys += map(row_key, *(_parts(*found[column]) for column in ("input_ids", "labels", "attention_mask")))
        lengths.append(found["labels"][1].astype(np.int32))
        counts.append(supervised_each(*found["labels"]).astype(np.int32))
    examples = TokenRows(dataset, tokenizer.pad_token_id)
    return Rows(
        examples=examples,
        keys=keys_from(keys),
        dataset=np.zeros(len(keys), np.int32),
        index=np.arange(len(keys)),
        length=np.concatenate(lengths),
        supervised=np.concatenate(counts),
        truncated=None,
        names=(name,),
        dropped=None,
        text=DecodedTexts(examples, tokenizer),
    )


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return a column of lists as all their numbers, int64, and the size of each list, int64."""
    whole = column.combine_chunks()
    whole = pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole
    return whole.flatten().to_numpy(zero_copy_only=False).astype(np.int64), whole.value_lengths().to_numpy().astype(
        np.int64
    )


def _parts(numbers: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Return views of the numbers of each list."""
    ends = np.cumsum(sizes).tolist()
    return [numbers[start:end] for start, end in zip([0, *ends], ends, strict=False)]
