"""A model with its adapter, rows, and the passes over them whose CPU time is taken."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataflex.features.adam import Moments
from dataflex.features.batching import collate, plan_batches
from dataflex.features.engine import FeatureEngine
from dataflex.features.head import Head, find_head
from dataflex.features.projection import build_projector
from dataflex.features.spec import (
    EmbeddingSpec,
    FeatureSpec,
    GradientSpec,
    LossSpec,
    Projection,
    TokenLossSpec,
)
from dataflex.fingerprint import IGNORE_INDEX, digest, row_key
from dataflex.rows import KEY_DTYPE
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values

SGD, ADAM = GradientSpec(), GradientSpec(direction="adam")
CPU = torch.device("cpu")
TRAINING = "LoRA training pass, all logits"
FLOOR = "floor: frozen base, forward + backward"
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Bench:
    """One model without its adapter and, in the engine, with it; and rows."""

    base: Any
    engine: FeatureEngine
    rows: list[Example]

    def batches(self) -> list[list[Example]]:
        """Return the rows as the engine groups them."""
        plan = plan_batches([len(row["input_ids"]) for row in self.rows], self.engine.token_budget)
        return [[self.rows[i] for i in batch] for batch in plan]

    def forward(self) -> None:
        """Run the frozen base forward, with all logits and Transformers' loss."""
        with torch.no_grad():
            for examples in self.batches():
                self.base(**inputs(examples), use_cache=False)

    def floor(self) -> None:
        """Run the frozen base forward and backward, without its adapter."""
        for examples in self.batches():
            given = inputs(examples)
            embedded = self.base.get_input_embeddings()(given.pop("input_ids")).requires_grad_(True)
            self.base(inputs_embeds=embedded, **given, use_cache=False).loss.backward()

    def training(self) -> None:
        """Run forward and backward as training does: the mean gradient of the adapter, no example's own."""
        for examples in self.batches():
            self.engine.model.zero_grad()
            self.engine.model(**inputs(examples), use_cache=False).loss.backward()
        self.engine.model.zero_grad()

    def training_apart(self) -> None:
        """Run the training pass as weighters and mixers do: logits of supervised tokens alone."""
        for examples in self.batches():
            self.engine.model.zero_grad()
            given = inputs(examples)
            targets = nn.functional.pad(given.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
            with self._head.apart() as states:
                self.engine.model(**given, use_cache=False)
            losses = self._head.losses(states[0], targets)
            (losses.sum() / (targets >= 0).sum()).backward()
        self.engine.model.zero_grad()

    @cached_property
    def _head(self) -> Head:
        def run(tokens: list[int]) -> Any:
            with torch.no_grad():
                return self.engine.model(input_ids=torch.tensor([tokens]))

        head = find_head(self.engine.model, run)
        assert head is not None, "the model's head cannot be run apart from it"
        return head

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
            loss = self.engine.model(**inputs([row]), use_cache=False).loss
            gradients.append(torch.autograd.grad(loss, [named[p.name] for p in parameters]))
        between = time.process_time()
        for start in range(0, count, 16):
            group = gradients[start : start + 16]
            y = dense.zeros(len(group), CPU)
            for p, parts in zip(parameters, zip(*group, strict=True), strict=True):
                dense.add(y, p.key, 0, torch.stack([part.reshape(-1) for part in parts]))
        return (between - begun) / count, (time.process_time() - between) / count

    def warm_up(self, steps: int, batch: int = 4) -> None:
        """Train for some steps, so that B is not zero and Adam has moments."""
        trained = [p for p in self.engine.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        for step in range(steps):
            rows = [self.rows[(batch * step + i) % len(self.rows)] for i in range(batch)]
            self.engine.model(**inputs(rows), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.engine.moments = Moments.from_optimizer(optimizer, self.engine.model.named_parameters())

    def cases(self) -> dict[str, Callable[[Bench], None]]:
        """Return what is timed, by name."""
        everything = (LossSpec(), EmbeddingSpec(), SGD, ADAM)
        return {
            "forward: frozen base": Bench.forward,
            FLOOR: Bench.floor,
            TRAINING: Bench.training,
            "LoRA training pass, logits where labels are": Bench.training_apart,
            "loss": lambda bench: bench.features(LossSpec()),
            "token losses": lambda bench: bench.features(TokenLossSpec()),
            "embedding": lambda bench: bench.features(EmbeddingSpec()),
            "SGD gradient, 8192": lambda bench: bench.features(SGD),
            "Adam gradient, 8192": lambda bench: bench.features(ADAM),
            "SGD gradient, loss, stored fp16": lambda bench: bench.features(LossSpec(), SGD, stored=True),
            "Adam gradient, loss, stored fp16": lambda bench: bench.features(LossSpec(), ADAM, stored=True),
            "loss, embedding, SGD and Adam, stored": lambda bench: bench.features(*everything, stored=True),
        }

    def measure(self, repeats: int, single: int = 0, only: Collection[str] | None = None) -> dict[str, float]:
        """Return CPU-seconds a row of each case: all in turn, `repeats` times, the fastest of each.

        Neighbours can only slow one down. `single` rows go through the one-by-one loop as well; with `only`,
        of the cases but the training pass those whose name has one of these parts.
        """
        cases = {
            name: case
            for name, case in self.cases().items()
            if only is None or name == TRAINING or any(part in name for part in only)
        }
        few = replace(self, rows=self.rows[:1])
        for case in cases.values():  # fills caches and projection tables
            case(few)
        best = dict.fromkeys(cases, float("inf"))
        for _ in range(repeats):
            for name, case in cases.items():
                begun = time.process_time()
                case(self)
                best[name] = min(best[name], (time.process_time() - begun) / len(self.rows))
        if single:
            gradient, projection = self.loop(single)
            best[f"loop: one by one ({single} rows)"] = gradient
            best[f"loop and dense projection to 8192 ({single} rows)"] = gradient + projection
        return best

    def head_line(self) -> str:
        """Return what the rows and the adapter are."""
        tokens = sum(len(row["input_ids"]) for row in self.rows)
        share = sum(label >= 0 for row in self.rows for label in row["labels"][1:]) / tokens
        parameters = sum(p.size for p in self.engine.parameters)
        return (
            f"{len(self.rows)} rows of {tokens / len(self.rows):.0f} tokens, {share:.0%} of them supervised; "
            f"{parameters} parameters are trained"
        )


def inputs(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return what Transformers' model takes, rows padded to the longest."""
    batch = collate(examples, 0, "right", CPU)
    labels = nn.functional.pad(batch.targets, (1, 0), value=IGNORE_INDEX)[:, :-1]
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def lines(found: Mapping[str, float]) -> str:
    """Return the table: CPU-milliseconds a row, and the ratios to the training pass and, if it was timed, the floor."""
    bases = [name for name in (TRAINING, FLOOR) if name in found]
    out = [f"  {'':46s} {'ms/row':>8s} {'x training':>11s}" + f" {'x floor':>11s}" * (FLOOR in found)]
    for name, seconds in found.items():
        ratios = " ".join(f"{seconds / found[base]:11.2f}" for base in bases)
        out.append(f"  {name:46s} {seconds * 1e3:8.2f} {ratios}")
    return "\n".join(out)
