r"""What mixers and weighters cost per optimizer step, against plain LLaMA-Factory training of the same batch.

Each variant is a training of its own in a process of its own, and they take turns: a step of one, then a step of the
next, in an order that moves by one every round, so that a slow spell of the machine falls on all of them. A step lasts
from the end of the one before to its own end: rows decided, collated, forward and backward passes, optimizer,
callbacks. Printed are the median CPU-seconds of a step, and the median over rounds of each variant's ratio to plain in
the same round, with a 95 % confidence interval (order statistics) and quartiles; then the same of wall time. `plain
again` says what noise is. On a GPU wall time counts, and steps are synchronised.

All rows are blocks of `--cutoff` tokens (stage pt, packed), so every variant computes alike. DoReMi's reference is the
model that training begins with; its losses are stored before the first step.

With a file of instruction data (alpaca JSON, each row with its `source`) in place of a folder a LoRA adapter is trained
on rows of about `--cutoff` tokens, responses supervised. Weighters and mixers then form logits where labels are, and
LLaMA-Factory all of them: the ratio is that of training with and without.

python -m benchmarks.trainer_overhead DATA_DIR MODEL_DIR --rounds 60
python -m benchmarks.trainer_overhead ALPACA_JSON MODEL_DIR --template smollm2 --cutoff 128 --rounds 20 \
    --variants "plain again" "weight: loss" "mix: odm"
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml
from scipy.stats import binom

from benchmarks import instructions
from benchmarks.mixing_quality import prepare, training
from dataflex.errors import DataflexError

PLAIN = "plain"
VARIANTS: dict[str, dict[str, Any]] = {  # name -> keys beside those that all have
    PLAIN: {"train_type": "static"},
    "plain again": {"train_type": "static"},
    "mix: static": {"train_type": "dynamic_mix", "component_name": "static"},
    "mix: odm": {"train_type": "dynamic_mix", "component_name": "odm"},
    "mix: ado": {"train_type": "dynamic_mix", "component_name": "ado"},
    "mix: doremi": {"train_type": "dynamic_mix", "component_name": "doremi"},
    "weight: loss": {"train_type": "dynamic_weight", "component_name": "loss"},
}
WARMUP = 3
"""Steps of a process before its first that counts."""


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step."""

    cpu: float
    wall: float


class Variant:
    """A training in a process of its own that goes on one step at a time.

    Args:
        name: one of `VARIANTS`.
        run_file: of the training.
    """

    def __init__(self, name: str, run_file: Path):
        self.name, self._log = name, run_file.with_suffix(".log")
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(run_file, self._log, theirs))
        self._process.start()
        theirs.close()
        for _ in range(WARMUP):
            self.step()

    def step(self) -> Step:
        """Take a step.

        Raises:
            DataflexError: the training has ended.
        """
        try:
            self._connection.send(True)
            found: Step = self._connection.recv()
        except (EOFError, BrokenPipeError) as error:
            self._process.join()
            said = self._log.read_text("utf-8", errors="replace")[-2000:]
            raise DataflexError(
                f"{self.name}: the training ended with exit code {self._process.exitcode}; expected more steps. Its "
                f"last words:\n{said}"
            ) from error
        return found

    def end(self) -> None:
        """End the training where it stands."""
        self._process.kill()
        self._process.join()


def _train(run_file: Path, log: Path, connection: Any) -> None:
    """Train; before every step wait to be asked, after it tell what it took."""
    with log.open("w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import torch
    from llamafactory.train import tuner
    from transformers import TrainerCallback

    from dataflex.config import load
    from dataflex.pipelines.train import train

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self.begun = 0.0, 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.wait()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            cpu, wall = time.process_time() - self.begun[0], time.monotonic() - self.begun[1]
            connection.send(Step(cpu, wall))
            self.wait()

        def wait(self) -> None:
            connection.recv()
            self.begun = time.process_time(), time.monotonic()

    run_exp = tuner.run_exp

    @functools.wraps(run_exp)
    def watched(arguments: Any, callbacks: Any) -> None:
        run_exp(arguments, [*callbacks, Turns()])

    with patch.object(tuner, "run_exp", watched):
        train(load(run_file))


def measure(
    data: Path,
    model: Path,
    folder: Path,
    names: Sequence[str],
    rounds: int,
    batch: int = 8,
    accumulation: int = 1,
    cutoff: int = 256,
    template: str = "",
) -> dict[str, list[Step]]:
    """Return the steps of each variant, in the order of the rounds.

    Args:
        data: has pt/train/DOMAIN.jsonl and pt/heldout/DOMAIN.jsonl; or a file of instruction data.
        model: a model folder with its tokenizer.
        folder: takes what is written.
        names: of the variants.
        rounds: steps of each.
        batch: rows of a micro-batch.
        accumulation: micro-batches of a step.
        cutoff: tokens of a row.
        template: LLaMA-Factory's for the model, with instruction data.
    """
    if data.is_file():
        shared, told = instructions.training(data, model, folder, template, batch, accumulation, cutoff)
        print(told, flush=True)
    else:
        domains, _ = prepare(data, model, folder)
        shared = training(folder, domains, batch, cutoff, rate=1e-3) | {"max_samples": 150}
    shared |= {"gradient_accumulation_steps": accumulation}
    steps = rounds + WARMUP + 1  # the last is never asked for
    variants: list[Variant] = []
    found: dict[str, list[Step]] = {name: [] for name in names}
    try:
        for name in names:
            keys = VARIANTS[name]
            is_plain = keys["train_type"] == "static"
            length = {"max_steps": steps} if is_plain else {"train_step": steps}
            reference = {"reference_model_path": shared["model_name_or_path"]} if name == "mix: doremi" else {}
            store = {} if is_plain else {"dataflex": {"store": str(folder / "store"), "params": reference}}
            path = folder / f"{name.replace(': ', '-').replace(' ', '-')}.yaml"
            out = {"output_dir": str(folder / "out" / path.stem)}
            path.write_text(yaml.safe_dump(shared | keys | length | store | out), "utf-8")
            variants.append(Variant(name, path))
        for number in range(rounds):
            first = number % len(variants)
            for variant in variants[first:] + variants[:first]:
                found[variant.name].append(variant.step())
    finally:
        for variant in variants:
            variant.end()
    return found


def table(found: dict[str, list[Step]]) -> str:
    """Return medians, and ratios to plain, as text."""
    lines = ["| variant | CPU-s | ratio | 95 % | quartiles | wall s | ratio | 95 % |", "|---" * 8 + "|"]
    plain = found[PLAIN]
    for name, steps in found.items():
        cells = []
        for of in ("cpu", "wall"):
            seconds, base = (np.array([getattr(step, of) for step in some]) for some in (steps, plain))
            ratio = np.sort(seconds / base)
            low, high = median_interval(ratio)
            cells += [f"{np.median(seconds):.3f}", f"{np.median(ratio):.4f}", f"{low:.4f} to {high:.4f}"]
            if of == "cpu":
                cells.append("{:.3f} to {:.3f}".format(*np.quantile(ratio, (0.25, 0.75))))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def median_interval(ordered: np.ndarray) -> tuple[float, float]:
    """Return the order statistics between which the median lies with a confidence of 95 % or more, if there are any."""
    below = int(binom.ppf(0.025, len(ordered), 0.5))
    if below < 1 or binom.cdf(below - 1, len(ordered), 0.5) > 0.025:
        return -math.inf, math.inf
    return float(ordered[below - 1]), float(ordered[len(ordered) - below])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", type=Path, help="folder with pt/train/DOMAIN.jsonl and pt/heldout/DOMAIN.jsonl, or alpaca JSON"
    )
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each variant that count")
    parser.add_argument("--batch", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--cutoff", type=int, default=256, help="tokens of a row")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--template", default="", help="LLaMA-Factory's template for the model; with alpaca JSON")
    args = parser.parse_args()
    if args.data.is_file() != bool(args.template):
        parser.error("--template goes with alpaca JSON, and with that alone")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come: CPU time is then the work's, not the waiting's
    names = [PLAIN, *(name for name in args.variants if name != PLAIN)]
    with tempfile.TemporaryDirectory(prefix="dataflex-overhead-") as scratch:
        shape = args.batch, args.accumulation, args.cutoff, args.template
        found = measure(args.data, args.model, Path(scratch), names, args.rounds, *shape)
    print(f"{args.rounds} rounds; a step: {args.accumulation} x {args.batch} rows of {args.cutoff} tokens")
    print(table(found))


if __name__ == "__main__":
    main()
