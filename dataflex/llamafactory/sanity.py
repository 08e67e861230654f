"""Warnings about what a run is going to train on, by the signs of `dataflex.signs`; rank 0 alone looks."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
from llamafactory.data import loader
from llamafactory.extras.constants import IGNORE_INDEX

from dataflex import distributed
from dataflex.llamafactory.processing import LENGTH, TRUNCATED, Processing
from dataflex.llamafactory.records import DATASET, INDEX, MEDIA
from dataflex.rows import Rows
from dataflex.signs import (
    SAMPLE,
    length_warning,
    text_warning,
    unknown_in_texts,
    unknown_in_tokens,
    unknown_warning,
)
from dataflex.trainers.first_step import FirstStepJudged

log = logging.getLogger(__name__)

TRAINERS = {"sft": "CustomSeq2SeqTrainer", "pt": "CustomTrainer"}
"""LLaMA-Factory's trainers whose loss is a mean over supervised tokens, by stage."""


def judge_records(records: Any, tokenizer: Any) -> None:
    """Look at the text of records in LLaMA-Factory's standard format, a dataset or a stream."""
    if not distributed.is_main():
        return
    turns = [_turns(record) for record in sample(records)]
    whole = ["\n".join(text for _, text in each) for each in turns]
    answers = ["\n".join(text for is_answer, text in each if is_answer) for each in turns]
    # In stage pt there is no answer, and all of the text is supervised.
    supervised = [answer or text for answer, text in zip(answers, whole, strict=True)]
    _warn(unknown_warning(*unknown_in_texts(whole, tokenizer), tokenizer), text_warning(supervised, tokenizer))


def judge_rows(train: Rows, targets: Iterable[tuple[str, Rows]], data_args: Any, is_packed: bool) -> None:
    """Look at how many rows `cutoff_len` cuts; blocks are packed to that length, so of them nothing is said."""
    if not distributed.is_main() or is_packed:
        return
    sets = [("the training set", train), *((f"target set {name}", rows) for name, rows in targets)]
    known = [(name, rows.length, rows.truncated) for name, rows in sets if rows.truncated is not None]
    _warn(*(length_warning(*about, data_args.cutoff_len) for about in known))


def judge_tokens(examples: Any, tokenizer: Any, stage: str, train_on_prompt: bool) -> None:
    """Look at rows whose records are not known, by their tokens.

    Nothing is said if the unknown token is also the one that ends texts, and ends are supervised like the rest: then
    tokens do not tell an end from a lost word.
    """
    if not distributed.is_main():
        return
    is_special = tokenizer.unk_token_id in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
    if is_special and (stage == "pt" or train_on_prompt):
        return
    found = [{"labels": each["input_ids"], **each} for each in sample(examples)]
    _warn(unknown_warning(*unknown_in_tokens(found, tokenizer, IGNORE_INDEX), tokenizer))


def judge_untouched(processing: Processing, records: Any) -> None:
    """Look at the text of records that LLaMA-Factory processes itself, and at the lengths of their rows."""
    judge_records(records, processing.tokenizer)
    is_plain = processing.stage in ("sft", "pt") and not processing.data_args.packing
    some = sample(records) if distributed.is_main() and is_plain else []
    if not some or any(record.get(f"_{kind}") for record in some for kind in MEDIA):
        return
    batch = {key: [record[key] for record in some] for key in some[0]}
    rows = processing.noting()({**batch, DATASET: [0] * len(some), INDEX: list(range(len(some)))})
    lengths, truncated = np.array(rows[LENGTH]), np.array(rows[TRUNCATED])
    name = f"the {len(some)} looked at" if len(some) == SAMPLE else "the training set"
    _warn(length_warning(name, lengths, truncated, processing.data_args.cutoff_len))


@contextlib.contextmanager
def judged(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Look at the rows and the first step's loss of a training that is LLaMA-Factory's own, in any stage."""
    process, stage = loader._get_preprocessed_dataset, str(arguments["stage"])
    parts, fields = inspect.signature(process), inspect.signature(Processing).parameters
    looked_at: list[Processing] = []

    def processed(*args: Any, **kwargs: Any) -> Any:
        rows, given = process(*args, **kwargs), parts.bind(*args, **kwargs).arguments
        if rows is not None and not given.get("is_eval", False):
            about: dict[str, Any] = {name: given.get(name) for name in fields}
            looked_at.append(Processing(**about))
            judge_untouched(looked_at[-1], given["dataset"])
        return rows

    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(loader, "_get_preprocessed_dataset", processed))
        if stage in TRAINERS:
            workflow = importlib.import_module(f"llamafactory.train.{stage}.workflow")
            get = workflow.get_dataset

            def get_dataset(
                template: Any, model_args: Any, data_args: Any, training_args: Any, stage: str, **kwargs: Any
            ) -> Any:
                module = get(template, model_args, data_args, training_args, stage, **kwargs)
                if not looked_at and "train_dataset" in module:  # tokenized before
                    judge_tokens(module["train_dataset"], kwargs["tokenizer"], stage, data_args.train_on_prompt)
                return module

            bases: Any = FirstStepJudged, getattr(workflow, TRAINERS[stage])
            trainer = type("Judged", bases, {"is_new": bool(arguments.get("train_from_scratch"))})
            patches.enter_context(patch.object(workflow, "get_dataset", get_dataset))
            patches.enter_context(patch.object(workflow, TRAINERS[stage], trainer))
        yield


def sample(rows: Any) -> list[Any]:
    """Return up to `SAMPLE` rows, evenly spaced; the first of a stream."""
    if not hasattr(rows, "__len__"):
        return list(rows.take(SAMPLE))
    size = len(rows)
    return [rows[int(i)] for i in np.unique(np.arange(min(SAMPLE, size)) * size // min(SAMPLE, max(1, size)))]


def _turns(record: Any) -> Sequence[tuple[bool, str]]:
    """Return (is an answer, text) of every turn of a record."""
    turns = [*record["_prompt"], *record["_response"]]
    return [(turn["role"] in ("assistant", "function"), turn["content"]) for turn in turns if turn["content"]]


def _warn(*found: str | None) -> None:
    for text in filter(None, found):
        log.warning("%s", text)
