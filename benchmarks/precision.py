"""Precision of selections from a pool whose sources are known: of n rows chosen, the share that is of the target's own.

For each target set, n is the number of pool rows that are right for it. `dataflex select` chooses them by LESS; by the
stored mean-pooled embeddings, nearest to the target's first; by the stored losses, lowest first; and at random. Loss is
a weak baseline: like random, it does not look at the target. Features come from one `dataflex featurize` per target,
and the selections compute nothing. The sources differ in form, so this says whether a method works, not how well.

python -m benchmarks.precision DATA_DIR MODEL_DIR --rows 800
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from examples.quickstart.pool import Row, write_datasets

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> component_name and its parameters
    "LESS": ("less", {}),
    "embedding": ("embedding", {"model": "live"}),
    "loss": ("loss", {"mode": "topk_low"}),
    "random": ("random", {}),
}
BLIND = ("loss", "random")
"""Methods that do not look at the target: the first target's whole ranking is every target's."""
FEATURES = 3
"""Features of every row: LESS's gradient, and the two that featurize is asked for beside it."""


@dataclass(frozen=True)
class Precision:
    """How well each method found the rows of one target.

    Attributes:
        target: name of the target set.
        relevant: pool rows of the target's sources, and the number of rows chosen.
        chance: their share of the pool.
        found: method -> share of the rows chosen that are relevant.
        computed: values computed for this target.
    """

    target: str
    relevant: int
    chance: float
    found: Mapping[str, float]
    computed: int


@dataclass(frozen=True)
class Study:
    """A pool, its targets and a float32 model in a scratch folder.

    Attributes:
        folder: where everything is written.
        pool: the pool's records.
        sources: target -> the sources whose rows are right for it.
    """

    folder: Path
    pool: Sequence[Row]
    sources: Mapping[str, Sequence[str]]

    def run_file(self, method: str, target: str, **section: Any) -> Path:
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
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "output_dir": str(self.folder / "out" / method / target),
            "train_type": "dynamic_select",
            "warmup_step": 20,
            "update_step": 1,
            "component_name": component,
            "dataflex": {"store": str(self.folder / "store"), "params": params, **section},
        }
        path = self.folder / f"{method}-{target}.yaml"
        path.write_text(yaml.safe_dump(values), "utf-8")
        return path

    def featurize(self, target: str) -> dict[str, Any]:
        """Compute what is missing for one target; return the summary."""
        from dataflex.config import load
        from dataflex.pipelines.featurize import featurize

        featurize(load(self.run_file("LESS", target, features=[{"kind": "loss"}, {"kind": "embedding"}])))
        return dict(json.loads((self.folder / "out" / "LESS" / target / "dataflex_featurize.json").read_text("utf-8")))

    def select(self, method: str, target: str, count: int) -> list[Row]:
        """Return the records that a method chooses out of the stores; missing features are an error."""
        from dataflex.config import load
        from dataflex.pipelines.select import select

        output = self.folder / "chosen" / f"{method}-{target}.json"
        select(load(self.run_file(method, target, on_missing="error")), count, output)
        return list(json.loads(output.read_text("utf-8")))

    def precisions(self) -> Iterator[Precision]:
        """Yield one result per target.

        Raises:
            AssertionError: a target after the first made featurize compute more than its own rows.
        """
        relevant = {t: sum(row["source"] in sources for row in self.pool) for t, sources in self.sources.items()}
        chosen: dict[str, list[Row]] = {}
        for target, count in relevant.items():
            summary = self.featurize(target)
            most = FEATURES * (summary["target_rows"] + (0 if chosen else summary["rows"]))
            if summary["computed"] > most:
                raise AssertionError(
                    f"{target}: featurize computed {summary['computed']} values, at most {most} are new"
                )
            for method in METHODS:
                if method not in BLIND:
                    chosen[method] = self.select(method, target, count)
                elif method not in chosen:
                    chosen[method] = self.select(method, target, max(relevant.values()))
            good = {m: sum(r["source"] in self.sources[target] for r in rows[:count]) for m, rows in chosen.items()}
            found = {method: number / count for method, number in good.items()}
            yield Precision(target, count, count / len(self.pool), found, summary["computed"])


def prepare(data: Path, model: Path, folder: Path, rows: int | None, targets: Sequence[str] = ()) -> Study:
    """Write a pool of the same number of rows of every source, the target sets, and a float32 copy of the model.

    Args:
        data: has sft/sft_pool.json, whose rows name their `source`, sft/val/<target>.json and sft/ground_truth.json.
        model: a model folder with its tokenizer.
        folder: takes what is written.
        rows: rows of the pool; a source that has fewer than its part gives all; None takes every row.
        targets: some of the easy targets; all by default.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sources = json.loads((data / "sft" / "ground_truth.json").read_text("utf-8"))["relevant_sources"]
    sources = {target: sources[target] for target in targets or sources}
    pool: list[Row] = json.loads((data / "sft" / "sft_pool.json").read_text("utf-8"))
    if rows is not None:
        by_source: dict[str, list[Row]] = {}
        for row in random.Random(0).sample(pool, len(pool)):
            by_source.setdefault(row["source"], []).append(row)
        pool = [row for found in by_source.values() for row in found[: max(1, rows // len(by_source))]]
        random.Random(1).shuffle(pool)
    sets = {target: json.loads((data / "sft" / "val" / f"{target}.json").read_text("utf-8")) for target in sources}
    write_datasets(folder / "data", {"pool": pool, **sets})
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "model")
    return Study(folder, pool, sources)


def table(results: Sequence[Precision]) -> str:
    """Return a line for each target and one for their mean."""
    lines = [f"{'target':12s} {'n':>5s} {'chance':>7s} " + " ".join(f"{m:>9s}" for m in METHODS) + "   computed"]
    for r in results:
        cells = " ".join(f"{r.found[method]:9.3f}" for method in METHODS)
        lines.append(f"{r.target:12s} {r.relevant:5d} {r.chance:7.3f} {cells} {r.computed:10d}")
    means = " ".join(f"{np.mean([r.found[method] for r in results]):9.3f}" for method in METHODS)
    return "\n".join([*lines, f"{'mean':12s} {'':5s} {np.mean([r.chance for r in results]):7.3f} {means}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with sft/ and, in it, the pool, val/ and ground_truth.json")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--rows", type=int, help="rows of the pool, as many of every source; default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dataflex-precision-") as folder:
        begun = time.monotonic()
        study = prepare(args.data, args.model, Path(folder), args.rows)
        results = list(study.precisions())
        print(f"\n{len(study.pool)} rows, {time.monotonic() - begun:.0f} s; precision at n:\n{table(results)}")


if __name__ == "__main__":
    main()
