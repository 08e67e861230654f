"""What every method selects from pools whose good rows are known: one table, random and the full pool beside it.

easy: for each target set, n rows are chosen, n the pool's rows of the target's source; precision is the share of them
that are of that source. fine: the same for topics inside one source. noisy: half of a pool with labelled noise is
chosen; the table has the share of each kind of noise that was kept (0.5 is what chance keeps). Sources differ in form,
so `easy` says whether a method works, not how well.

Every method's features come from one root: `evaluations` are the rows' forward or backward passes that the method
needs, `computed` those that no method before it had computed in this study, with their seconds and bytes.

python -m benchmarks.selection_quality DATA_DIR MODEL_DIR --rows 800 --seeds 3
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from examples.quickstart.pool import Row, write_datasets

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> component_name and its parameters
    "random": ("random", {}),
    "less": ("less", {}),
    "less, round-robin": ("less", {"aggregation": "round_robin"}),
    "less, no momentum": ("less", {"adam_variant": "precond_only"}),
    "less, sgd": ("less", {"gradient_type": "sgd"}),
    "less, whitened": ("less", {"proj_dim": 1024, "similarity": "whitened_cosine"}),
    "nice": (
        "nice",
        {
            "reward": {"type": "function", "function": "benchmarks.selection_quality:overlap"},
            "max_new_tokens": 16,
        },
    ),
    "cluster_less": ("cluster_less", {"cluster_size": 16}),
    "influence_distillation": ("influence_distillation", {"landmarks": 64}),
    "embedding": ("embedding", {}),
    "rds_plus": ("rds_plus", {}),
    "near": ("near", {}),
    "tsds": ("tsds", {"alpha": 0.95}),
    "loss": ("loss", {"focus": "medium"}),
    "delta_loss": ("delta_loss", {}),
    "ifd": ("ifd", {}),
}
BLIND = ("random", "loss", "delta_loss", "ifd")
"""Methods that do not look at the target: what they choose first is chosen for every target."""
NOISE = "noise"
"""The field of a record that says what is wrong with it."""


def overlap(prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the F1 of each response's pairs of letters against the reference's: no response of a small model has 0."""
    scores = []
    for response, reference in zip(responses, references, strict=True):
        ours, theirs = ({a + b for a, b in itertools.pairwise(text)} for text in (response, reference))
        scores.append(2 * len(ours & theirs) / max(1, len(ours) + len(theirs)))
    return scores


@dataclass
class Cost:
    """What one method's selections took."""

    evaluations: int = 0
    computed: int = 0
    seconds: float = 0.0
    bytes: int = 0


@dataclass
class Found:
    """What one method chose.

    Attributes:
        share: target -> share of the chosen rows that are right; or kind of noise -> share of its rows that were kept.
        cost: of all its selections.
    """

    share: dict[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Study:
    """A pool, its targets and a float32 model in a scratch folder.

    Attributes:
        folder: where everything is written.
        pool: the pool's records.
        targets: target -> the ids of the pool's rows that are right for it.
        warmup: steps of 8 rows before rows are judged.
    """

    folder: Path
    pool: Sequence[Row]
    targets: Mapping[str, set[str]]
    warmup: int = 20

    def run_file(self, method: str, target: str, seed: int = 42) -> Path:
        """Write a run file; but for method and target all are alike, so they share a warm-up."""
        component, params = METHODS[method]
        values = {
            "model_name_or_path": str(self.folder / "model"),
            "template": "qwen3_nothink",
            "cache_dir": str(self.folder / "cache"),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": 8,
            "dataset_dir": str(self.folder / "data"),
            "dataset": "pool",
            "eval_dataset": target,
            "cutoff_len": 512,
            "per_device_train_batch_size": 8,
            "learning_rate": 4e-3,
            "lr_scheduler_type": "constant",
            "seed": seed,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "output_dir": str(self.folder / "out" / method.replace(", ", "-") / target.replace(",", "-")),
            "train_type": "dynamic_select",
            "warmup_step": self.warmup,
            "update_step": 1,
            "component_name": component,
            "dataflex": {"store": str(self.folder / "store"), "params": params},
        }
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(values), "utf-8")
        return path

    def select(self, method: str, target: str, count: int, seed: int = 42) -> tuple[list[Row], Cost]:
        """Return the records that a method chooses, best first, and what that took."""
        from dataflex.config import load
        from dataflex.pipelines.select import select

        output = self.folder / "chosen.json"
        begun = time.monotonic()
        settings = load(self.run_file(method, target, seed))
        select(settings, count, output)
        seconds = time.monotonic() - begun
        summary = json.loads((Path(settings.llamafactory["output_dir"]) / "dataflex_select.json").read_text("utf-8"))
        evaluations = summary["computed"] + summary["reused"]
        return json.loads(output.read_text("utf-8")), Cost(evaluations, summary["computed"], seconds, summary["bytes"])

    def precision(self, method: str, seed: int = 42) -> Found:
        """Choose for every target as many rows as are right for it."""
        found = Found()
        most = max(len(right) for right in self.targets.values())
        rows: list[Row] = []
        for target, right in self.targets.items():
            if method not in BLIND or not rows:
                rows, cost = self.select(method, target, most if method in BLIND else len(right), seed)
                _add(found.cost, cost)
            found.share[target] = sum(row["id"] in right for row in rows[: len(right)]) / len(right)
        return found

    def kept(self, method: str, seed: int = 42) -> Found:
        """Choose half of the pool towards all targets together; return the share of each kind of noise that is kept."""
        rows, cost = self.select(method, ",".join(self.targets), len(self.pool) // 2, seed)
        kinds = sorted({row[NOISE] for row in self.pool})
        chosen = {kind: sum(row[NOISE] == kind for row in rows) for kind in kinds}
        return Found({k: chosen[k] / sum(row[NOISE] == k for row in self.pool) for k in kinds}, cost)


def easy(data: Path, model: Path, folder: Path, rows: int | None, targets: Sequence[str] = ()) -> Study:
    """Put together a pool of the same number of rows of every source, and a target set for each.

    Args:
        data: has sft/sft_pool.json, whose rows name their `source`, sft/val/<target>.json and sft/ground_truth.json.
        model: a model folder with its tokenizer; a float32 copy is made.
        folder: takes what is written.
        rows: rows of the pool; a source that has fewer than its part gives all; None takes every row.
        targets: some of the targets; all by default.
    """
    truth = _json(data / "sft" / "ground_truth.json")["relevant_sources"]
    pool: list[Row] = _json(data / "sft" / "sft_pool.json")
    if rows is not None:
        by_source: dict[str, list[Row]] = {}
        for row in random.Random(0).sample(pool, len(pool)):
            by_source.setdefault(row["source"], []).append(row)
        pool = [row for found in by_source.values() for row in found[: max(1, rows // len(by_source))]]
        random.Random(1).shuffle(pool)
    right = {t: {row["id"] for row in pool if row["source"] in truth[t]} for t in targets or truth}
    return _study(folder, model, pool, right, {t: data / "sft" / "val" / f"{t}.json" for t in right})


def fine(data: Path, model: Path, folder: Path) -> Study:
    """Put together the pool of one source, and a target set for each of its topics."""
    truth = _json(data / "sft" / "ground_truth.json")["fine"]
    source = next(iter(truth)).split(".")[0]
    pool = _json(data / "sft" / "pool" / f"{source}.json")
    prefixes = {t.replace(".", "_"): topic["relevant_id_prefix"] for t, topic in truth.items()}
    right = {t: {row["id"] for row in pool if row["id"].startswith(prefix)} for t, prefix in prefixes.items()}
    files = {t.replace(".", "_"): data / "sft" / "val_fine" / f"{t}.json" for t in truth}
    return _study(folder, model, pool, right, files)


def noisy(data: Path, model: Path, folder: Path) -> Study:
    """Put together the pool with labelled noise, and the target sets of its sources."""
    pool = _json(data / "sft" / "sft_pool_noisy.json")
    sources = sorted({row["source"] for row in pool})
    right = {s: {row["id"] for row in pool if row["source"] == s} for s in sources}
    return _study(folder, model, pool, right, {s: data / "sft" / "val" / f"{s}.json" for s in sources})


def _study(
    folder: Path, model: Path, pool: Sequence[Row], right: Mapping[str, set[str]], files: Mapping[str, Path]
) -> Study:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_datasets(folder / "data", {"pool": pool, **{name: _json(path) for name, path in files.items()}})
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "model")
    return Study(folder, pool, right)


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _add(total: Cost, more: Cost) -> None:
    for name, value in vars(more).items():
        setattr(total, name, getattr(total, name) + value)


def results(study: Study, methods: Sequence[str], seeds: int, is_noisy: bool) -> Iterator[tuple[str, list[Found]]]:
    """Yield what each method found, seed by seed; the full pool first."""
    if is_noisy:
        yield "full pool", [Found({kind: 1.0 for kind in {row[NOISE] for row in study.pool}})]
    else:
        yield "full pool", [Found({t: len(right) / len(study.pool) for t, right in study.targets.items()})]
    for method in methods:
        run = study.kept if is_noisy else study.precision
        yield method, [run(method, 42 + seed) for seed in range(seeds)]


def line(name: str, found: Sequence[Found], columns: Sequence[str]) -> str:
    """Return a line of the table: means over seeds, the deviation of the mean's, and the cost of the first seed."""
    means = {c: float(np.mean([f.share[c] for f in found])) for c in columns}
    overall = [float(np.mean([f.share[c] for c in columns])) for f in found]
    cells = " | ".join(f"{means[c]:.2f}" for c in columns)
    cost = found[0].cost
    deviation = f"{np.std(overall):.2f}"
    return (
        f"| {name} | {cells} | {np.mean(overall):.2f} ± {deviation} | {cost.evaluations} | {cost.computed} | "
        f"{cost.seconds:.0f} | {cost.bytes / 1e6:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with sft/ and, in it, pools, val/ and ground_truth.json")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--rows", type=int, help="easy: rows of the pool, as many of every source; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=20, help="steps before rows are judged")
    parser.add_argument("--studies", nargs="+", choices=("easy", "fine", "noisy"), default=("easy", "fine", "noisy"))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    args = parser.parse_args()
    for name in args.studies:
        with tempfile.TemporaryDirectory(prefix="dataflex-quality-") as scratch:
            folder = Path(scratch)
            make = {"fine": fine, "noisy": noisy}.get(name)
            study = make(args.data, args.model, folder) if make else easy(args.data, args.model, folder, args.rows)
            study = replace(study, warmup=args.warmup)
            print(f"\n{name}: {len(study.pool)} rows, {args.seeds} seeds", flush=True)
            columns: list[str] = []
            for method, found in results(study, args.methods, args.seeds, name == "noisy"):
                if not columns:
                    columns = sorted(found[0].share)
                    print(f"| method | {' | '.join(columns)} | mean | evaluations | computed | seconds | MB |")
                    print("|---" * (len(columns) + 6) + "|", flush=True)
                print(line(method, found, columns), flush=True)


if __name__ == "__main__":
    main()
