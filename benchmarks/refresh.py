"""What a refresh policy costs, and how far its selections are those of a full refresh.

One run of the real trainer with LESS. At every update all features are computed, and each policy is asked what it would
choose at this very state of the model, out of values that it would have computed at this update or has from earlier
ones, through the functions that `dataflex train` uses. One of them, `--drive`, decides what is trained on. Agreement is
the share of its k rows that a full refresh chooses too, over the updates after the first, at which all agree.

Two variants say what the parts of `rotating` are worth: without moving reused vectors along with the anchors, and with
the scores of the last update in place of those by reused vectors and the targets of now.

python -m benchmarks.refresh --rows 1200 --csv refresh.csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field

from benchmarks.lora_run import LORA
from dataflex.config.keys import Refresh
from dataflex.pipelines.selecting.refresh import anchors, first, moved, rest
from dataflex.selectors.base import Context, Selection
from dataflex.selectors.less import Less

POOL, UPDATES, STEPS, WARMUP, BATCH = 100_000, 30, 50, 100, 8
"""The schedule of the DataFlex report (arXiv 2603.26164): rows, updates, steps of each, warm-up steps, global batch."""


@dataclass(frozen=True)
class Held:
    """A feature of R rows in memory, as `dataflex.selectors.base.View`; NaN where a row is not usable."""

    vectors: np.ndarray
    status: np.ndarray
    ages: np.ndarray

    def blocks(self, size: int = 4096, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all usable rows in their order."""
        usable = np.array_split(np.flatnonzero(np.isfinite(self.vectors).all(axis=1)), part[1])[part[0]]
        for start in range(0, len(usable), size):
            yield usable[start : start + size], self.vectors[usable[start : start + size]]


@dataclass
class Policy:
    """One policy and what it would have done so far.

    Attributes:
        name: for the table.
        refresh: the run file's `dataflex.refresh`.
        moves: whether reused vectors are moved along with the anchors.
        rescores: whether rows are judged by reused vectors and the targets of now, or by their last scores.
        updated: (N,) update at which it computed each row last.
        selection: its last selection.
    """

    name: str
    refresh: Refresh
    moves: bool = True
    rescores: bool = True
    updated: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    selection: Selection | None = None

    def choose(self, history: Sequence[Any], select: Any) -> Selection:
        """Choose at the update that the last entry of the history is of.

        Args:
            history: the training rows' view of each update.
            select: view -> selection, with the targets of now.
        """
        update = len(history) - 1
        if self.selection is None:
            self.updated = np.zeros(len(history[0].status), dtype=int)
            self.selection = select(history[0])
        elif self.refresh.policy != "static":  # which keeps the first update's values, targets included
            fresh = first(self.refresh, update, self.updated)
            if self.refresh.policy == "rotating":
                found = select(self._view(history, fresh)) if self.rescores else self.selection
                assert found.pool is not None
                fresh = rest(self.refresh, fresh, found.pool, found.rows)
            self.selection = select(self._view(history, fresh))
            self.updated = np.where(fresh, update, self.updated)
        return self.selection

    def _view(self, history: Sequence[Any], fresh: np.ndarray) -> Held:
        """Join the values of now with those of earlier updates."""
        now, updated = history[-1], np.where(fresh, len(history) - 1, self.updated)
        vectors, fixed = now.vectors.copy(), anchors(self.refresh, len(fresh))
        for update in np.unique(updated[updated < len(history) - 1]):
            at, before = updated == update, history[update].vectors
            shift = moved(now.vectors[fixed], before[fixed]) if self.moves else 0
            vectors[at] = np.where(before[at].any(axis=1, keepdims=True), before[at] + shift, before[at])
        return Held(vectors, now.status, (len(history) - 1 - updated).astype(np.int32))


class Comparison(Less):
    """LESS that asks every policy what it would choose, and writes down how they agree with `full`."""

    class Params(Less.Params):
        """Parameters of the comparison."""

        output: str = Field(description="file for one JSON line per policy and update")
        fractions: tuple[float, ...] = Field(description="shares of the pool that `rotating` is tried with")
        variants: tuple[float, ...] = Field((), description="shares for which the parts of `rotating` are left out too")
        drive: float = Field(1.0, description="share whose selection is trained on; 1: that of a full refresh")

    def __init__(self, params: Params):
        super().__init__(params)
        self.history: list[Held] = []
        self.policies = [Policy("full", Refresh()), Policy("static", Refresh(policy="static"))]
        for f in params.fractions:
            self.policies.append(Policy(f"rotating {f:g}", Refresh(policy="rotating", refresh_fraction=f)))
        for f in params.variants:
            refresh = Refresh(policy="rotating", refresh_fraction=f)
            self.policies.append(Policy(f"rotating {f:g}, not moved", refresh, moves=False))
            self.policies.append(Policy(f"rotating {f:g}, last scores", refresh, rescores=False))
            self.policies.append(Policy(f"rotating {f:g}, neither", refresh, moves=False, rescores=False))

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Return the driving policy's selection."""
        spec = self.parts.representation.needs()[0].spec
        view: Any = context.features(spec)
        self.history.append(Held(view.dense(), view.status, view.ages))

        def select(held: Any) -> Selection:
            def features(
                spec: Any, target: str | None = None, state: str | None = None, rows: np.ndarray | None = None
            ) -> Any:
                return held if target is None else context.features(spec, target, state, rows)

            replaced = dataclasses.replace(context, features=features)
            return super(Comparison, self).select(model, step_id, num_samples, context=replaced, **kwargs)

        found = {policy.name: policy.choose(self.history, select) for policy in self.policies}
        targets = sum(len(rows) for rows in context.targets.values())
        with Path(self.params.output).open("a", encoding="utf-8") as file:
            for policy in self.policies:
                computed = int((policy.updated == context.update).sum())
                if context.update == 0 or policy.refresh.policy != "static":
                    computed += targets
                shared = len(np.intersect1d(found[policy.name].rows, found["full"].rows)) / num_samples
                line = {"policy": policy.name, "update": context.update, "computed": computed, "agreement": shared}
                file.write(json.dumps(line) + "\n")
        return found["full" if self.params.drive == 1 else f"rotating {self.params.drive:g}"]


@dataclass(frozen=True)
class Line:
    """What came out for one policy.

    Attributes:
        name: the policy.
        here: gradients computed per trained row in this run, targets and warm-up included.
        report: the same on the schedule of the DataFlex report, without targets.
        agreement: share of a full refresh's rows, at each update after the first.
    """

    name: str
    here: float
    report: float
    agreement: Sequence[float]


def reported(share: float) -> float:
    """Return gradients per trained row on the report's schedule, if all is computed at the first update."""
    return (POOL + (UPDATES - 1) * share * POOL) / (BATCH * (WARMUP + UPDATES * STEPS))


def lines(records: Sequence[Mapping[str, Any]], trained: int, pool: int, targets: int) -> list[Line]:
    """Return a line per policy, in the order of the records."""
    found = []
    for name in dict.fromkeys(record["policy"] for record in records):
        own = [record for record in records if record["policy"] == name]
        later = [max(0, record["computed"] - targets) / pool for record in own[1:]]
        total = sum(record["computed"] for record in own)
        found.append(Line(name, total / trained, reported(float(np.mean(later))), [r["agreement"] for r in own[1:]]))
    return found


def table(found: Sequence[Line]) -> str:
    """Return the lines as text."""
    text = [f"{'policy':26s} {'here':>7s} {'report':>7s} {'mean':>6s} {'last':>6s} {'least':>6s}"]
    for line in found:
        shares = f"{np.mean(line.agreement):6.3f} {line.agreement[-1]:6.3f} {min(line.agreement):6.3f}"
        text.append(f"{line.name:26s} {line.here:7.2f} {line.report:7.1f} {shares}")
    return "\n".join(text)


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make or copy a model and a pool; return the keys of the run file that name them."""
    from examples.quickstart import build
    from examples.quickstart.pool import write_datasets

    if args.model is None:
        build.build(folder)
        read = {
            name: json.loads((folder / "data" / f"{name}.json").read_text("utf-8"))
            for name in ("pool", "target_arithmetic")
        }
        write_datasets(folder / "data", {"pool": read["pool"][: args.rows], "target": read["target_arithmetic"]})
    else:
        from benchmarks import selection_quality

        study = selection_quality.easy(args.data, args.model, folder, args.rows, [args.target])
        target = json.loads((folder / "data" / f"{args.target}.json").read_text("utf-8"))
        write_datasets(folder / "data", {"pool": study.pool, "target": target})
    return {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder / "data")}


def run_file(args: argparse.Namespace, folder: Path, places: Mapping[str, Any]) -> Path:
    """Write the run file."""
    params = {
        "proj_dim": 2048,
        "adam_variant": args.variant,
        "output": str(folder / "agreement.jsonl"),
        "fractions": sorted({*args.fractions, args.drive} - {1.0}),
        "variants": args.variants,
        "drive": args.drive,
    }
    values = {
        **LORA,
        **places,
        "template": "qwen3_nothink",
        "cache_dir": str(folder / "cache"),
        "dataset": "pool",
        "eval_dataset": "target",
        "cutoff_len": 256,
        "per_device_train_batch_size": args.batch,
        "learning_rate": args.rate,
        "save_strategy": "no",
        "output_dir": str(folder / "out"),
        "seed": args.seed,
        "train_type": "dynamic_select",
        "warmup_step": args.warmup,
        "update_step": args.steps,
        "update_times": args.updates,
        "component_name": "benchmarks.refresh:Comparison",
        "dataflex": {"store": str(folder / "store"), "keep_warmup": False, "params": params},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def main() -> None:
    from dataflex.config import load
    from dataflex.pipelines.train import train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; default: the quickstart's model and pool are built")
    parser.add_argument("--data", type=Path, help="with --model: folder as benchmarks.selection_quality takes it")
    parser.add_argument("--target", default="gsm8k", help="with --model: target set")
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--updates", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=40, help="steps")
    parser.add_argument("--steps", type=int, default=4, help="between updates")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--variant", default="pytorch", help="adam_variant of LESS")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.03, 0.05, 0.07, 0.1, 0.2, 0.4])
    parser.add_argument("--variants", type=float, nargs="*", default=[0.1])
    parser.add_argument("--drive", type=float, default=0.1, help="share whose selection is trained on; 1: full refresh")
    parser.add_argument("--csv", type=Path, help="takes a line per policy and update")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dataflex-refresh-") as name:
        folder, begun, cpu = Path(name), time.monotonic(), time.process_time()
        train(load(run_file(args, folder, prepare(args, folder))))
        records = [json.loads(line) for line in (folder / "agreement.jsonl").read_text("utf-8").splitlines()]
        summary = json.loads((folder / "out" / "dataflex_summary.json").read_text("utf-8"))
        targets = len(json.loads((folder / "data" / "target.json").read_text("utf-8")))
    trained = args.batch * (args.warmup + args.steps * args.updates)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    seconds = f"{time.monotonic() - begun:.0f} s, {time.process_time() - cpu:.0f} CPU-s"
    print(f"\n{summary['rows']} rows, {args.updates} updates of {args.batch * args.steps} rows, {seconds}")
    print(table(lines(records, trained, summary["rows"], targets)))


if __name__ == "__main__":
    main()
