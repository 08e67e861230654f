"""Signs that a run is not what it seems: text that is lost in its tokens, rows cut short, a model that guesses.

Each function looks at one of them and returns what to tell the user, or None. Nothing is refused: each has a harmless
case. docs/diagnostics.md lists them.

R rows.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

SAMPLE = 100
"""Rows whose text is looked at, evenly spaced."""
_MOST_CHARACTERS = 20_000  # looked at of a text
_UNKNOWN = 0.01  # share of tokens
_TRUNCATED = 0.5  # share of rows
_GUESSING = 0.9  # of ln V, the loss of a model that draws tokens at random


def loss_warning(mean: float, vocabulary: int, where: str) -> str | None:
    """Say that a model does hardly better than drawing tokens at random, or gives no number.

    Args:
        mean: nats per supervised token.
        vocabulary: V, tokens that the model can predict.
        where: of which rows or step the mean is.
    """
    most = _GUESSING * math.log(vocabulary)
    if mean < most:
        return None
    return (
        f"the mean supervised loss of {where} is {mean:.2f} nats; expected well below {most:.2f}, nine tenths of what "
        f"guessing among {vocabulary} tokens costs. Check that model, tokenizer and template belong together: decode a "
        "few rows and look at them"
    )


def unknown_warning(unknown: int, tokens: int, tokenizer: Any) -> str | None:
    """Say that too many tokens of the text are the unknown token."""
    if unknown <= _UNKNOWN * tokens:
        return None
    return (
        f"{unknown} of {tokens} tokens of the text ({unknown / tokens:.0%}) are the unknown token "
        f"{tokenizer.unk_token!r}; expected at most {_UNKNOWN:.0%}. The tokenizer is not the model's, or was saved "
        "wrongly; use the files that came with the model"
    )


def unknown_in_texts(texts: Sequence[str], tokenizer: Any) -> tuple[int, int]:
    """Count unknown tokens and tokens of plain text: what a template adds is not in it, nor is padding.

    Of many byte-level tokenizers the unknown token also ends or pads texts; where the text itself spells it, it counts
    as known.
    """
    unknown = tokens = 0
    for text in texts:
        ids = tokenizer.encode(text[:_MOST_CHARACTERS], add_special_tokens=False)
        tokens += len(ids)
        if tokenizer.unk_token_id is not None:
            spelled = text[:_MOST_CHARACTERS].count(tokenizer.unk_token)
            unknown += max(0, ids.count(tokenizer.unk_token_id) - spelled)
    return unknown, tokens


def unknown_in_tokens(examples: Sequence[Any], tokenizer: Any, ignored: int) -> tuple[int, int]:
    """Count unknown tokens and tokens inside supervised spans, of rows whose text is not known.

    The last token of a span is the template's and does not count: it may be the one that is also the unknown token.

    Args:
        examples: with `input_ids` and `labels`.
        tokenizer: the run's.
        ignored: label of a token that is not supervised.
    """
    unknown = tokens = 0
    for example in examples:
        is_supervised = np.append(np.asarray(example["labels"]) != ignored, False)
        inside = np.asarray(example["input_ids"])[is_supervised[:-1] & is_supervised[1:]]
        tokens += len(inside)
        unknown += int((inside == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
    return unknown, tokens


def text_warning(texts: Sequence[str], tokenizer: Any) -> str | None:
    """Say that texts do not come back from their tokens.

    They are compared after NFKC, which many tokenizers apply, and without leading blanks, which others add or drop.
    """
    lost = [(text, back) for text in texts if (back := _back(text[:_MOST_CHARACTERS], tokenizer)) is not None]
    if not lost:
        return None
    before, after = _where_they_part(lost[0][0], lost[0][1])
    return (
        f"the supervised text of {len(lost)} of {len(texts)} rows does not come back from its tokens: {before!r} comes "
        f"back as {after!r}. The model is trained on the latter; the tokenizer was saved wrongly, or is made for other "
        "text"
    )


def length_warning(name: str, lengths: np.ndarray, truncated: np.ndarray, cutoff_len: int) -> str | None:
    """Say that `cutoff_len` cuts most rows.

    Args:
        name: what the rows are called.
        lengths: (R,) tokens.
        truncated: (R,) bool, rows that `cutoff_len` shortened.
        cutoff_len: tokens of a row, at most.
    """
    cut, rows = int(np.sum(truncated)), len(lengths)
    if rows == 0 or not cut:
        return None
    if rows > 1 and lengths.min() == lengths.max():
        found = f"all {rows} rows of {name} have the same length, {lengths[0]} tokens, {cut} of them as truncated"
    elif cut > _TRUNCATED * rows:
        found = f"{cut} of {rows} rows of {name} are truncated"
    else:
        return None
    return (
        f"{found} by cutoff_len {cutoff_len}; expected at most half. What is cut off is neither learned nor compared; "
        "raise cutoff_len, or shorten the rows"
    )


def _back(text: str, tokenizer: Any) -> str | None:
    """Return a text after encoding and decoding, as it is compared, if that differs from the text; else None."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    back = _compared(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return None if back == _compared(text) else back


def _compared(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lstrip(" ")


def _where_they_part(text: str, back: str) -> tuple[str, str]:
    """Return the surroundings of the first difference."""
    text = _compared(text)
    same = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    start = max(0, same - 15)
    return text[start : same + 15], back[start : same + 25]
