"""What settings would have chosen out of what a full refresh had at each update, through the functions of a real run.

N training rows, R of them that go on, H of these by their rank, D numbers of a vector.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.refresh import BATCH, POOL, STEPS, UPDATES, WARMUP, Held
from dataflex.config.keys import Refresh
from dataflex.draws import generator
from dataflex.pipelines.selecting.prefilter import Candidates, candidates
from dataflex.pipelines.selecting.refresh import anchors, first, moved, rest
from dataflex.rows import Rows, Text, keys_from
from dataflex.schedule import Round
from dataflex.selectors.base import Context, Selection
from dataflex.selectors.less import Less

LIVE = ("loss", "low loss")
"""Recorded scores that are of the live model, so that the rows kept change and cannot rotate."""
ALL = "all"
"""All target sets together."""


@dataclass
class Update:
    """What one update had.

    Attributes:
        vectors: (N, D) float32, NaN where a row is not usable.
        status: (N,) uint8.
        targets: target set -> its vectors.
        scores: cheap method -> (N,) scores.
        rows: training rows, as far as a method looks at them.
        count: rows chosen.
    """

    vectors: np.ndarray
    status: np.ndarray
    targets: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    rows: Rows
    count: int

    @classmethod
    def read(cls, path: Path) -> Update:
        """Read a file of the recording."""
        with np.load(path, allow_pickle=False) as found:
            size = len(found["status"])
            rows = Rows(
                examples=[],
                keys=keys_from(key.tobytes() for key in found["keys"]),
                dataset=np.zeros(size, np.int32),
                index=np.arange(size),
                length=found["length"],
                supervised=found["supervised"],
                truncated=None,
                names=("pool",),
                dropped=(),
                text=lambda row: Text("", ""),
            )
            return cls(
                found["vectors"].astype(np.float32),
                found["status"],
                {n.removeprefix("target "): found[n].astype(np.float32) for n in found.files if n.startswith("target")},
                {n.removeprefix("score "): found[n] for n in found.files if n.startswith("score ")},
                rows,
                len(found["rows"]),
            )

    def choose(self, held: Held, at: np.ndarray, target: str) -> Selection:
        """Return LESS's choice among some rows, as positions among these.

        Args:
            held: their vectors.
            at: (R,) their positions.
            target: a target set, or `ALL`.
        """
        sets = {n: v for n, v in self.targets.items() if target in (ALL, n)}

        def features(spec: Any, target: str | None = None, state: Any = None, rows: Any = None) -> Any:
            if target is None:
                return held
            vectors = sets[target]
            return Held(vectors, np.zeros(len(vectors), np.uint8), np.zeros(len(vectors), np.int32))

        nothing: Any = dict.fromkeys(sets)
        context = Context(self.rows.take(at), nothing, features, Round(0, "update", 0, 1, 0, 1), 0, 1, [], 0)
        return Less(Less.Params()).select(None, 0, self.count, context=context)


@dataclass
class Setting:
    """One way of computing less than everything, and what it would have computed so far.

    Attributes:
        prefilter: a cheap method, or None.
        keep: share that it keeps.
        tail: share of the rest.
        refresh: of the rows that it keeps.
        updated: (H,) update at which each of these was computed last.
    """

    prefilter: str | None
    keep: float = 1.0
    tail: float = 0.0
    refresh: Refresh = field(default_factory=Refresh)
    updated: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))

    @property
    def name(self) -> str:
        """For the table."""
        parts = [] if self.prefilter is None else [f"{self.prefilter} {self.keep:g}"]
        if self.refresh.policy == "rotating":
            parts.append(f"rotating {self.refresh.refresh_fraction:g}")
        return " + ".join(parts) or "full"

    def choose(self, history: Sequence[Update], target: str) -> tuple[np.ndarray, int, float | None]:
        """Return the rows chosen at the last update of the history, gradients computed, and what it says was lost."""
        update, now = len(history) - 1, history[-1]
        picked = self._candidates(history)
        at, head = picked.rows, np.flatnonzero(~picked.is_tail)
        if self.refresh.policy == "full" or update == 0:
            fresh = np.ones(len(head), bool)
            self.updated = np.full(len(head), update)
        else:
            fresh = first(self.refresh, update, self.updated)
            found = now.choose(self._view(history, at, head, fresh), at, target)
            assert found.pool is not None
            place = np.full(len(at), -1)
            place[head] = np.arange(len(head))
            selected = place[found.rows]
            fresh = rest(self.refresh, fresh, found.pool[head], selected[selected >= 0])
        chosen = now.choose(self._view(history, at, head, fresh), at, target)
        self.updated = np.where(fresh, update, self.updated)
        return at[chosen.rows], int(fresh.sum() + picked.is_tail.sum()), picked.lost(chosen.rows)

    def _candidates(self, history: Sequence[Update]) -> Candidates:
        now = history[-1]
        able = now.rows.supervised > 0
        if self.prefilter is None:
            return Candidates(np.arange(len(able)), np.zeros(len(able), bool), 0.0)
        scores = now.scores[self.prefilter]
        return candidates(scores, now.rows.keys, able, self.keep, self.tail, generator(42, "tail", len(history) - 1))

    def _view(self, history: Sequence[Update], at: np.ndarray, head: np.ndarray, fresh: np.ndarray) -> Held:
        """Join the vectors of now with those of earlier updates, moved along."""
        now, vectors = history[-1], history[-1].vectors[at].copy()
        if not fresh.all():
            fixed = at[head[anchors(self.refresh, len(head))]]
            for update in np.unique(self.updated[~fresh]):
                old = head[~fresh & (self.updated == update)]
                before = history[update].vectors
                shift = moved(now.vectors[fixed], before[fixed])
                values = before[at[old]]
                vectors[old] = np.where(values.any(axis=1, keepdims=True), values + shift, values)
        return Held(vectors, now.status[at], np.zeros(len(at), np.int32))


def on_report(setting: Setting) -> float:
    """Return gradients per trained row on the report's schedule, without targets."""
    tail = setting.tail * (1 - setting.keep) * POOL
    head = setting.keep * POOL
    later = head * (setting.refresh.refresh_fraction if setting.refresh.policy == "rotating" else 1.0)
    return (head + tail + (UPDATES - 1) * (later + tail)) / (BATCH * (WARMUP + UPDATES * STEPS))


def settings_of(args: argparse.Namespace, recorded: Iterable[str]) -> list[Setting]:
    """Return what the table has a line for."""

    def rotating(share: float) -> Refresh:
        return Refresh(policy="rotating", refresh_fraction=share)

    found = [Setting(None), *(Setting(None, refresh=rotating(f)) for f in args.fractions)]
    for name in recorded if args.cheap is None else args.cheap:
        found += [Setting(name, keep, args.tail) for keep in args.keeps]
        if name not in LIVE:
            found += [Setting(name, keep, args.tail, rotating(f)) for keep in args.keeps for f in args.within]
    return found


def table(args: argparse.Namespace) -> str:
    """Return a line per setting: cost on the report's schedule, here, and agreement update by update."""
    history: list[Update] = []
    while (path := args.folder / f"updates/update_{len(history)}.npz").is_file():
        history.append(Update.read(path))
    if not history:
        return f"{args.folder}: no update is recorded yet"
    if args.chosen is not None:
        history = [replace(update, count=args.chosen) for update in history]
    last = history[-1]
    able = int((last.rows.supervised > 0).sum())
    out = [f"{len(last.rows)} rows, {able} with labels, {len(history)} updates of {last.count} rows"]
    sets = [ALL, *(last.targets if len(last.targets) > 1 else ())]
    heads = [f"{'setting':52s} {'report':>7s} {'here':>6s}", *(f"{n[:11]:>11s}" for n in sets)]
    out.append(" ".join([*heads, " least   lost said   lost"]))
    full = {target: [_chosen(Setting(None), history[: n + 1], target) for n in range(len(history))] for target in sets}
    for setting in settings_of(args, last.scores):
        cells, least, here, said, lost = [], 1.0, 0.0, [], []
        for target in sets:
            mine, shares = replace(setting, updated=np.zeros(0, int)), []
            for number in range(len(history)):
                rows, computed, told = mine.choose(history[: number + 1], target)
                shares.append(len(np.intersect1d(rows, full[target][number])) / last.count)
                if target == ALL:
                    here += computed / (last.count * len(history))
                if told is not None:
                    said.append(told)
                    lost.append(_left_out(mine, history[: number + 1], full[target][number]))
            # Everything is computed at the first update where rows rotate, so only the later ones tell.
            shares = shares[1:] if setting.refresh.policy == "rotating" and setting.prefilter is None else shares
            cells.append(f"{np.mean(shares):11.3f}" if shares else f"{'-':>11s}")
            least = min([least, *shares])
        tail = f"{np.mean(said):9.3f} {np.mean(lost):6.3f}" if said else ""
        cells = [f"{setting.name:52s} {on_report(setting):7.1f} {here:6.2f}", *cells, f"{least:6.2f} {tail}"]
        out.append(" ".join(cells))
    return "\n".join(out)


def _chosen(setting: Setting, history: Sequence[Update], target: str) -> np.ndarray:
    return setting.choose(history, target)[0]


def _left_out(setting: Setting, history: Sequence[Update], full: np.ndarray) -> float:
    """Return the share of a full refresh's choice that is not in the head."""
    picked = setting._candidates(history)
    return float((~np.isin(full, picked.rows[~picked.is_tail])).mean())
