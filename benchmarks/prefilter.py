"""How far a choice behind a prefilter is that of a full refresh at the same state of the model, and what it costs.

`record` runs the real trainer with LESS, which computes every row's gradient at every update and trains on the choice
of this full refresh; what each update had is kept, cheap scores beside it: gradients as stored, and the scores of
methods that need no gradient. `table` asks, for any number of settings, what each would have chosen out of these values
at each update, through the functions that `dataflex train` uses, and how much of it the full refresh chose as well:
with all target sets together, and with each alone. `plan` prints what `dataflex plan` counts on the schedule of the
DataFlex report. A recording that was stopped goes on where it was: steps from the newest checkpoint, features from
their store.

python -m benchmarks.prefilter record FOLDER --model MODEL --template smollm2 --pool POOL.json --target a.json b.json
python -m benchmarks.prefilter table FOLDER
python -m benchmarks.prefilter plan
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field

from benchmarks.refresh import BATCH, POOL, STEPS, UPDATES, WARMUP, Held
from dataflex.config.keys import Refresh
from dataflex.draws import generator
from dataflex.pipelines.selecting.prefilter import Candidates, candidates
from dataflex.pipelines.selecting.refresh import anchors, first, moved, rest
from dataflex.rows import Rows, Text, keys_from
from dataflex.schedule import Round
from dataflex.selectors.base import Context, NativeSelector, Need, Selection
from dataflex.selectors.embedding import Embedding, RdsPlus
from dataflex.selectors.less import Less
from dataflex.selectors.loss import ByLoss, Ifd

CHEAP: dict[str, tuple[type[NativeSelector], dict[str, Any]]] = {
    "rds_plus": (RdsPlus, {}),
    "embedding": (Embedding, {}),
    "embedding, whitened": (Embedding, {"similarity": "whitened_cosine"}),
    "embedding, position weighted": (Embedding, {"pooling": "position_weighted"}),
    "embedding, position weighted, whitened": (
        Embedding,
        {"pooling": "position_weighted", "similarity": "whitened_cosine"},
    ),
    "loss of the base": (ByLoss, {"mode": "topk_high", "model": "base"}),
    "low loss of the base": (ByLoss, {"mode": "topk_low", "model": "base"}),
    "loss": (ByLoss, {"mode": "topk_high"}),
    "low loss": (ByLoss, {"mode": "topk_low"}),
    "ifd": (Ifd, {}),
}
"""Methods that need no gradient; the last but one pair is of the live model."""
LIVE = ("loss", "low loss")
ALL = "all"


def method(name: str) -> NativeSelector:
    """Return a cheap method."""
    made, params = CHEAP[name]
    return made(made.Params(**params))


class Recorded(Less):
    """LESS that keeps what each update had."""

    class Params(Less.Params):
        """Parameters of the recording."""

        output: str = Field(description="folder for a file per update")
        cheap: tuple[str, ...] = Field(tuple(CHEAP), description="cheap methods whose scores are kept")
        drive: tuple[str, float, float, float] | None = Field(
            None, description="method, keep, tail and rotating share whose choice is trained on; default: full refresh"
        )

    def needs(self) -> list[Need]:
        """Need what LESS does, and what the cheap methods do, so that it is computed in the same passes."""
        return list(dict.fromkeys([*super().needs(), *(n for name in self.params.cheap for n in method(name).needs())]))

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Return the choice of a full refresh, or of what drives."""
        found = super().select(model, step_id, num_samples, context=context, **kwargs)
        term = self.parts.representation.terms()[0]  # type: ignore[union-attr]
        view: Any = context.features(term.train)
        values = {"vectors": view.dense().astype(np.float16), "status": view.status, "rows": found.rows}
        values |= {f"target {n}": _dense(context.features(term.target, n)) for n in context.targets}
        for name in self.params.cheap:
            scored = method(name).select(model, step_id, 1, context=replace(context, history=()), **kwargs)
            assert isinstance(scored, Selection)
            assert scored.pool is not None
            values[f"score {name}"] = scored.pool
        values |= {"keys": np.stack([np.frombuffer(key.tobytes(), np.uint8) for key in context.rows.keys])}
        values |= {"supervised": context.rows.supervised, "length": context.rows.length}
        folder = Path(self.params.output)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"update_{context.update}.npz"
        np.savez(path.with_suffix(".part.npz"), **values)
        path.with_suffix(".part.npz").rename(path)
        return found if self.params.drive is None else self._driven(folder, context.update)

    def _driven(self, folder: Path, update: int) -> Selection:
        """Return the choice of the setting that drives, out of what was recorded so far."""
        name, keep, tail, share = self.params.drive
        setting = Setting(name, keep, tail, Refresh(policy="rotating", refresh_fraction=share))
        history = [Update.read(folder / f"update_{number}.npz") for number in range(update + 1)]
        for number in range(update + 1):
            rows, _, _ = setting.choose(history[: number + 1], ALL)
        return Selection(rows)


def _dense(view: Any) -> np.ndarray:
    found: np.ndarray = view.dense()
    return found.astype(np.float16)


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
    paths = sorted(args.folder.glob("updates/update_?.npz"))
    history = [Update.read(path) for path in paths]
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


def record(args: argparse.Namespace) -> None:
    """Run the training whose updates are recorded."""
    from dataflex.config import load
    from dataflex.pipelines.train import train
    from examples.quickstart.pool import write_datasets

    data = args.folder / "data"
    if not data.is_dir():
        pool = json.loads(args.pool.read_text("utf-8"))
        pool = random.Random(args.seed).sample(pool, min(args.rows, len(pool)))
        targets = {path.stem: json.loads(path.read_text("utf-8"))[: args.of_each] for path in args.target}
        write_datasets(data, {"pool": pool, **targets})
    values = {
        "model_name_or_path": str(args.model),
        "template": args.template,
        "dataset_dir": str(data),
        "dataset": "pool",
        "eval_dataset": ",".join(path.stem for path in args.target),
        "cutoff_len": args.cutoff,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": 8,
        "per_device_train_batch_size": args.batch,
        "learning_rate": args.rate,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": args.steps,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(args.folder / "out"),
        "seed": args.seed,
        "train_type": "dynamic_select",
        "warmup_step": args.warmup,
        "update_step": args.steps,
        "update_times": args.updates,
        "component_name": "benchmarks.prefilter:Recorded",
        "dataflex": {
            "store": str(args.folder / "store"),
            "token_budget": args.budget,
            "fragment_rows": 64,
            "params": {"proj_dim": args.width, "output": str(args.folder / "updates"), "cheap": args.cheap},
        },
    }
    path = args.folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    begun, cpu = time.monotonic(), time.process_time()
    train(load(path))
    print(f"{time.monotonic() - begun:.0f} s, {time.process_time() - cpu:.0f} CPU-s", flush=True)


def planned(folder: Path, model: Path, template: str, sample: int) -> str:
    """Return what `dataflex plan` counts on the schedule of the DataFlex report, a line per way of computing less."""
    from dataflex.config import load
    from dataflex.pipelines.plan import plan
    from examples.quickstart.pool import write_datasets

    rows = [{"instruction": f"What is {n} + 1?", "input": "", "output": str(n + 1)} for n in range(POOL)]
    write_datasets(folder / "data", {"pool": rows, "target": rows[:20]})
    values = {
        "model_name_or_path": str(model),
        "template": template,
        "cache_dir": str(folder / "cache"),
        "dataset_dir": str(folder / "data"),
        "dataset": "pool",
        "eval_dataset": "target",
        "cutoff_len": 64,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "output_dir": str(folder / "out"),
        "train_type": "dynamic_select",
        "warmup_step": WARMUP,
        "update_step": STEPS,
        "update_times": UPDATES,
        "component_name": "less",
    }
    rotating, keep = {"policy": "rotating", "refresh_fraction": 0.07}, {"method": "rds_plus", "keep": 0.2}
    ways = {
        "refresh: full": {},
        "refresh: {policy: rotating, refresh_fraction: 0.07}": {"refresh": rotating},
        "prefilter: {method: rds_plus, keep: 0.2}": {"prefilter": keep},
        "prefilter: {method: rds_plus, keep: 0.03, tail: 0.01}": {"prefilter": {**keep, "keep": 0.03, "tail": 0.01}},
        "prefilter: {method: rds_plus, keep: 0.2}, and rotating 0.07": {"prefilter": keep, "refresh": rotating},
    }
    out = [f"{'':60s} {'gradients':>10s} {'a trained row':>14s} {'a chosen row':>13s}"]
    for name, keys in ways.items():
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(values | {"dataflex": {"store": str(folder / "store"), **keys}}), "utf-8")
        found = plan(load(path), sample)["totals"]
        each = f"{found['gradients_per_trained_row']:14.1f} {found['gradients_per_chosen_row']:13.1f}"
        out.append(f"{name:60s} {found['gradients']:10d} {each}")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("record")
    one.add_argument("folder", type=Path, help="for everything; a recording in it goes on")
    one.add_argument("--model", type=Path, required=True)
    one.add_argument("--template", required=True)
    one.add_argument("--pool", type=Path, required=True, help="records in alpaca's form")
    one.add_argument("--target", type=Path, nargs="+", required=True, help="records of a target set each")
    one.add_argument("--cheap", nargs="+", choices=tuple(CHEAP), default=list(CHEAP), help="ifd takes two passes more")
    one.add_argument("--of-each", type=int, default=20, help="rows of a target set")
    one.add_argument("--rows", type=int, default=600, help="of the pool, drawn at random")
    one.add_argument("--updates", type=int, default=6)
    one.add_argument("--batch", type=int, default=5)
    one.add_argument("--steps", type=int, default=6, help="between updates; with the batch, the rows chosen")
    one.add_argument("--warmup", type=int, default=18, help="steps, best a multiple of --steps")
    one.add_argument("--rate", type=float, default=2e-4)
    one.add_argument("--cutoff", type=int, default=512)
    one.add_argument("--width", type=int, default=8192, help="numbers per gradient")
    one.add_argument("--budget", type=int, default=2048, help="tokens of a batch of features")
    one.add_argument("--seed", type=int, default=42)
    two = verbs.add_parser("table")
    two.add_argument("folder", type=Path)
    two.add_argument("--cheap", nargs="*", choices=tuple(CHEAP), help="default: those recorded")
    two.add_argument("--keeps", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    two.add_argument("--chosen", type=int, help="rows that each would choose; default: as many as were trained on")
    two.add_argument("--tail", type=float, default=0.02)
    two.add_argument("--fractions", type=float, nargs="*", default=[0.05, 0.1, 0.2], help="rotating in the whole pool")
    two.add_argument("--within", type=float, nargs="*", default=[0.1, 0.5], help="rotating in what is kept")
    three = verbs.add_parser("plan")
    three.add_argument("--model", type=Path, default=Path("examples/quickstart/model"), help="any; it is named alone")
    three.add_argument("--template", default="qwen3_nothink")
    three.add_argument("--sample", type=int, default=1000, help="records that the plan looks at")
    args = parser.parse_args()
    if args.verb == "record":
        args.folder.mkdir(parents=True, exist_ok=True)
        record(args)
    elif args.verb == "table":
        print(table(args))
    else:
        with tempfile.TemporaryDirectory(prefix="dataflex-prefilter-") as name:
            print(planned(Path(name), args.model, args.template, args.sample))


if __name__ == "__main__":
    main()
