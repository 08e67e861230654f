"""The text of a row, for encoders that have a tokenizer of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from llamafactory.extras.constants import IGNORE_INDEX

from dataflex.rows import Examples


class RecordTexts:
    """Prompt and response as the record has them, so neither template nor tokenizer nor `cutoff_len` matters.

    Of a conversation, the last answer is the response and all before it the prompt.

    Args:
        aligned: records in LLaMA-Factory's standard format.
        origins: (dataset, index) of each of them.
        rows: (dataset, index) of each row.
    """

    def __init__(self, aligned: Any, origins: Sequence[tuple[int, int]], rows: Sequence[tuple[int, int]]):
        self._aligned = aligned
        self._origins = origins
        self._rows = rows

    @cached_property
    def _at(self) -> dict[tuple[int, int], int]:
        return {origin: position for position, origin in enumerate(self._origins)}

    def __call__(self, row: int) -> tuple[str, str]:
        """Return (prompt, response)."""
        record = self._aligned[self._at[self._rows[row]]]
        prompt = "\n".join(turn["content"] for turn in record["_prompt"])
        return prompt, "\n".join(turn["content"] for turn in record["_response"])


class DecodedTexts:
    """Prompt and response decoded from the tokens and split by the label mask, where there is no record to ask."""

    def __init__(self, examples: Examples, tokenizer: Any):
        self._examples = examples
        self._tokenizer = tokenizer

    def __call__(self, row: int) -> tuple[str, str]:
        """Return (prompt, response)."""
        example = self._examples[row]
        ids, is_prompt = np.asarray(example["input_ids"]), np.asarray(example["labels"]) == IGNORE_INDEX
        parts = [
            self._tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True) for mask in (is_prompt, ~is_prompt)
        ]
        return parts[0], parts[1]
