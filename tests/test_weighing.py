"""`train_type: dynamic_weight`: real trainings against plain ones, loops in float64, and their own resumption."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dataflex.config import load
from dataflex.errors import ConfigError, MismatchError
from dataflex.trainers.micro_batch import ROWS
from dataflex.trainers.trainer import DataflexTrainer
from dataflex.weighters.adapt import Adapt
from tests.processes import launch_several
from tests.weighed import linupper
from tests.workspace import assert_alike, difference, logged, shaped, weigh

SHARP = {"temperature": 0.2}
TEXT = {"stage": "pt", "template": None, "dataset": "text"}
SHAPES = [(4, 1), (2, 2), (1, 4)]


# ---- equal weights are the plain loss


@pytest.mark.parametrize(
    ("stage", "shape", "average"),
    [
        ("sft", (2, 2), True),
        ("sft", (2, 2), False),
        ("pt", (2, 2), True),
        *(pytest.param(stage, shape, True, marks=pytest.mark.slow) for stage in ("sft", "pt") for shape in SHAPES[::2]),
    ],
)
def test_equal_weights_are_plain_training(workspace, stage, shape, average):
    keys = shaped(shape, average_tokens_across_devices=average, **(TEXT if stage == "pt" else {}))
    workspace.run("train", weigh(workspace, "plain", None, **keys))
    workspace.run("train", weigh(workspace, "equal", "loss", {"strategy": "uniform"}, **keys))
    assert_alike(workspace, "plain", "equal")


def test_a_model_is_fed_what_it_knows(workspace, monkeypatch):
    """Transformers' models pass over keys that they do not know; those of others' code raise."""
    from transformers import Qwen2ForCausalLM

    fed: set[str] = set()
    forward = Qwen2ForCausalLM.forward

    def noted(self: Any, *args: Any, **given: Any) -> Any:
        fed.update(given)
        return forward(self, *args, **given)

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", noted)
    workspace.run("train", weigh(workspace, "plain", None, **shaped((2, 2))))
    plain = set(fed)
    workspace.run("train", weigh(workspace, "weighted", "loss", {"normalisation": "batch"}, **shaped((2, 2))))
    assert {"input_ids", "attention_mask"} <= fed <= plain


def test_equal_weights_are_plain_training_where_the_plain_step_is_a_mean_of_means(workspace, monkeypatch):
    """As Transformers has it for models that read images, and for some of others' code."""
    from transformers import Qwen2ForCausalLM

    monkeypatch.setattr(Qwen2ForCausalLM, "accepts_loss_kwargs", False, raising=False)
    # Of 62 rows the last step has one micro-batch in place of three, and that has two rows.
    keys = shaped((4, 3), max_steps=6)
    workspace.run("train", weigh(workspace, "plain", None, **keys))
    workspace.run("train", weigh(workspace, "equal", "loss", {"strategy": "uniform"}, **keys))
    assert_alike(workspace, "plain", "equal")
    monkeypatch.undo()
    workspace.run("train", weigh(workspace, "tokens", "loss", {"strategy": "uniform"}, **keys))
    assert difference(workspace, "equal", "tokens") > 1e-3


def test_an_epoch_ends_and_evaluation_is_plain(workspace):
    """Steps with fewer micro-batches; evaluations between them; and both give what plain training gives."""
    more = {"max_steps": None, "num_train_epochs": 1.1, "eval_dataset": "target_words", "eval_strategy": "steps"}
    keys = shaped((4, 3), eval_steps=3, **more)
    workspace.run("train", weigh(workspace, "plain", None, **keys))
    workspace.run("train", weigh(workspace, "equal", "loss", {"strategy": "uniform"}, **keys))
    assert_alike(workspace, "plain", "equal")
    evaluated = logged(workspace, "equal", "eval_loss")
    assert len(evaluated) >= 2
    np.testing.assert_allclose(evaluated, logged(workspace, "plain", "eval_loss"), rtol=1e-5)


def test_warm_up_is_plain_and_the_weights_begin_without_a_jump(workspace):
    """With four micro-batches a step, a division too many or too few would be a factor of four."""
    keys = shaped((2, 4), max_steps=4)
    workspace.run("train", weigh(workspace, "plain", None, **keys))
    workspace.run("train", weigh(workspace, "warm", "loss", {"temperature": 2.0}, warmup_step=2, **keys))
    plain, warm = (np.array(logged(workspace, name)) for name in ("plain", "warm"))
    np.testing.assert_allclose(warm[:2], plain[:2], rtol=2e-6)
    assert (np.abs(warm[2:] / plain[2:] - 1) > 1e-5).all()
    np.testing.assert_allclose(warm[2:], plain[2:], rtol=0.3)
    norms = [np.array(logged(workspace, name, "grad_norm")) for name in ("plain", "warm")]
    np.testing.assert_allclose(norms[1][:2], norms[0][:2], rtol=1e-4)
    np.testing.assert_allclose(norms[1][2:], norms[0][2:], rtol=0.5)


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
        "weight_mean": 1.0,
        "weight_max": max(max(group) for group in groups),
        "weight_ess": float(np.mean([sum(g) ** 2 / sum(w * w for w in g) / len(g) for g in groups])),
    }
    assert spread["weight_ess"] < 0.9
    for key, value in spread.items():
        assert logged(workspace, "one", key) == pytest.approx([value], rel=1e-5)
    expected, found = alone.gradient(loss), step_taken(workspace, "one", 4.0)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    others = {("micro_batch", "token"), ("micro_batch", "example"), ("batch", "token"), ("batch", "example")}
    for other in others - {(scope, reduction)}:  # so that a mistaken scope or reduction would be seen
        wrong = expected_loss(alone, examples(batches), lambda losses: linupper(losses, 0.2), *other)
        assert float((found - alone.gradient(wrong)).norm() / expected.norm()) > 1e-2


def test_an_example_alone_cannot_be_compared(workspace):
    """Its weight would be 1 whatever the method: an error, and not a plain run under another name."""
    keys = shaped((1, 2))
    with pytest.raises(ConfigError, match="found micro-batches of one example"):
        workspace.run("train", weigh(workspace, "alone", "loss", **keys))
    with pytest.raises(ConfigError, match="found optimizer steps of one example"):
        workspace.run("train", weigh(workspace, "alone", "loss", {"normalisation": "batch"}, **shaped((1, 1))))
    workspace.run("train", weigh(workspace, "pair", "loss", {"normalisation": "batch"}, **keys))
    assert max(logged(workspace, "pair", "weight_max")) > 1.1


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


# ---- adapt


def test_anchors_are_embedded_once_per_interval_whatever_the_batch(workspace, monkeypatch):
    steps: dict[str, list[int]] = {}
    seen: list[int] = []
    taken, signal = Adapt.set_anchors, Adapt.signal

    def noted(self: Any, mean: Any, step: int) -> None:
        steps[name].append(step)
        taken(self, mean, step)

    def counted(self: Any, given: Any) -> Any:
        seen.append(len(given.rows))
        return signal(self, given)

    monkeypatch.setattr(Adapt, "set_anchors", noted)
    monkeypatch.setattr(Adapt, "signal", counted)
    params = {"tau": 0.5, "refresh_interval": 2}
    for shape in SHAPES:
        name, seen[:] = f"b{shape[0]}", []
        steps[name] = []
        path = weigh(workspace, name, "adapt", params, **shaped(shape, max_steps=5, eval_dataset="target_words"))
        workspace.run("train", path)
        assert steps[name] == [0, 2, 4]
        assert seen == [shape[0]] * shape[1] * 5
    # Absolute weights are each example's own: nothing depends on how a step is divided.
    assert_alike(workspace, "b4", "b2")
    assert_alike(workspace, "b4", "b1")


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


# ---- resumption


@contextmanager
def crash_after(step: int) -> Iterator[None]:
    """End a run as soon as a checkpoint is complete."""

    class Crash(Exception):
        pass

    saving = DataflexTrainer._save_checkpoint

    def crash(self: Any, *args: Any) -> None:
        saving(self, *args)
        if self.state.global_step == step:
            raise Crash

    DataflexTrainer._save_checkpoint = crash  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(Crash):
            yield
    finally:
        DataflexTrainer._save_checkpoint = saving  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("loss", {**SHARP, "normalisation": "batch", "schedule": "linear", "anneal_steps": 3}),
        ("adapt", {"tau": 0.5, "refresh_interval": 3}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(workspace, batches, method, params):
    """With dropout: what is computed ahead, and the anchors, must not move a random state."""
    lora = {"finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "lora_dropout": 0.1}
    keys = {**lora, "save_strategy": "steps", "save_steps": 1, "max_steps": 4, "optim": None, "learning_rate": 1e-2}
    keys["eval_dataset"] = "target_words"
    workspace.run("train", weigh(workspace, "whole", method, params, **keys))
    whole = [batch[ROWS].tolist() for batch in batches]
    batches.clear()
    path = weigh(workspace, "halves", method, params, **keys)
    with crash_after(2):
        workspace.run("train", path)
    workspace.run("train", path)
    assert [batch[ROWS].tolist() for batch in batches] == whole
    one, other = workspace.weights("whole"), workspace.weights("halves")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert logged(workspace, "halves") == logged(workspace, "whole")


def test_a_checkpoint_of_another_run_is_refused(workspace):
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    workspace.run("train", weigh(workspace, "one", "loss", **keys))
    again = weigh(workspace, "one", "adapt", **{**keys, "max_steps": 2, "eval_dataset": "target_words"})
    with pytest.raises(MismatchError, match="found the weighter loss, this run has adapt"):
        workspace.run("train", again)
    mixed = {**keys, "train_type": "dynamic_mix", "max_steps": None, "train_step": 1}
    workspace.run("train", weigh(workspace, "mixed", "static", **mixed))
    again = weigh(workspace, "mixed", "loss", **{**keys, "max_steps": 2})
    with pytest.raises(MismatchError, match=r"weighter\.json: missing; expected a checkpoint of a run with"):
        workspace.run("train", again)


# ---- two processes

BOTH: dict[str, tuple[str, dict[str, Any]]] = {
    "micro": ("loss", SHARP),
    "batch": ("loss", {**SHARP, "normalisation": "batch", "reduction": "example"}),
    "adapt": ("adapt", {"tau": 0.5, "refresh_interval": 2, "form": "relative", "anchor_batch_size": 3}),
    "mean": ("tests.test_custom_weighter:Mean", {}),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_weigh_as_one(workspace):
    """A micro-batch's examples are weighed against each other over all processes; equal weights are the plain loss."""
    files = []
    for average in (True, False):
        for name, method, params in (("plain", None, None), ("equal", "loss", {"strategy": "uniform"})):
            keys = shaped((1, 2), average_tokens_across_devices=average)
            files.append(weigh(workspace, f"{name}-{average}", method, params, **keys))
    # Epochs whose last step has one micro-batch of three: DDP has to sum its gradients as well.
    ragged = shaped((2, 3), max_steps=None, num_train_epochs=2.0)
    for name, method, params in (("plain", None, None), ("equal", "loss", {"strategy": "uniform"})):
        files.append(weigh(workspace, f"{name}-ragged", method, params, **ragged))
    for name, (method, params) in BOTH.items():
        files.append(weigh(workspace, f"two-{name}", method, params, eval_dataset="target_words", **shaped((1, 2))))
    launch_several(workspace.folder, files)
    assert_alike(workspace, "plain-True", "equal-True")
    assert_alike(workspace, "plain-False", "equal-False")
    assert_alike(workspace, "plain-ragged", "equal-ragged")
    assert len(logged(workspace, "equal-ragged")) == 2 * 6
    assert difference(workspace, "plain-True", "plain-False") > 1e-4
    for name, (method, params) in BOTH.items():
        workspace.run("train", weigh(workspace, name, method, params, eval_dataset="target_words", **shaped((2, 2))))
        assert_alike(workspace, name, f"two-{name}")


# ---- what cannot be weighed


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"enable_liger_kernel": True}, "enable_liger_kernel.*hides the logits"),
        ({"use_unsloth": True}, "use_unsloth.*replaces the loss"),
        ({"use_dft_loss": True}, "use_dft_loss.*another loss"),
        ({"use_asft_loss": True}, "use_asft_loss.*another loss"),
        ({"use_eaft_loss": True}, "use_eaft_loss.*another loss"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor.*another loss"),
        ({"neat_packing": True}, "neat_packing.*mixes examples"),
        ({**TEXT, "packing": True, "neat_packing": True}, "neat_packing.*several examples to the model"),
        ({"component_name": "adapt"}, "eval_dataset.*nothing"),
        ({"streaming": True, "max_steps": 3}, "streaming"),
    ],
)
def test_what_cannot_be_weighed_is_refused_with_the_reason(workspace, keys, reason):
    path = weigh(workspace, "refused", "loss", **keys)
    with pytest.raises(ConfigError, match=reason):
        load(path)
