"""What only a GPU can show of the feature engine: is it right there, is it the same twice, and how fast is it.

Everything is made here, of random weights; nothing is read or downloaded. It takes torch, transformers, peft,
accelerate, safetensors and pyarrow; what else is missing is named, and what needs it is left out. It prints as it goes,
ends with one line of JSON, and begins nothing that would not fit into `--minutes`.

equality    gradients of padded batches against autograd, one example at a time; see `benchmarks.gpu_gradients`
repetition  the same rows featurized twice: equal in every bit, or how far apart
throughput  a model shaped like Llama-3.2-3B, LoRA of rank 16 and 128, then a 4-bit base, beside its own training pass
            and the limit of arithmetic; see `benchmarks.gpu_throughput`

python -m benchmarks.gpu --json gpu.json        # on a CUDA device, at most eight minutes
python -m benchmarks.gpu --small                # a tiny model on whatever is there: shows that the script works
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import stand_in_for_pydantic

NEEDED = ("torch", "transformers", "peft", "accelerate", "safetensors", "pyarrow", "numpy")
OTHERS = ("pydantic", "omegaconf", "llamafactory", "deepspeed", "faiss", "bitsandbytes")


@dataclass(frozen=True)
class Size:
    """What is measured: the shapes of the two models, and how much of them."""

    checked: dict[str, int]
    longest: int  # tokens of a row of the model that is checked
    timed: dict[str, Any]
    ranks: tuple[int, ...]
    tokens: int  # of a row of the model that is timed
    budgets: tuple[int, ...]  # tokens of a batch, tried in turn until one fits into memory
    square: int  # side of the matrices whose product is timed
    least: float  # seconds left that a part needs to be begun


FULL = Size(
    checked={"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 8192},
    longest=128,
    timed={
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    ranks=(16, 128),
    tokens=512,
    budgets=(8192, 4096, 2048, 1024, 512),
    square=8192,
    least=75,
)
SMALL = Size(
    checked={"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256},
    longest=24,
    timed=FULL.timed
    | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    ranks=(4, 8),
    tokens=16,
    budgets=(32,),
    square=256,
    least=1,
)


@dataclass
class Report:
    """Results by name, printed as they come and written after each: a run that is cut short has said what it found."""

    path: Path | None
    ends: float
    results: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Return the seconds that remain."""
        return self.ends - time.monotonic()

    def add(self, name: str, value: Any) -> None:
        """Keep a result."""
        self.results[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)
        if self.path:
            self.path.write_text(json.dumps(self.results, indent=1) + "\n", "utf-8")

    def give_up(self) -> None:
        """End the process: what hangs, or is slower than was thought, must not take what was found with it."""
        self.add("seconds left", 0)
        print(json.dumps(self.results), flush=True)
        os._exit(3)


def main(arguments: list[str] | None = None) -> int:
    """Measure; return 1 if a gradient is not what autograd says, 2 without a GPU; a run out of time exits with 3."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, on a CPU if there is no GPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which the process ends, whatever it does")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here, after each of them")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not args.small:
        print("found no CUDA device; `--small` shows on a CPU that the script works", file=sys.stderr)
        return 2
    report = Report(args.json, time.monotonic() + 60 * args.minutes)
    watch = threading.Timer(60 * args.minutes, report.give_up)
    watch.daemon = True
    watch.start()
    try:
        right = measure(report, SMALL if args.small else FULL)
    finally:
        watch.cancel()
    print(json.dumps(report.results))
    return 0 if right else 1


def measure(report: Report, size: Size) -> bool:
    """Run the parts in the order of what matters most; return whether all gradients are right."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # such small products are slower on several
    report.add("machine", machine(device))
    stand_in_for_pydantic()
    from benchmarks import gpu_gradients, gpu_throughput  # whose imports find pydantic now, or what stands for it

    precisions = list(gpu_gradients.PRECISIONS)
    if importlib.util.find_spec("bitsandbytes"):
        precisions.append(gpu_gradients.FOUR_BITS)
    for precision in precisions:
        report.add(f"equality, {precision}", gpu_gradients.equality(size.checked, size.longest, precision, device))
    for precision in precisions:
        report.add(f"repetition, {precision}", gpu_gradients.repetition(size.checked, size.longest, precision, device))
    rates = {name: gpu_throughput.rate(size.square, name, device) for name in ("bfloat16", "float32")}
    report.add("matrix product, TFLOP/s", rates)
    base = gpu_throughput.frozen_model(size.timed, device)
    for rank, quantised in [*((rank, False) for rank in size.ranks), (size.ranks[0], True)]:
        name = f"throughput, LoRA r = {rank}{', 4-bit base' if quantised else ''}"
        if report.left() < size.least:
            report.add(name, {"skipped": f"{report.left():.0f} s are left"})
        elif quantised and not importlib.util.find_spec("bitsandbytes"):
            report.add(name, {"skipped": "bitsandbytes is not installed"})
        else:
            base = gpu_gradients.quantised(base, torch.bfloat16) if quantised else base
            report.add(name, gpu_throughput.passes(base, rank, size.tokens, size.budgets, rates["bfloat16"]))
    report.add("seconds left", round(report.left()))
    return all(value["right"] for name, value in report.results.items() if name.startswith("equality"))


def machine(device: torch.device) -> dict[str, Any]:
    """Return what it runs on, and what is not there."""
    found = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in NEEDED}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"device": about.name, "GB": f"{about.total_memory / 1e9:.1f}", "cuda": str(torch.version.cuda)}
    absent = [name for name in OTHERS if not importlib.util.find_spec(name)]
    return {"device": "CPU", **found, "absent": absent}


if __name__ == "__main__":
    sys.exit(main())
