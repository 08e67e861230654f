"""Output folders of runs as a training writes them, by the same writers, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataflex.pipelines.selecting.diagnostics import Diagnostics, rank_correlation
from dataflex.results import row_map, texts
from dataflex.results.names import ABOUT, ROWS, SUMMARY, TRAINING_LOG
from dataflex.rows import KEY_DTYPE, Rows, Text
from dataflex.schedule import Round
from dataflex.trainers.journal import Journal
from dataflex.trainers.rounds import DecidedRound
from tests.held import pool

SOURCES = ("letters", "numbers", "words")


def rows_of(count: int, names: Sequence[str] = SOURCES, seed: int = 0) -> Rows:
    """Return rows of several datasets in turn, some of them without labels, one dropped."""
    draw = np.random.default_rng(seed)
    number = (np.arange(count) % len(names)).astype(np.int32)
    length = draw.integers(20, 400, count).astype(np.int32)
    supervised = np.where(np.arange(count) % 17 == 16, 0, length // 2).astype(np.int32)

    def text(row: int) -> Text:
        return Text(f"prompt {row} of {names[row % len(names)]}", f"response {row}", "be brief")

    return replace(
        pool(count),
        keys=np.frombuffer(draw.bytes(16 * count), dtype=KEY_DTYPE),
        dataset=number,
        index=np.arange(count) // len(names),
        length=length,
        supervised=supervised,
        truncated=length > 380,
        names=tuple(names),
        dropped=[(0, count)],
        text=text,
    )


def make_run(
    folder: Path,
    rows: Rows,
    updates: int = 3,
    chosen: int = 24,
    seed: int = 0,
    method: str = "less",
    test: float | None = None,
    keep: int = 500,
    prefers: Callable[[np.ndarray], np.ndarray] = lambda scores: scores,
    **settings: Any,
) -> Path:
    """Write the folder of a run with a warm-up and updates that score every row."""
    draw, journal = np.random.default_rng(seed), Journal(folder / "rounds")
    targets = {"target": rows_of(6, ("target",), seed=99)}
    row_map.write(folder / ROWS, row_map.table(rows, targets, {}))
    eligible = np.flatnonzero(rows.supervised > 0)
    last: np.ndarray | None = None
    of_pool: np.ndarray | None
    liked: np.ndarray | None
    lines: list[dict[str, Any]] = []
    for number in range(updates + 1):
        kind: Literal["update", "warmup"] = "update" if number else "warmup"
        round = Round(number, kind, 4 * number, 4, 0, number)
        if number == 0 or method == "random":
            taken, scores = draw.choice(eligible, chosen), np.full(chosen, np.nan)
            of_pool = liked = None
        else:
            of_pool = np.where(rows.supervised > 0, draw.normal(size=len(rows)) + rows.length / 200, -np.inf)
            liked = np.where(np.isfinite(of_pool), prefers(of_pool), -np.inf)
            taken = draw.permutation(np.argsort(-liked, kind="stable")[:chosen])
            scores = of_pool[taken]
            journal.write_pool(
                number, liked, np.zeros(len(rows), np.int32), of_pool, np.abs(draw.normal(size=len(rows)))
            )
        found = Diagnostics()
        if of_pool is not None:
            usable = np.where(np.isfinite(of_pool), of_pool, np.nan)
            found = Diagnostics(
                scored=int(np.isfinite(of_pool).sum()),
                below_zero=int((of_pool[np.isfinite(of_pool)] < 0).sum()),
                length_correlation=rank_correlation(usable, rows.length),
                overlap=None if last is None else float(np.isin(taken, last).mean()),
            )
        last = taken if number else None
        info: dict[str, Any] = {"method": method, "diagnostics": found.plain()}
        if number:
            info |= {"computed": 10 * number, "reused": 5, "seconds": 2.0 * number, "feature_seconds": 1.0 * number}
        ages = np.full(len(taken), 0 if number else -1, np.int32)
        decided = DecidedRound(round, taken, np.asarray(scores, np.float64), ages, info)
        kept = texts.worth_keeping(keep, rows.dataset, taken, decided.scores, liked)
        texts.write(journal.texts(number), rows, targets, kept, near_of(kept) if number and len(kept) else None)
        journal.write(decided, rows)
        lines.append({"current_steps": 4 * (number + 1), "loss": 3.0 / (number + 1), "lr": 1e-4})
    lines.append({"current_steps": 4 * (updates + 1), "eval_loss": 2.0})
    (folder / TRAINING_LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {
        "verb": "train", "method": method, "train_type": "dynamic_select", "digest": f"{seed:032x}", "global_batch": 6,
        "launches": [{"time": "2026-01-01T00:00:00+00:00", "host": "here"}],
        "settings": {"seed": seed, "component_name": method, "output_dir": str(folder), **settings},
        "model": {"parameters": 1000, "trained": 10}, "machine": {"device": "cpu"}, "versions": {"dataflex": "0"},
        "data": {"train": {"rows": len(rows), "tokens": int(rows.length.sum())}, "targets": {}, "tests": {}},
    }  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(about))
    summary: dict[str, Any] = {"seconds": 10.0, "rows": len(rows), "steps": 4 * (updates + 1), "bytes": 100}
    if test is not None:
        summary["test"] = {"held": {"loss": test, "rows": 5, "tokens": 50, "scored": 5}}
    (folder / SUMMARY).write_text(json.dumps(summary))
    (folder / "status.json").write_text(json.dumps({"state": "finished"}))
    return folder


def near_of(kept: np.ndarray) -> texts.Near:
    """Return two target rows as nearest to every row."""
    shape = (len(kept), 1)
    return texts.Near(
        kept, ["target"], np.zeros((len(kept), 2), np.int64), np.tile([4, 1], shape), np.tile([0.5, 0.25], shape)
    )
