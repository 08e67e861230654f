"""Featurize a whole pool on two processes that are killed at random, again and again, until it is there.

A short plain training gives a checkpoint; at this checkpoint `dataflex featurize` computes what offline LESS asks for:
the Adam step of each row, projected, with its loss. One process of the launch, drawn at random, gets SIGKILL after a
random time; the next launch goes on from the store. In the end a part of the pool is featurized by one process that
nobody disturbs, in a store of its own, and compared row by row. What is finished stands in growth.json; a benchmark
that was stopped goes on.

python -m benchmarks.growth FOLDER --model MODEL --template smollm2 --pool POOL.json --target TARGET.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.lora_run import LORA

WARMUP = 10
"""Optimizer steps of the plain training."""


def run_file(args: argparse.Namespace, name: str, **changes: Any) -> Path:
    """Write a run file of the benchmark, and return where."""
    values = {
        **LORA,
        "model_name_or_path": str(args.model),
        "template": args.template,
        "dataset_dir": str(args.folder / "data"),
        "dataset": "pool",
        "eval_dataset": "target",
        "cutoff_len": args.cutoff,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-4,
        "disable_gradient_checkpointing": True,
        "output_dir": str(args.folder / name),
        "overwrite_output_dir": True,
        **changes,
    }
    path = args.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def featurizing(args: argparse.Namespace, name: str, **changes: Any) -> Path:
    """Write a run file that asks for features at the checkpoint."""
    ours = {
        "store": str(args.folder / f"store-{name}"),
        "token_budget": args.budget,
        "params": {
            "checkpoints": [str(args.folder / "training" / f"checkpoint-{WARMUP}")],
            "weights": [1.0],
            "proj_dim": args.width,
        },
    }
    more = {"train_type": "dynamic_select", "component_name": "less", "warmup_step": 0, "update_step": 1}
    return run_file(args, name, **more, update_times=1, dataflex=ours, **changes)


def launch(path: Path, processes: int, kill_after: float | None, draws: random.Random) -> dict[str, Any]:
    """Run `dataflex featurize`, and kill one of its processes in time; return what was seen."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(processes)}
    family: list[psutil.Process] = []
    command = [sys.executable, "-m", "dataflex.cli", "featurize", str(path)]
    begun, killed, most = time.monotonic(), None, 0
    with path.with_suffix(".log").open("ab") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        while started.poll() is None:
            family = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
            most = max(most, *(_memory(each) for each in family))
            if kill_after is not None and killed is None and time.monotonic() - begun > kill_after:
                with contextlib.suppress(psutil.NoSuchProcess):  # another is drawn a second later
                    victim = draws.choice(family)
                    name = " ".join(victim.cmdline()[1:3])
                    victim.send_signal(signal.SIGKILL)
                    killed = name
            time.sleep(1)
        for left in family:  # whoever has lost its launcher
            if left.is_running():
                left.kill()
    seconds = round(time.monotonic() - begun, 1)
    return {"seconds": seconds, "killed": killed, "code": started.returncode, "peak_mib": most >> 20}


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def rows_of(root: Path) -> int:
    """Return how many rows of the pool have their gradient."""
    from dataflex import list_stores

    return sum(len(store) for store in list_stores(root) if store.name.startswith("gradient-")) if root.exists() else 0


def agreement(args: argparse.Namespace) -> dict[str, float]:
    """Hold the rows of the undisturbed part against those of the whole."""
    from dataflex import list_stores

    stores = [
        max((s for s in list_stores(args.folder / f"store-{name}") if s.name.startswith("gradient-")), key=len)
        for name in ("pool", "part")
    ]
    part = stores[1].to_arrow()
    whole = stores[0].to_arrow(part["row_key"])
    ours, theirs = (
        np.stack(table["vector"].to_numpy(zero_copy_only=False)).astype(np.float64) for table in (part, whole)
    )
    lengths = np.maximum(np.linalg.norm(theirs, axis=1), 1e-30)
    cosines = (ours * theirs).sum(1) / np.maximum(np.linalg.norm(ours, axis=1) * lengths, 1e-30)
    return {
        "rows": len(part),
        "same_bits": float(np.mean((ours == theirs).all(1))),
        "least_cosine": float(cosines.min()),
        "greatest_relative_error": float((np.linalg.norm(ours - theirs, axis=1) / lengths).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for everything; what is in it goes on")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--template", required=True)
    parser.add_argument("--pool", type=Path, required=True, help="records in alpaca's form")
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--part", type=int, default=200, help="rows that are computed again, undisturbed")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--between", type=float, nargs=2, default=[120, 900], help="seconds a launch lives")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cutoff", type=int, default=512)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from examples.quickstart.pool import write_datasets

    args.folder.mkdir(parents=True, exist_ok=True)
    pool = json.loads(args.pool.read_text("utf-8"))
    target = json.loads(args.target.read_text("utf-8"))[:20]
    part = random.Random(args.seed).sample(pool, min(args.part, len(pool)))
    write_datasets(args.folder / "data", {"pool": pool, "part": part, "target": target})
    if not (args.folder / "training" / f"checkpoint-{WARMUP}").is_dir():
        path = run_file(args, "training", max_steps=WARMUP, save_steps=WARMUP, save_strategy="steps")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "dataflex.cli", "train", str(path)], env=environment, check=True)
    kept = args.folder / "growth.json"
    launches: list[dict[str, Any]] = json.loads(kept.read_text("utf-8")) if kept.is_file() else []
    path = featurizing(args, "pool")
    while not launches or launches[-1]["code"] != 0:
        draws = random.Random(f"{args.seed}-{len(launches)}")
        after = draws.uniform(*args.between) if len(launches) < args.kills else None
        before = rows_of(args.folder / "store-pool")
        found = launch(path, args.processes, after, draws)
        if found["code"] != 0 and found["killed"] is None:
            raise SystemExit(f"a launch that nobody killed ended with {found['code']}: see {path.with_suffix('.log')}")
        found["rows"] = rows_of(args.folder / "store-pool") - before
        launches.append(found)
        kept.write_text(json.dumps(launches, indent=1), "utf-8")
        print(found, flush=True)
    found = launch(featurizing(args, "part", dataset="part"), 1, None, random.Random(0))
    assert found["code"] == 0, "see part.log"
    rows, seconds = sum(each["rows"] for each in launches), sum(each["seconds"] for each in launches)
    size = sum(file.stat().st_size for file in (args.folder / "store-pool").rglob("*") if file.is_file())
    print(f"{rows} rows in {seconds:.0f} s of {len(launches)} launches: {rows / seconds:.2f} rows/s")
    print(f"at most {max(each['peak_mib'] for each in launches)} MiB of a process, {size / 1e6:.1f} MB in the store")
    print(agreement(args))


if __name__ == "__main__":
    main()
