"""The text of a row, for encoders that have a tokenizer of their own. N records, R rows."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import numpy as np
from llamafactory.extras.constants import IGNORE_INDEX

from dataflex.rows import ProcessedExamples, Text


class RecordTexts:
    """Texts of the records themselves, so that no template, tokenizer, `cutoff_len` or default system prompt matters.

    Of a conversation, the last answer is the response and all before it, but the system prompt, the prompt.

    Args:
        records: in LLaMA-Factory's standard format.
        origins: (dataset, index) of each of them as one number, (N,).
        rows: the same of each row, (R,).
    """

    def __init__(self, records: Any, origins: np.ndarray, rows: np.ndarray):
        self._records = records
        self._origins = origins
        self._rows = rows

    @cached_property
    def _at(self) -> np.ndarray:
        """(R,) the record of each row."""
        order = np.argsort(self._origins, kind="stable")
        return order[np.searchsorted(self._origins, self._rows, sorter=order)]

    def __call__(self, row: int) -> Text:
        """Return what a row says."""
        record = self._records[int(self._at[row])]
        prompt = "\n".join(turn["content"] for turn in record["_prompt"])
        response = "\n".join(turn["content"] for turn in record["_response"])
        return Text(prompt, response, _written(record["_system"]), _written(record["_tools"]))


class DecodedTexts:
    """Texts decoded from tokens and split by the label mask, for rows without a record; system and tools are prompt."""

    def __init__(self, examples: ProcessedExamples, tokenizer: Any):
        self._examples = examples
        self._tokenizer = tokenizer

    def __call__(self, row: int) -> Text:
        """Return what a row says."""
        example = self._examples[row]
        ids, is_prompt = np.asarray(example["input_ids"]), np.asarray(example["labels"]) == IGNORE_INDEX
        parts = [
            self._tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True) for mask in (is_prompt, ~is_prompt)
        ]
        return Text(parts[0], parts[1])


def _written(value: Any) -> str:
    """Return a field of a record as text; tools may be text, or the list that it would spell."""
    if not value or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
