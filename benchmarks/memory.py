"""Peak memory of `dataflex featurize` at several pool sizes, each in a process of its own; it should not grow.

A tiny model of random weights computes losses, embeddings and gradients of short generated rows. The peak is the
kernel's (`ru_maxrss`), which counts pages of memory-mapped files too; these can be dropped at any time, so the peak of
the anonymous memory, sampled, stands beside it. glibc is told to give freed blocks back: by default it keeps up to
200 MB of them here, more or less by chance.

python -m benchmarks.memory --rows 2000 16000
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from examples.quickstart.pool import split, write_datasets

SOURCES = ("arithmetic", "words", "records", "dates")
"""Sources that have any number of different questions."""

MAKE_MODEL = """
import sys, json, pathlib
from examples.quickstart import model, pool
rows = json.loads(pathlib.Path(sys.argv[1]).read_text("utf-8"))[:2000]
tokenizer = model.train_tokenizer(["".join(pool.turns(row)) for row in rows], 512)
model.save(model.new_model(tokenizer, hidden=64, layers=2, seed=0), tokenizer, pathlib.Path(sys.argv[2]))
"""
"""Run apart: a child begins with its parent's peak, so this process must not load torch."""


def run_file(folder: Path, rows: int, proj_dim: int) -> Path:
    """Write the run file of one size."""
    values = {
        "model_name_or_path": str(folder / "model"),
        "template": "qwen3_nothink",
        "cache_dir": str(folder / "cache"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": 4,
        "dataset_dir": str(folder / "data"),
        "dataset": f"pool_{rows}",
        "eval_dataset": "target",
        "cutoff_len": 128,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(folder / f"out_{rows}"),
        "train_type": "dynamic_select",
        "component_name": "less",
        "warmup_step": 3,
        "update_step": 1,
        "dataflex": {
            "store": str(folder / f"store_{rows}"),
            "fragment_rows": 256,  # a few rows make smaller fragments, unless they are small at every size
            "params": {"proj_dim": proj_dim},
            "features": [{"kind": "loss"}, {"kind": "embedding"}],
        },
    }
    path = folder / f"run_{rows}.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def peaks(command: list[str], log: Path) -> tuple[float, float]:
    """Run a command; return its peak of resident and of anonymous memory, in kB.

    Raises:
        RuntimeError: it failed.
    """
    anonymous = 0.0
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, _anonymous(child.pid))
            time.sleep(0.05)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text('utf-8', errors='replace')[-4000:]}")
    return float(usage.ru_maxrss), anonymous


def _anonymous(pid: int) -> float:
    """Return a process's anonymous memory in kB; 0 where the kernel does not tell, or the process is just ending."""
    try:
        text = Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 16_000])
    parser.add_argument("--proj-dim", type=int, default=1024)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dataflex-memory-") as name:
        folder = Path(name)
        most = -(-max(args.rows) // len(SOURCES))
        splits = [split(source, 0, pool=most, target=8, test=0, pretrain=0) for source in SOURCES]
        pool: list[dict[str, Any]] = [dict(row) for rows in zip(*(s.pool for s in splits), strict=True) for row in rows]
        target = [row for s in splits for row in s.target]
        sizes = {f"pool_{rows}": pool[:rows] for rows in args.rows}
        write_datasets(folder / "data", {**sizes, "target": target})
        model = [str(folder / "data" / f"pool_{max(args.rows)}.json"), str(folder / "model")]
        subprocess.run([sys.executable, "-c", MAKE_MODEL, *model], check=True)
        found = []
        for rows in args.rows:
            begun = time.monotonic()
            command = [sys.executable, "-m", "dataflex.cli", "featurize", str(run_file(folder, rows, args.proj_dim))]
            peak, anonymous = peaks(command, folder / f"{rows}.log")
            found.append((rows, peak, anonymous))
            seconds = time.monotonic() - begun
            print(f"{rows:8,d} rows: peak {peak / 1e3:7.1f} MB, anonymous {anonymous / 1e3:7.1f} MB, {seconds:.0f} s")
        for (few, a, b), (many, c, d) in itertools.pairwise(found):
            per_row = [(y - x) / (many - few) for x, y in ((a, c), (b, d))]
            print(
                f"from {few:,d} to {many:,d} rows: {per_row[0]:.2f} kB per row, anonymous {per_row[1]:.2f} kB per row"
            )


if __name__ == "__main__":
    main()
