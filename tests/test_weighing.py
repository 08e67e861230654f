"""`train_type: dynamic_weight`: equal weights are plain training, on one process and on two; the rest is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dataflex.config import load
from dataflex.errors import ConfigError
from dataflex.weighters.adapt import Adapt
from tests.processes import launch_several
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


def test_an_example_alone_cannot_be_compared(workspace):
    """Its weight would be 1 whatever the method: an error, and not a plain run under another name."""
    keys = shaped((1, 2))
    with pytest.raises(ConfigError, match="found micro-batches of one example"):
        workspace.run("train", weigh(workspace, "alone", "loss", **keys))
    with pytest.raises(ConfigError, match="found optimizer steps of one example"):
        workspace.run("train", weigh(workspace, "alone", "loss", {"normalisation": "batch"}, **shaped((1, 1))))
    workspace.run("train", weigh(workspace, "pair", "loss", {"normalisation": "batch"}, **keys))
    assert max(logged(workspace, "pair", "dataflex/weight_max")) > 1.1


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


# ---- two processes

BOTH: dict[str, tuple[str, dict[str, Any]]] = {
    "micro": ("loss", SHARP),
    "batch": ("loss", {**SHARP, "normalisation": "batch", "reduction": "example"}),
    "adapt": ("adapt", {"tau": 0.5, "refresh_interval": 2, "form": "relative", "anchor_batch_size": 3}),
    "mean": ("tests.custom_weighter:Mean", {}),
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
