"""What some rows of a round say, and which target rows are nearest to them. k rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.rows import Rows
from dataflex.whole import replacing

LONGEST = 2000
"""Characters of a prompt, or of a response, that are kept."""
_ENDS = 25
"""Rows from the top, and from the bottom, that are always kept."""
SCHEMA = pa.schema(
    [
        ("set", pa.string()),
        ("index", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("nearest", pa.list_(pa.struct([("set", pa.string()), ("index", pa.int64()), ("cosine", pa.float32())]))),
    ]
)
"""Columns: `set` and `index` are those of the row map, `set` null of training rows; a text that was cut ends in `…`.

`nearest` has, for a training row, the target rows whose feature points most nearly where its own does, best first, over
all target sets; null where the method compares rows with no target. Target rows that are named there follow as rows.
"""


@dataclass(frozen=True)
class Near:
    """The target rows that are nearest to some training rows.

    Attributes:
        rows: (k,) the training rows.
        sets: names of target sets.
        at: (k, n) which of `sets`, best first.
        index: (k, n) the row of it.
        cosine: (k, n).
    """

    rows: np.ndarray
    sets: Sequence[str]
    at: np.ndarray
    index: np.ndarray
    cosine: np.ndarray

    def of(self) -> dict[int, list[dict[str, object]]]:
        """Return what is nearest to each training row, as plain data."""
        lines = zip(self.rows.tolist(), self.at.tolist(), self.index.tolist(), self.cosine.tolist(), strict=True)
        return {
            row: [
                {"set": self.sets[s], "index": i, "cosine": c} for s, i, c in zip(at, index, cosine, strict=True)
            ]
            for row, at, index, cosine in lines
        }  # fmt: skip


def worth_keeping(
    most: int, sources: np.ndarray, chosen: np.ndarray, scores: np.ndarray, pool: np.ndarray | None
) -> np.ndarray:
    """Return rows of a round whose text is worth keeping: all that were chosen, if they are not too many.

    Otherwise the best of them, and of every source alike some of the rest, evenly over their ranks. In any case the
    worst of the pool beside them.

    Args:
        most: rows, at most, of those chosen.
        sources: (N,) the dataset of every training row.
        chosen: (c,) rows in training order, repetitions allowed.
        scores: (c,) their scores, NaN where there are none.
        pool: (N,) how much the method prefers every training row, not finite where it cannot be chosen; None where
            that is not known: then scores tell which rows are best.

    Returns:
        (k,) distinct rows.
    """
    if most == 0:
        return np.empty(0, np.int64)
    distinct, first = np.unique(chosen, return_index=True)
    if len(distinct) > most:
        ranked = distinct[ranking(scores[first] if pool is None else pool[distinct])]
        best = ranked[: min(_ENDS, (most + 1) // 2)]
        rest = ranked[len(best) :]
        shares = [rest[sources[rest] == source] for source in np.unique(sources[rest])]
        share = -(-(most - len(best)) // len(shares))
        turns = [_evenly(part, share) for part in shares]
        # In turn, so that what is cut off in the end is cut off from all.
        others = [part[i] for i in range(share) for part in turns if i < len(part)][: most - len(best)]
        distinct = np.union1d(best, np.asarray(others, np.int64))
    if pool is None:
        return distinct
    worst = ranking(pool)[: np.isfinite(pool).sum()][::-1]
    return np.union1d(distinct, worst[: min(_ENDS, most)])


def ranking(preference: np.ndarray) -> np.ndarray:
    """Return the order of rows from the best to the worst, (n,): equal ones as they stand, those without last.

    Compared as they are recorded, in float32.
    """
    shown = np.asarray(preference, np.float32).astype(np.float64)
    return np.argsort(-np.where(np.isfinite(shown), shown, -np.inf), kind="stable")


def _evenly(ranked: np.ndarray, most: int) -> np.ndarray:
    return ranked[np.linspace(0, len(ranked) - 1, min(len(ranked), most)).round().astype(np.int64)]


def write(path: Path, train: Rows, targets: Mapping[str, Rows], kept: np.ndarray, near: Near | None) -> None:
    """Write what rows say, whole or not at all.

    Args:
        path: of the file.
        train: training rows.
        targets: target sets by name.
        kept: (k,) training rows.
        near: what is nearest to some of them, or None.
    """
    nearest = {} if near is None else near.of()
    named = dict.fromkeys((n["set"], n["index"]) for row in kept.tolist() for n in nearest.get(row, ()))
    lines = [_line(None, row, train) | {"nearest": nearest.get(row)} for row in kept.tolist()]
    lines += [_line(str(name), int(str(row)), targets[str(name)]) for name, row in named]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), temporary, compression="zstd")


def _line(name: str | None, row: int, rows: Rows) -> dict[str, object]:
    text = rows.text(row)
    prompt = "\n".join(part for part in (text.system, text.tools, text.prompt) if part)
    return {"set": name, "index": row, "prompt": _cut(prompt), "response": _cut(text.response)}


def _cut(text: str) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a pair of surrogates is no text that can be written
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
