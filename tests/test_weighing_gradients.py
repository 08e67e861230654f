"""The step that each weighter takes is the gradient of its weighted loss, by loops over single examples in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dataflex.config import load
from tests.weighed import linupper
from tests.workspace import assert_alike, difference, logged, shaped, weigh

SHARP = {"temperature": 0.2}


# ---- one step against loops in float64


def examples(batches: Sequence[Mapping[str, Any]]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return ids and labels of every example of every micro-batch, without padding."""
    return [
        [(ids[m.bool()], labels[m.bool()]) for ids, labels, m in zip(*(b[k] for k in KEYS), strict=True)]
        for b in batches
    ]


KEYS = ("input_ids", "labels", "attention_mask")


class Alone:
    """The tiny model in float64, one example at a time."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def losses(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each supervised token."""
        logits = self.model(input_ids=ids[None]).logits[0, :-1]
        targets = labels[1:]
        return -logits.log_softmax(-1)[torch.arange(len(targets)), targets.clamp(min=0)][targets >= 0]

    @torch.no_grad()
    def vector(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the mean of the last hidden states, later ones counting more, at length 1."""
        states = self.model.model(input_ids=ids[None]).last_hidden_state[0]
        place = torch.arange(1, len(ids) + 1, dtype=torch.float64)
        pooled = (place[:, None] * states).sum(0) / place.sum()
        return pooled / pooled.norm()

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the gradient of all parameters as one vector, by name."""
        named = sorted(self.model.named_parameters())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for _, p in named])])


def step_taken(workspace: Any, name: str, rate: float) -> torch.Tensor:
    """Return the gradient that a run's only step followed, as `Alone.gradient` has it."""
    from safetensors.torch import load_file

    before, after = load_file(workspace.tiny.model / "model.safetensors"), workspace.weights(name)
    named = sorted(k for k in after if k in before)
    return torch.cat([((before[k].double() - after[k].double()) / rate).flatten() for k in named])


def expected_loss(
    alone: Alone, batches: Sequence[Any], weights: Callable[[list[float]], list[float]], scope: str, reduction: str
) -> torch.Tensor:
    """Return the loss of a step, each example run alone."""
    tokens = [[alone.losses(*one) for one in batch] for batch in batches]
    means = [[float(t.detach().mean()) for t in batch] for batch in tokens]
    if scope == "batch":
        flat = weights([m for batch in means for m in batch])
        found = [[flat.pop(0) for _ in batch] for batch in means]
    else:
        found = [weights(batch) for batch in means]
    pairs = [
        (w, t, len(batch)) for ws, batch in zip(found, tokens, strict=True) for w, t in zip(ws, batch, strict=True)
    ]
    if reduction == "token":
        return sum(w * t.sum() for w, t, _ in pairs) / sum(len(t) for _, t, _ in pairs)  # type: ignore[return-value]
    return sum(w * t.mean() / size for w, t, size in pairs) / len(batches)  # type: ignore[return-value]


ONE_STEP = {"max_steps": 1, "learning_rate": 4.0, "disable_shuffling": True}


@pytest.mark.parametrize(
    ("scope", "reduction"),
    [
        ("micro_batch", "token"),
        ("batch", "example"),
        pytest.param("micro_batch", "example", marks=pytest.mark.slow),
        pytest.param("batch", "token", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_the_loss_weighter_equals_loops(workspace, batches, scope, reduction):
    params = {**SHARP, "normalisation": scope, "reduction": reduction}
    workspace.run("train", weigh(workspace, "one", "loss", params, **shaped((3, 2), **ONE_STEP)))
    alone = Alone(workspace.tiny.model)
    loss = expected_loss(alone, examples(batches), lambda losses: linupper(losses, 0.2), scope, reduction)
    assert logged(workspace, "one") == pytest.approx([float(loss.detach())], rel=1e-5)
    means = [[float(alone.losses(*one).detach().mean()) for one in batch] for batch in examples(batches)]
    groups = [linupper(m, 0.2) for m in (means if scope == "micro_batch" else [[m for batch in means for m in batch]])]
    spread = {
        "dataflex/weight_mean": 1.0,
        "dataflex/weight_max": max(max(group) for group in groups),
        "dataflex/weight_ess": float(np.mean([sum(g) ** 2 / sum(w * w for w in g) / len(g) for g in groups])),
    }
    assert spread["dataflex/weight_ess"] < 0.9
    for key, value in spread.items():
        assert logged(workspace, "one", key) == pytest.approx([value], rel=1e-5)
    expected, found = alone.gradient(loss), step_taken(workspace, "one", 4.0)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    others = {("micro_batch", "token"), ("micro_batch", "example"), ("batch", "token"), ("batch", "example")}
    for other in others - {(scope, reduction)}:  # so that a mistaken scope or reduction would be seen
        wrong = expected_loss(alone, examples(batches), lambda losses: linupper(losses, 0.2), *other)
        assert float((found - alone.gradient(wrong)).norm() / expected.norm()) > 1e-2


def test_a_step_of_adapt_equals_loops(workspace, batches):
    keys = shaped((2, 2), **ONE_STEP, eval_dataset=",".join(workspace.tiny.targets[:2]))
    workspace.run("train", weigh(workspace, "one", "adapt", {"tau": 0.5, "anchor_batch_size": 5}, **keys))
    alone = Alone(workspace.tiny.model)
    path = weigh(workspace, "rows", None, **{**keys, "dataset": keys["eval_dataset"], "eval_dataset": None})
    anchors = [alone.vector(torch.tensor(ids)) for ids in processed(path)]
    assert len(anchors) == 16
    near = [[float(torch.stack(anchors).matmul(alone.vector(ids)).mean()) for ids, _ in b] for b in examples(batches)]
    flat = [1 / (1 + math.exp(-s / 0.5)) for batch in near for s in batch]
    assert np.ptp(flat) > 0.02
    loss = expected_loss(alone, examples(batches), lambda _: list(flat), "batch", "token")
    expected, found = alone.gradient(loss), step_taken(workspace, "one", 4.0)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def processed(path: Path) -> list[list[int]]:
    """Return the token ids of a run's training rows, by LLaMA-Factory's own functions."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    arguments = {**load(path).llamafactory}
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    return get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"][
        "input_ids"
    ]


# ---- feature


def test_features_from_a_store_and_from_a_file(workspace, batches):
    keys = shaped((2, 2), **ONE_STEP)
    exponential = {"function": "exp", "temperature": 0.1}
    path = weigh(workspace, "stored", "feature", {"feature": {"kind": "loss"}, **exponential}, **keys)
    assert workspace.run("train", path)["computed"] > 0
    assert workspace.run("train", path, "overwrite_output_dir=true")["computed"] == 0
    alone, rows = Alone(workspace.tiny.model), examples(batches[:2])

    def weights(losses: list[float]) -> list[float]:
        found = np.exp(np.array(losses) / 0.1)
        return list(found / found.mean())

    loss = expected_loss(alone, rows, weights, "micro_batch", "token")
    expected = alone.gradient(loss)
    assert float((step_taken(workspace, "stored", 4.0) - expected).norm() / expected.norm()) < 1e-4
    # The same numbers from a file; rows 0 to 3 are trained on, as nothing is shuffled.
    losses = [float(alone.losses(*one).detach().mean()) for batch in rows for one in batch]
    file = workspace.folder / "scores.parquet"
    pq.write_table(pa.table({"index": range(4), "score": losses}), file)
    workspace.run("train", weigh(workspace, "file", "feature", {"path": str(file), **exponential}, **keys))
    assert_alike(workspace, "stored", "file")
    # At the first step the live model is the reference, so nothing is in excess, and every weight is 1.
    excess = {"feature": {"kind": "loss"}, "excess": True, "function": "exp", "temperature": 0.01}
    workspace.run("train", weigh(workspace, "excess", "feature", excess, **keys))
    workspace.run("train", weigh(workspace, "plain", None, **keys))
    assert difference(workspace, "plain", "excess") < 1e-3
    assert difference(workspace, "plain", "stored") > 1e-2
