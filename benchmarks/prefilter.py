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
from pathlib import Path

import yaml

from benchmarks.lora_run import LORA
from benchmarks.prefilter_recording import CHEAP
from benchmarks.prefilter_replay import table
from benchmarks.refresh import BATCH, POOL, STEPS, UPDATES, WARMUP


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
        **LORA,
        "model_name_or_path": str(args.model),
        "template": args.template,
        "dataset_dir": str(data),
        "dataset": "pool",
        "eval_dataset": ",".join(path.stem for path in args.target),
        "cutoff_len": args.cutoff,
        "per_device_train_batch_size": args.batch,
        "learning_rate": args.rate,
        "save_strategy": "steps",
        "save_steps": args.steps,
        "save_total_limit": 2,
        "output_dir": str(args.folder / "out"),
        "seed": args.seed,
        "train_type": "dynamic_select",
        "warmup_step": args.warmup,
        "update_step": args.steps,
        "update_times": args.updates,
        "component_name": "benchmarks.prefilter_recording:Recorded",
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
        **LORA,
        "model_name_or_path": str(model),
        "template": template,
        "cache_dir": str(folder / "cache"),
        "dataset_dir": str(folder / "data"),
        "dataset": "pool",
        "eval_dataset": "target",
        "cutoff_len": 64,
        "per_device_train_batch_size": BATCH,
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
