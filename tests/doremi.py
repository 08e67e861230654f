"""DoReMi over three domains of texts: its run files, and what it computes in plain loops over recorded token losses."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.trainers.micro_batch import MicroBatch
from dataflex.trainers.observer import Observer
from dataflex.trainers.trainer import DataflexTrainer
from tests.weighed import linupper
from tests.workspace import in_force

DOMAINS = ("words", "sums", "lists")


EPS = 1e-3


@dataclass
class Seen:
    """What went through trainings, in order.

    Attributes:
        rows: for each observed row (call of `observe`, domain, tokens, loss of each token after the first).
        calls: calls of `observe`.
        begun: weights before each optimizer step's first micro-batch.
        grads: gradients after each optimizer step's last.
        parts: micro-batches of a step.
        trained: for each micro-batch, its rows as (domain, tokens, labels).
    """

    rows: list[tuple[int, int, list[int], list[float]]] = field(default_factory=list)
    calls: int = 0
    begun: list[dict[str, Any]] = field(default_factory=list)
    grads: list[dict[str, Any]] = field(default_factory=list)
    trained: list[list[tuple[int, list[int], list[int]]]] = field(default_factory=list)
    parts: int = 1

    def step(self, number: int) -> list[tuple[int, list[int], list[int]]]:
        """Return an optimizer step's rows, if all runs accumulated alike."""
        return list(itertools.chain(*self.trained[number * self.parts : (number + 1) * self.parts]))


def watched(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Note what the observer is shown and what every optimizer step's gradient is."""
    found = Seen()
    observe, step = Observer.observe, DataflexTrainer.training_step

    def observed(self: Observer, batch: MicroBatch) -> None:
        for i, row in enumerate(batch.rows.tolist()):
            length = int(batch.inputs["attention_mask"][i].sum())
            tokens = batch.inputs["input_ids"][i, :length].tolist()
            losses = batch.losses[i].detach().double()
            assert not losses[length - 1 :].any()
            found.rows.append((found.calls, int(self.domains[row]), tokens, losses[: length - 1].tolist()))
        found.calls += 1
        observe(self, batch)

    def stepped(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        number, found.parts = len(found.trained), self.args.gradient_accumulation_steps
        rows = self.row_sets.train
        domains = {tuple(rows.examples[i]["input_ids"]): int(rows.dataset[i]) for i in range(len(rows))}
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        ids, labels = (
            [x[:n].tolist() for x, n in zip(inputs[k], lengths, strict=True)] for k in ("input_ids", "labels")
        )
        found.trained.append([(domains[tuple(i)], i, given) for i, given in zip(ids, labels, strict=True)])
        if number % found.parts == 0:
            found.begun.append({k: v.detach().clone() for k, v in self.model.state_dict().items()})
        out = step(self, model, inputs, *args)
        if number % found.parts == found.parts - 1:
            found.grads.append({k: p.grad.detach().clone() for k, p in self.model.named_parameters()})
        return out

    monkeypatch.setattr(Observer, "observe", observed)
    monkeypatch.setattr(DataflexTrainer, "training_step", stepped)
    return found


def write(workspace: Any, name: str, **keys: Any) -> Path:
    """Write a run file over three domains of texts, trained whole."""
    values: dict[str, Any] = {
        "stage": "pt",
        "template": None,
        "finetuning_type": "full",
        **{key: None for key in ("lora_target", "lora_rank", "lora_dropout", "eval_dataset")},
        **{key: None for key in ("warmup_step", "update_step", "update_times", "save_steps")},
        "dataset_dir": str(workspace.folder / "data"),
        "dataset": ",".join(DOMAINS),
        "cutoff_len": 24,
        "packing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "train_type": "dynamic_mix",
        "train_step": 4,
    }
    params = keys.pop("params", {})
    values["dataflex"] = {"store": str(workspace.folder / "store"), "storage": "float32"}
    if params:
        values["dataflex"]["params"] = params
    path: Path = workspace.write(name, **{**values, **keys})
    return path


def proxy(workspace: Any, name: str, keys: dict[str, Any] | None = None, **params: Any) -> Path:
    given = {"reference_model_path": str(workspace.folder / "out" / "reference"), "reweight_eta": 4.0, **params}
    return write(workspace, name, component_name="doremi", params=given, **(keys or {}))


def prepare(space: Any) -> Any:
    """Train a reference in a workspace, and featurize its token losses with the run file of `proxy`."""
    from examples.quickstart.pool import write_datasets

    rng = np.random.default_rng(2)
    words = ["apple", "river", "stone", "cloud", "grass", "light"]
    texts = {
        "words": [" ".join(rng.choice(words, rng.integers(2, 6))) for _ in range(10)],
        "sums": [f"{a} + {b} = {a + b}" for a, b in rng.integers(0, 99, (8, 2)).tolist()],
        "lists": [str(rng.integers(0, 9, rng.integers(3, 7)).tolist()) for _ in range(6)],
    }
    write_datasets(space.folder / "data", {name: [{"text": t} for t in several] for name, several in texts.items()})
    space.run("train", write(space, "reference", component_name="stratified", train_step=6))
    space.run("featurize", proxy(space, "proxy"))
    return space


def token_losses(folder: Path) -> Callable[[Sequence[int]], list[float]]:
    """Return a function of a row's tokens: its losses under a model, computed for that row alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def losses(tokens: Sequence[int]) -> list[float]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(tokens)])).logits[0].double()
        return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none").tolist()

    return losses


def alphas(
    seen: Seen, reference: Callable[[Sequence[int]], list[float]], calls: int, eta: float = 4.0, eps: float = EPS
) -> list[list[float]]:
    """Return alpha before the first step and after each, by loops over recorded losses; `calls` are those of a step."""
    alpha, score = [1 / 3] * 3, [0.0] * 3
    history = [alpha]
    for step in range(seen.calls // calls):
        excess: list[list[float]] = [[], [], []]
        for call, domain, tokens, losses in seen.rows:
            if call // calls == step:
                excess[domain] += [
                    max(ours - theirs, 0.0)
                    for ours, theirs in zip(losses, reference(tokens), strict=True)
                    if math.isfinite(ours) and math.isfinite(theirs)
                ]
        score = [sum(e) / len(e) if e else held for e, held in zip(excess, score, strict=True)]
        raised = [a * math.exp(eta * s) for a, s in zip(alpha, score, strict=True)]
        alpha = [(1 - eps) * r / sum(raised) + eps / 3 for r in raised]
        history.append(alpha)
    return history


def history(space: Any, name: str) -> np.ndarray:
    """(steps + 1, K) alpha in force at each step, and after the last, as the run wrote it."""
    return np.array([[line["alpha"][name] for name in DOMAINS] for line in in_force(space, name)])


def outcome(space: Any, name: str) -> np.ndarray:
    found = json.loads((space.folder / "out" / name / "mixture_proportions.json").read_text("utf-8"))
    return np.array([found["proportions"][domain] for domain in DOMAINS])


def gradient(
    space: Any, seen: Seen, step: int, form: str, weights: Sequence[float], sharp: float | None = None
) -> dict[str, Any]:
    """Return the gradient of a step's weighted loss, in float64, by a loop over its rows.

    paper: sum_i w_i x mean loss of domain i's tokens, w normalised over the domains present. official: sum of w x loss
    over sum of w, over tokens. Both times T / N: tokens that are targets over those that Transformers divides by.
    sharp: a row's losses are first multiplied by the weight of `linupper` over the step's rows at this temperature, and
    the product of both factors is brought back to the mean that the domains' factor has over the rows.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(space.tiny.model)
    model.load_state_dict(seen.begun[step])
    model.double().train()
    losses: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    rows = []
    for domain, tokens, labels in seen.step(step):
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        found = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="none")
        rows.append((domain, [loss for loss, label in zip(found, labels[1:], strict=True) if label != -100]))
    means = [float(sum(row).detach()) / len(row) for _, row in rows]
    factors = linupper(means, sharp) if sharp else [1.0] * len(rows)
    if sharp and form == "paper":
        tokens = [sum(len(row) for d, row in rows if d == domain) for domain, _ in rows]
        others = [weights[domain] / count for (domain, _), count in zip(rows, tokens, strict=True)]
        both = [factor * other for factor, other in zip(factors, others, strict=True)]
        factors = [factor * sum(others) / sum(both) for factor in factors]
    for (domain, row), factor in zip(rows, factors, strict=True):
        losses[domain] += [factor * loss for loss in row]
    present = [d for d in losses if losses[d]]
    total: Any
    if form == "paper":
        total = sum(weights[d] * sum(losses[d]) / len(losses[d]) for d in present) / sum(weights[d] for d in present)
    else:
        total = sum(weights[d] * sum(losses[d]) for d in present) / sum(weights[d] * len(losses[d]) for d in present)
    targets = sum(len(several) for several in losses.values())
    counted = sum(label != -100 for _, _, labels in seen.step(step) for label in labels)
    (total * targets / counted).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Compare all numbers together, by the norm."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[k].double() - expected[k]).square().sum()) for k in found) ** 0.5
    size = sum(float(expected[k].square().sum()) for k in expected) ** 0.5
    assert apart <= tolerance * size, (apart, size)
