"""CPU-seconds per example for losses, embeddings and projected gradients, against what they are measured by.

The floor is a plain batched forward and backward pass of the frozen base model: activation gradients down to the
embedding, no gradient of any weight. The loop is what LESS-style tools do: one example at a time through autograd, then
a dense Rademacher projection in groups of 16; it is timed on a few rows, and its figures are per row of those.

python -m benchmarks.featurize --lengths 16 48 128 256
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex.features.adam import Moments
from dataflex.features.batching import collate, plan_batches
from dataflex.features.engine import FeatureEngine
from dataflex.features.projection import build_projector
from dataflex.features.spec import EmbeddingSpec, FeatureSpec, GradientSpec, LossSpec, Projection
from dataflex.fingerprint import IGNORE_INDEX, digest, row_key
from dataflex.rows import KEY_DTYPE
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values

SGD, ADAM = GradientSpec(), GradientSpec(direction="adam")
CPU = torch.device("cpu")
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Bench:
    """One model with its adapter, and rows of one mean length."""

    base: Any
    engine: FeatureEngine
    rows: list[Example]

    def batches(self) -> list[list[Example]]:
        """Return the rows as the engine groups them."""
        plan = plan_batches([len(row["input_ids"]) for row in self.rows], self.engine.token_budget)
        return [[self.rows[i] for i in batch] for batch in plan]

    def floor(self) -> None:
        """Run the frozen base forward and backward, without its adapter."""
        for examples in self.batches():
            inputs = _inputs(examples)
            tokens = inputs.pop("input_ids")
            embedded = self.base.get_input_embeddings()(tokens).requires_grad_(True)
            self.base(inputs_embeds=embedded, **inputs, use_cache=False).loss.backward()

    def training(self) -> None:
        """Run forward and backward as training does: the mean gradient of the adapter, no example's own."""
        for examples in self.batches():
            self.engine.model.zero_grad()
            self.engine.model(**_inputs(examples), use_cache=False).loss.backward()
        self.engine.model.zero_grad()

    def features(self, *specs: FeatureSpec, stored: bool = False) -> None:
        """Compute features, and write them into new stores as float16."""
        found = self.engine.compute(self.rows, specs)
        if not stored:
            return
        keys = np.array([row_key(row["input_ids"], row["labels"]) for row in self.rows], dtype=KEY_DTYPE)
        with tempfile.TemporaryDirectory(prefix="dataflex-bench-") as folder:
            for spec, values in zip(specs, found, strict=True):
                width = 0 if values.vectors is None else values.vectors.shape[1]
                layout = Layout({n: c.dtype.name for n, c in values.scalars.items()}, width, "float16")
                recipe = spec.model_dump()
                store = StoreRoot(folder).open(spec.kind, recipe, layout)
                store.append(digest(recipe), Values(keys, values.status, values.scalars, values.vectors))

    def loop(self, count: int) -> tuple[float, float]:
        """Return CPU-seconds per row of the gradients one by one, and of their dense projection."""
        named = dict(self.engine.model.named_parameters())
        parameters = self.engine.parameters
        dense = build_projector(Projection(type="rademacher"), {p.key: p.size for p in parameters})
        begun, gradients = time.process_time(), []
        for row in self.rows[:count]:
            loss = self.engine.model(**_inputs([row]), use_cache=False).loss
            gradients.append(torch.autograd.grad(loss, [named[p.name] for p in parameters]))
        between = time.process_time()
        for start in range(0, count, 16):
            group = gradients[start : start + 16]
            y = dense.zeros(len(group), CPU)
            for p, parts in zip(parameters, zip(*group, strict=True), strict=True):
                dense.add(y, p.key, 0, torch.stack([part.reshape(-1) for part in parts]))
        return (between - begun) / count, (time.process_time() - between) / count


def _inputs(examples: Sequence[Example]) -> dict[str, Any]:
    batch = collate(examples, 0, "right", CPU)
    labels = nn.functional.pad(batch.targets, (1, 0), value=IGNORE_INDEX)[:, :-1]
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


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
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for start in range(0, 32, 4):
        model(**_inputs(rows[start : start + 4]), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    bench.engine.moments = Moments.from_optimizer(optimizer, model.named_parameters())
    return bench


def measure(bench: Bench, repeats: int, single: int) -> None:
    """Time all cases in turn, `repeats` times, and print the fastest of each: neighbours can only slow one down."""
    everything = (LossSpec(), EmbeddingSpec(), SGD, ADAM)
    cases: dict[str, Callable[[], None]] = {
        "floor: frozen base, forward + backward": bench.floor,
        "LoRA training pass (no optimizer)": bench.training,
        "loss": lambda: bench.features(LossSpec()),
        "embedding": lambda: bench.features(EmbeddingSpec()),
        "SGD gradient, 8192": lambda: bench.features(SGD),
        "Adam gradient, 8192": lambda: bench.features(ADAM),
        "SGD gradient, loss, stored fp16": lambda: bench.features(LossSpec(), SGD, stored=True),
        "Adam gradient, loss, stored fp16": lambda: bench.features(LossSpec(), ADAM, stored=True),
        "loss, embedding, SGD and Adam, stored": lambda: bench.features(*everything, stored=True),
    }
    best = dict.fromkeys(cases, float("inf"))
    for repeat in range(repeats + 1):
        for name, case in cases.items():
            begun = time.process_time()
            case()
            if repeat:  # the first round fills caches and projection tables
                best[name] = min(best[name], (time.process_time() - begun) / len(bench.rows))
    gradient, projection = bench.loop(single)
    best[f"loop: one by one ({single} rows)"] = gradient
    best[f"loop and dense projection to 8192 ({single} rows)"] = gradient + projection
    floor = best["floor: frozen base, forward + backward"]
    mean = np.mean([len(row["input_ids"]) for row in bench.rows])
    print(f"\n{len(bench.rows)} rows of {mean:.0f} tokens, {sum(p.size for p in bench.engine.parameters)} parameters")
    for name, seconds in best.items():
        print(f"  {name:46s} {seconds * 1e3:8.2f} ms/row {1 / seconds:8.1f} rows/s {seconds / floor:7.2f} x floor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128], help="mean tokens per row")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of all rows together, per length")
    parser.add_argument("--token-budget", type=int, default=2048, help="tokens per batch, padding included")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--single", type=int, default=16, help="rows of the one-by-one loop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, CPU time, token budget {args.token_budget}")
    for length in args.lengths:
        measure(build(length, max(32, args.tokens // length), args.token_budget), args.repeats, args.single)


if __name__ == "__main__":
    main()
