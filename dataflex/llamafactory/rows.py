"""LLaMA-Factory's own preprocessing, run so that every processed row keeps its (dataset, index).

The processors, converters, merge and split are LLaMA-Factory's. What is added: the position of each raw record is
carried along, rows that the processor drops are known by name, each row gets its content key, and the raw records
stay at hand. In stage `pt` with packing, each dataset is packed for itself, so a block never spans two domains.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from llamafactory.data import loader
from llamafactory.data.data_utils import get_dataset_module
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.extras.misc import has_tokenized_data

from dataflex.errors import DataflexError
from dataflex.fingerprint import row_key
from dataflex.llamafactory.texts import DecodedTexts, RecordTexts
from dataflex.rows import KEY_DTYPE, Rows

log = logging.getLogger(__name__)

_INDEX, _DATASET, _KEY, _LENGTH, _SUPERVISED, _TRUNCATED = (
    f"__dataflex_{name}__" for name in ("index", "dataset", "key", "length", "supervised", "truncated")
)
_NOTES = (_INDEX, _DATASET, _KEY, _LENGTH, _SUPERVISED, _TRUNCATED)
_MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class RowSets:
    """What LLaMA-Factory's `get_dataset` returns, and what is known about it.

    Attributes:
        module: the dataset module that LLaMA-Factory's workflow hands to its trainer.
        train: the training rows.
        targets: evaluation sets by name; `eval_dataset` names them, `val_size` makes one named `validation`.
        raw: dataset name -> raw records with all their fields, as loaded.
    """

    module: dict[str, Any]
    train: Rows
    targets: Mapping[str, Rows]
    raw: Mapping[str, Dataset]


class TokenRows:
    """Random access to processed rows with the labels that the collator will make."""

    def __init__(self, dataset: Dataset, pad_token_id: int | None):
        self._dataset = dataset
        self._pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int, /) -> dict[str, Any]:
        example = self._dataset[int(row)]
        return {
            "input_ids": example["input_ids"],
            "labels": _labels(example, self._pad_token_id),
            "attention_mask": example["attention_mask"],
        }


def _labels(example: Mapping[str, Any], pad_token_id: int | None) -> list[int]:
    """Return the example's labels; in stage `pt` those of transformers' causal collator: every token but padding."""
    if "labels" in example:
        return list(example["labels"])
    return [IGNORE_INDEX if token == pad_token_id else token for token in example["input_ids"]]


def load_rows(
    template: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    stage: str,
    tokenizer: Any,
    processor: Any = None,
) -> RowSets:
    """Load and process the run's datasets as LLaMA-Factory's `get_dataset` does, keeping each row's origin.

    Raises:
        DataflexError: a dataset has images, videos or audios, no usable row, or cannot be indexed.
    """
    if data_args.tokenized_path is not None and has_tokenized_data(data_args.tokenized_path):
        return _from_disk(data_args, training_args, tokenizer)
    names = list(dict.fromkeys(data_args.dataset or []))
    targets = list(dict.fromkeys(data_args.eval_dataset or []))
    raw: dict[str, Dataset] = {}
    with training_args.main_process_first(desc="load dataset", local=(not data_args.data_shared_file_system)):
        with _indexed(raw, names + targets):
            train_parts = _load(names, 0, model_args, data_args, training_args, stage)
            target_parts = _load(targets, len(names), model_args, data_args, training_args, stage)
    packed = stage == "pt" and data_args.packing
    if packed and len(train_parts) > 1 and data_args.mix_strategy != "concat":
        raise DataflexError(
            f"mix_strategy: found {data_args.mix_strategy!r}; with packing, blocks are packed within their dataset, so "
            "documents of several datasets cannot be interleaved first. Use mix_strategy: concat, or packing: false."
        )
    with training_args.main_process_first(desc="pre-process dataset", local=(not data_args.data_shared_file_system)):

        def process(dataset: Dataset, is_eval: bool) -> Dataset:
            return _process(dataset, is_eval, data_args, training_args, stage, template, tokenizer, processor)

        eval_raw = None
        if target_parts:
            eval_raw = (
                dict(zip(targets, target_parts, strict=True))
                if data_args.eval_on_each_dataset
                else loader.merge_dataset(target_parts, data_args, seed=training_args.seed)
            )
        merged = loader.merge_dataset(train_parts, data_args, seed=training_args.seed) if train_parts else None
        train_dict, eval_dict = loader.split_dataset(merged, eval_raw, data_args, seed=training_args.seed)
        processed = {
            key: _by_dataset(part, process, is_eval=key != "train") if packed else process(part, is_eval=key != "train")
            for key, part in (train_dict | eval_dict).items()
        }
    if "train" not in processed:
        raise DataflexError("dataset: found none; expected the names of the training datasets")
    notes = {key: _notes(part, names + targets) for key, part in processed.items()}
    fed = {key: part.remove_columns([c for c in _NOTES if c in part.column_names]) for key, part in processed.items()}
    for key, part in (train_dict | eval_dict).items():
        examples = TokenRows(fed[key], tokenizer.pad_token_id)
        if packed:
            notes[key] = replace(notes[key], examples=examples, text=DecodedTexts(examples, tokenizer))
            continue
        before, after = _origins(part), _origins(processed[key])
        kept = set(after)
        dropped = tuple(dict.fromkeys(origin for origin in before if origin not in kept))
        notes[key] = replace(notes[key], examples=examples, dropped=dropped, text=RecordTexts(part, before, after))
    if data_args.tokenized_path is not None and training_args.should_save:
        DatasetDict(fed).save_to_disk(data_args.tokenized_path)
    module = get_dataset_module(DatasetDict(fed))
    sets = {key: rows for key, rows in notes.items() if key != "train"}
    return RowSets(module, notes["train"], _target_sets(sets, targets), raw)


def _target_sets(evaluation: Mapping[str, Rows], targets: Sequence[str]) -> dict[str, Rows]:
    """Split evaluation rows by the dataset that they came from: every evaluation dataset is one target set."""
    if not targets:
        return dict(evaluation)
    out: dict[str, Rows] = {}
    for rows in evaluation.values():
        for number in dict.fromkeys(rows.dataset.tolist()):
            out[rows.names[number]] = rows.take(np.flatnonzero(rows.dataset == number))
    return out


@contextlib.contextmanager
def _indexed(raw: dict[str, Dataset], names: Sequence[str]) -> Iterator[None]:
    """Number the records as they are loaded, and keep them when LLaMA-Factory converts them to its own format.

    LLaMA-Factory samples (`num_samples`, `max_samples`) between loading and converting, so the number has to be
    there before and has to survive the conversion, which removes every column.
    """
    load, align, cloud = loader.load_dataset, loader.align_dataset, loader.read_cloud_json
    pending = iter(names)
    whole: list[Dataset] = []  # as loaded, before sampling

    def numbered(*args: Any, **kwargs: Any) -> Dataset:
        dataset = load(*args, **kwargs)
        if len(dataset) == 0:
            raise DataflexError(
                f"{kwargs.get('data_files') or kwargs.get('path')}: found 0 rows; expected at least one"
            )
        whole.append(dataset)
        return dataset.add_column(_INDEX, np.arange(len(dataset)))

    def numbered_cloud(path: str) -> list[Any]:
        records = cloud(path)
        whole.append(Dataset.from_list(records))
        return [record | {_INDEX: i} for i, record in enumerate(records)]

    def aligned(dataset: Dataset, attr: Any, data_args: Any, training_args: Any) -> Dataset:
        name = next(pending)
        if _INDEX not in dataset.column_names:
            raise DataflexError(
                f"dataset {name}: records from {attr.load_from} cannot be numbered; use files or the HF hub"
            )
        for kind in _MEDIA:
            column = getattr(attr, kind)
            if column and any(bool(value) for value in dataset[column]):
                raise DataflexError(
                    f"dataset {name}: found rows with {kind} (column {column!r}); expected text only: per-example "
                    "features of media are not supported. Leave the column out of dataset_info.json's columns."
                )
        raw[name] = whole.pop()
        index = _column(dataset, _INDEX)
        return align(dataset, attr, data_args, training_args).add_column(_INDEX, index)

    with (
        patch.object(loader, "load_dataset", numbered),
        patch.object(loader, "read_cloud_json", numbered_cloud),
        patch.object(loader, "align_dataset", aligned),
    ):
        yield


def _load(
    names: list[str], first: int, model_args: Any, data_args: Any, training_args: Any, stage: str
) -> list[Dataset]:
    """Load datasets in LLaMA-Factory's standard format, each row with its dataset's number and its own."""
    if not names:
        return []
    loaded = loader._get_merged_dataset(names, model_args, data_args, training_args, stage, return_dict=True)
    return [
        part.add_column(_DATASET, np.full(len(part), first + i, dtype=np.int32))
        for i, part in enumerate(loaded.values())
    ]


def _by_dataset(dataset: Dataset, process: Callable[..., Dataset], is_eval: bool) -> Dataset:
    """Process each dataset's rows for themselves, in the order of the datasets."""
    numbers = _column(dataset, _DATASET)
    parts = [
        process(dataset.select(np.flatnonzero(numbers == n)), is_eval=is_eval) for n in dict.fromkeys(numbers.tolist())
    ]
    return concatenate_datasets(parts)


def _process(
    dataset: Dataset,
    is_eval: bool,
    data_args: Any,
    training_args: Any,
    stage: str,
    template: Any,
    tokenizer: Any,
    processor: Any,
) -> Dataset:
    """Tokenize with LLaMA-Factory's processor and note key, origin, length, supervised tokens and truncation."""
    encoder = loader._get_dataset_processor(data_args, stage, template, tokenizer, processor, do_generate=False)
    whole = replace(encoder, data_args=_unlimited(data_args)) if not (stage == "pt" and data_args.packing) else None
    columns = ("input_ids", "attention_mask") + (("labels", *_MEDIA) if stage == "sft" else ())
    notes = RowNotes(encoder, whole, data_args.cutoff_len, tokenizer.pad_token_id, columns)
    out = dataset.map(
        notes,
        batched=True,
        batch_size=data_args.preprocessing_batch_size,
        remove_columns=dataset.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=(not data_args.overwrite_cache) or (training_args.local_process_index != 0),
        desc="Running tokenizer on dataset",
    )
    if len(out) == 0:
        raise DataflexError(
            f"found no usable row among {len(dataset)} records after preprocessing; expected the format that "
            "dataset_info.json describes (see LLaMA-Factory's data/README.md)"
        )
    if training_args.should_log:
        print("eval example:" if is_eval else "training example:")
        encoder.print_data_example(next(iter(out)))
    return out


def _unlimited(data_args: Any) -> Any:
    """Return the data arguments without a length limit, to see what truncation removed."""
    free = copy.copy(data_args)
    free.cutoff_len = 1 << 30
    return free


@dataclass
class RowNotes:
    """A `datasets.map` function: run the processor record by record and note what is known about each row.

    A packing processor is run on the whole batch, since a block is made of several documents.
    """

    encoder: Any
    whole: Any
    cutoff_len: int
    pad_token_id: int | None
    columns: tuple[str, ...]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Process one batch of aligned records."""
        if self.whole is None:
            out = {key: list(values) for key, values in self.encoder.preprocess_dataset(batch).items()}
            blocks = len(out["input_ids"])
            out[_DATASET], out[_INDEX] = [batch[_DATASET][0]] * blocks, [-1] * blocks
            out[_TRUNCATED] = [False] * blocks
        else:
            out = {name: [] for name in (*self.columns, *_NOTES)}
            for i in range(len(batch["_prompt"])):
                self._one({key: [values[i]] for key, values in batch.items()}, out)
        out |= {note: [] for note in (_KEY, _LENGTH, _SUPERVISED)}
        for i in range(len(out["input_ids"])):
            example = {key: out[key][i] for key in ("input_ids", "labels", "attention_mask") if key in out}
            labels = _labels(example, self.pad_token_id)
            out[_KEY].append(row_key(example["input_ids"], labels, example["attention_mask"]))
            out[_LENGTH].append(len(labels))
            out[_SUPERVISED].append(sum(label != IGNORE_INDEX for label in labels[1:]))
        return out

    def _one(self, record: dict[str, list[Any]], out: dict[str, list[Any]]) -> None:
        rows = self.encoder.preprocess_dataset(record)
        if not rows.get("input_ids"):
            return
        for key, values in rows.items():
            out.setdefault(key, []).extend(values)
        length = len(rows["input_ids"][0])
        cut = length >= self.cutoff_len and len(self.whole.preprocess_dataset(record)["input_ids"][0]) > length
        for note, value in ((_DATASET, record[_DATASET][0]), (_INDEX, record[_INDEX][0]), (_TRUNCATED, cut)):
            out.setdefault(note, []).append(value)


def _notes(dataset: Dataset, names: Sequence[str]) -> Rows:
    """Read the note columns into arrays."""
    keys = np.frombuffer(b"".join(dataset[_KEY][:]), dtype=KEY_DTYPE)
    number, index = _column(dataset, _DATASET).astype(np.int32), _column(dataset, _INDEX).astype(np.int64)
    if len(index) and index[0] == -1:  # packed: a block is known by its position within its dataset
        index = np.concatenate([np.arange((number == n).sum()) for n in dict.fromkeys(number.tolist())])
    return Rows(
        TokenRows(dataset, None),
        keys,
        number,
        index,
        _column(dataset, _LENGTH).astype(np.int32),
        _column(dataset, _SUPERVISED).astype(np.int32),
        _column(dataset, _TRUNCATED).astype(bool),
        tuple(names),
        (),
        lambda row: ("", ""),
    )


def _column(dataset: Dataset, name: str) -> np.ndarray:
    """Read one column of numbers."""
    # Through Arrow: the NumPy format of `datasets` imports parts of torchvision that newer versions lack.
    table = dataset.select_columns([name]).with_format("arrow")[:]
    return np.asarray(table[name].to_numpy())


def _origins(dataset: Dataset) -> list[tuple[int, int]]:
    """Return (dataset, index) of each row."""
    return list(zip(_column(dataset, _DATASET).tolist(), _column(dataset, _INDEX).tolist(), strict=True))


def _from_disk(data_args: Any, training_args: Any, tokenizer: Any) -> RowSets:
    """Rows of a tokenized dataset that LLaMA-Factory saved earlier; their records are no longer known."""
    log.info("loading the tokenized dataset at %s; its raw records are unknown", data_args.tokenized_path)
    module = get_dataset_module(load_from_disk(data_args.tokenized_path))
    evaluation = module.get("eval_dataset")
    sets = evaluation if isinstance(evaluation, dict) else {"validation": evaluation} if evaluation is not None else {}

    def known(dataset: Dataset, name: str) -> Rows:
        rows = TokenRows(dataset, tokenizer.pad_token_id)
        examples = [rows[i] for i in range(len(rows))]
        keys = b"".join(row_key(e["input_ids"], e["labels"], e["attention_mask"]) for e in examples)
        return Rows(
            rows,
            np.frombuffer(keys, dtype=KEY_DTYPE),
            np.zeros(len(rows), np.int32),
            np.arange(len(rows)),
            np.array([len(e["labels"]) for e in examples], np.int32),
            np.array([sum(x != IGNORE_INDEX for x in e["labels"][1:]) for e in examples], np.int32),
            np.zeros(len(rows), bool),
            (name,),
            (),
            DecodedTexts(rows, tokenizer),
        )

    train = known(module["train_dataset"], str(data_args.tokenized_path))
    return RowSets(module, train, {name: known(part, name) for name, part in sets.items()}, {})
