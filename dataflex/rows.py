"""What is known about each example once LLaMA-Factory has turned it into tokens. R rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import numpy as np

KEY_DTYPE = np.dtype("V16")
"""One row key: a 128-bit content digest (`dataflex.fingerprint.row_key`)."""


def keys_from(digests: Iterable[bytes]) -> np.ndarray:
    """Return row keys, (N,) of `KEY_DTYPE`, from their 16 bytes each."""
    return np.frombuffer(b"".join(digests), dtype=KEY_DTYPE)


def by_key(keys: np.ndarray) -> np.ndarray:
    """Return the order of rows by (row key, position), (N,)."""
    words = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2)  # two big-endian words sort as their bytes do
    heads = words[:, 0].astype(np.uint64)
    order = np.argsort(heads, kind="stable")
    # Keys are digests, told apart by their first eight bytes; and numbers sort several times faster than text.
    ordered, tails = heads[order], words[order, 1]
    if ((ordered[1:] == ordered[:-1]) & (tails[1:] != tails[:-1])).any():
        return np.lexsort((words[:, 1], words[:, 0]))
    return order


def beginnings(ordered: np.ndarray) -> np.ndarray:
    """Return where each of n distinct keys begins among sorted ones, and in the end how many there are, (n + 1,)."""
    words = ordered.view("S16")  # text of one length compares as the bytes do, and faster than they
    is_first = np.ones(len(words), bool)
    is_first[1:] = words[1:] != words[:-1]
    return np.append(np.flatnonzero(is_first), len(words))


def spread(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay n ranges of positions one after the other: return the range of each, and the position, (sum of counts,)."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) + np.repeat(starts - np.cumsum(counts) + counts, counts)


class Status(IntEnum):
    """Whether the features of a row can be used; only `OK` rows may ever be selected."""

    OK = 0
    NO_LABELS = 1  # no supervised token: the mean loss would be 0 / 0
    NONFINITE = 2  # a loss, embedding or gradient held NaN or infinity


class Text(NamedTuple):
    """What a row says, as people wrote it."""

    prompt: str
    response: str
    system: str = ""
    tools: str = ""

    def whole(self) -> str:
        """Return everything that the model is told and is to say, in that order, one part a line."""
        return "\n".join(part for part in (self.system, self.tools, self.prompt, self.response) if part)


class ProcessedExamples(Protocol):
    """Random access to processed examples: `input_ids`, `labels` and perhaps `attention_mask`."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True, eq=False)  # one is itself alone, so what is known of it can be kept by it
class Rows:
    """A processed dataset in training order; a *row* is a position in it.

    Attributes:
        examples: what the trainer is fed, R long.
        keys: (R,) of `KEY_DTYPE`; identical rows share a key.
        dataset: (R,) int32, position in `names` of the dataset that a row came from.
        index: (R,) int64, position of the row's record in that dataset (of the packed block in a packed dataset).
        length: (R,) int32, tokens.
        supervised: (R,) int32, tokens whose label is not ignored and that have a predecessor.
        truncated: (R,) bool, rows that `cutoff_len` shortened; None where that is not known.
        names: dataset names as the run file lists them.
        dropped: (dataset, index) of each record that LLaMA-Factory's processor refused; None where that is not known.
        text: row -> what it says, for encoders and rewards, which read text.
    """

    examples: ProcessedExamples
    keys: np.ndarray
    dataset: np.ndarray
    index: np.ndarray
    length: np.ndarray
    supervised: np.ndarray
    truncated: np.ndarray | None
    names: Sequence[str]
    dropped: Sequence[tuple[int, int]] | None
    text: Callable[[int], Text]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: np.ndarray) -> Rows:
        """Return some of the rows, in the order given, renumbered from 0."""
        fields = ("keys", "dataset", "index", "length", "supervised")
        arrays = {name: getattr(self, name)[rows] for name in fields}
        arrays["truncated"] = None if self.truncated is None else self.truncated[rows]
        return replace(self, examples=_Taken(self.examples, rows), text=lambda row: self.text(int(rows[row])), **arrays)


@dataclass(frozen=True)
class _Taken:
    examples: ProcessedExamples
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int, /) -> dict[str, Any]:
        return self.examples[int(self.rows[row])]


@dataclass(frozen=True)
class RowSets:
    """What LLaMA-Factory's `get_dataset` returns, and what is known about it: the data of a run.

    Attributes:
        module: the dataset module that LLaMA-Factory's workflow hands to its trainer.
        train: the training rows.
        targets: evaluation sets by name; `eval_dataset` names them, `val_size` makes one named `validation`.
        raw: dataset name -> raw records with all their fields, as loaded.
        tests: the sets that the model is measured on in the end, by name.
    """

    module: dict[str, Any]
    train: Rows
    targets: Mapping[str, Rows]
    raw: Mapping[str, Sequence[Mapping[str, Any]]]
    tests: Mapping[str, Rows] = field(default_factory=dict)
