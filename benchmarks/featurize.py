"""CPU-seconds per example for losses, embeddings and projected gradients, against what they are measured by.

The training pass is a plain LoRA forward and backward with Transformers' loss over all logits, without an optimizer.
The floor is a plain batched forward and backward pass of the frozen base model: activation gradients down to the
embedding, no gradient of any weight. The loop is what LESS-style tools do: one example at a time through autograd, then
a dense Rademacher projection in groups of 16; it is timed on a few rows, and its figures are per row of those. CPU time
of one thread: all cases in turn, the fastest of each.

Without --model a random Llama of hidden size 128; with it a pretrained model, on real rows by its chat template, of
which the responses are supervised. With --others bergson and dattri-llm run on the same rows (`benchmarks.others`).

python -m benchmarks.featurize --lengths 16 48 128 256
python -m benchmarks.featurize --model MODEL_DIR --rows ALPACA_JSON --supervised responses all
python -m benchmarks.featurize --others ENVIRONMENTS_DIR
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import others, pretrained
from benchmarks.passes import TRAINING, Bench, lines
from dataflex.features.engine import FeatureEngine


def build(length: int, count: int, token_budget: int) -> Bench:
    """Make a random Llama (h 128, 4 layers, vocabulary 4096), LoRA r 8 on all linears, and rows of about `length`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 4096}
    config: dict[str, Any] = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**config)).eval()
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(copy.deepcopy(base), adapter).eval()
    random = np.random.default_rng(0)
    rows = []
    for size in random.integers(max(2, length // 2), length * 3 // 2 + 1, count):
        tokens = random.integers(0, 4096, size).tolist()
        rows.append({"input_ids": tokens, "labels": tokens})
    bench = Bench(base.requires_grad_(False), FeatureEngine(model, pad_token_id=0, token_budget=token_budget), rows)
    bench.warm_up(steps=8)
    return bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128], help="mean tokens per row of the random model")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of all its rows together, per length")
    parser.add_argument("--single", type=int, default=16, help="its rows that go through the one-by-one loop")
    parser.add_argument("--token-budget", type=int, default=2048, help="tokens per batch, padding included")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="parts of the names of the cases to time, beside the training pass")
    real = parser.add_argument_group("a pretrained model")
    real.add_argument("--model", type=Path, help="model folder")
    real.add_argument("--rows", type=Path, help="alpaca JSON; needed with --model")
    real.add_argument("--count", type=int, default=35, help="rows")
    real.add_argument("--longest", type=int, default=256, help="tokens of a row; longer ones are passed over")
    real.add_argument("--share", type=float, default=0.26, help="of the tokens to be supervised, about")
    real.add_argument("--supervised", choices=("responses", "all"), nargs="+", default=("responses",))
    beside = parser.add_argument_group("other tools, on the same rows")
    beside.add_argument(
        "--others", type=Path, help="folder of their environments, which are made if they are not there"
    )
    beside.add_argument("--times", type=int, default=5, help="how often the rows stand in the second run of a case")
    beside.add_argument("--beside", nargs="+", default=("",), help="parts of the names of cases; all by default")
    args = parser.parse_args()
    if args.times < 2:
        parser.error("--times: expected 2 or more")
    if (args.model is None) != (args.rows is None):
        parser.error("--model and --rows go together")
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{versions}; 1 thread, CPU time, token budget {args.token_budget}")
    for bench in _benches(args):
        print(f"\n{bench.head_line()}", flush=True)
        found = bench.measure(args.repeats, args.single if args.model is None else 0, args.only)
        print(lines(found), flush=True)
        if args.others is not None:
            folder = args.others.resolve()
            asked = [name for name in others.CASES if any(part in name for part in args.beside)]
            figures = others.measure(bench, args.model, folder, asked, args.times, args.repeats)
            print(others.lines(figures, found[TRAINING], folder), flush=True)


def _benches(args: argparse.Namespace) -> Iterator[Bench]:
    """Make what is measured."""
    if args.model is None:
        for length in args.lengths:
            yield build(length, max(32, args.tokens // length), args.token_budget)
        return
    for supervised in args.supervised:
        yield pretrained.build(
            args.model, args.rows, args.count, args.longest, args.share, supervised, args.token_budget
        )


if __name__ == "__main__":
    main()
