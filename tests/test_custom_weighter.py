"""Weighters of the documented interface run unchanged but for their import, and a mean is plain training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import ConfigError
from tests.workspace import assert_alike, difference, logged, shaped, weigh


@pytest.fixture
def equal(workspace: Any) -> dict[str, Any]:
    """Keys of a dataset whose outputs are equally long, so that the mean over examples is the mean over tokens."""
    rows = [{"instruction": "again " * (i % 5) + str(i), "input": "", "output": "7 8 9 10"} for i in range(30)]
    folder = workspace.folder / "equal"
    folder.mkdir()
    (folder / "equal.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"equal": {"file_name": "equal.json"}}))
    return {"dataset_dir": str(folder), "dataset": "equal"}


def dataflex(**keys: Any) -> dict[str, Any]:
    return {"plugins": ["tests.custom_weighter"], **keys}


@pytest.mark.parametrize("shape", [pytest.param((4, 1), marks=pytest.mark.slow), (2, 4)])
def test_a_mean_is_plain_training(workspace, equal, shape):
    """The last step of an epoch of 30 rows has fewer micro-batches, by which it is not divided either."""
    keys = shaped(shape, max_steps=3, **equal)
    workspace.run("train", weigh(workspace, "plain", None, **keys))
    for name in ("mean", "bare", "own_step"):
        workspace.run("train", weigh(workspace, name, name, **{**keys, "dataflex": dataflex()}))
        assert_alike(workspace, "plain", name)


def test_a_step_of_ones_own_is_plain_whatever_the_lengths(workspace):
    """It is handed the step's tokens divided by the accumulation steps, as it divides by them itself."""
    keys = shaped((2, 4), max_steps=None, num_train_epochs=1.0)  # 63 rows: the last step is a short one
    workspace.run("train", weigh(workspace, "plain", None, **keys))
    workspace.run("train", weigh(workspace, "own_step", "own_step", **keys, dataflex=dataflex()))
    assert_alike(workspace, "plain", "own_step")
    # The mean over examples is another loss then.
    workspace.run("train", weigh(workspace, "mean", "mean", **keys, dataflex=dataflex()))
    assert difference(workspace, "plain", "mean") > 1e-3


def test_warm_up_is_plain_and_parameters_arrive(workspace, equal):
    keys = shaped((2, 2), max_steps=4, **equal)
    workspace.run("train", weigh(workspace, "plain", None, **keys))
    section = dataflex(params={"factor": 0.0})
    workspace.run("train", weigh(workspace, "half", "own_step", warmup_step=2, **keys, dataflex=section))
    plain, half = logged(workspace, "plain"), logged(workspace, "half")
    assert half[:2] == pytest.approx(plain[:2], rel=2e-6)
    assert half[2:] == [0, 0]
    workspace.run("train", weigh(workspace, "mean", "mean", warmup_step=2, **keys, dataflex=dataflex()))
    assert_alike(workspace, "plain", "mean")


def test_the_second_cross_entropy_is_left_out(workspace, equal, monkeypatch):
    """With `get_weighted_loss` alone the model is not fed labels, so it computes no loss of its own."""
    from transformers import Qwen2ForCausalLM

    fed: list[bool] = []
    forward = Qwen2ForCausalLM.forward

    def noted(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        fed.append(labels is not None)
        return forward(self, *args, labels=labels, **kwargs)

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", noted)
    keys = shaped((2, 2), max_steps=2, **equal)
    workspace.run("train", weigh(workspace, "mean", "mean", warmup_step=1, **keys, dataflex=dataflex()))
    assert fed == [True, True, False, False]


def test_one_that_overrides_nothing_says_so(workspace):
    path = weigh(workspace, "neither", "neither", dataflex=dataflex())
    with pytest.raises(ConfigError, match="Neither: found neither get_weighted_loss nor training_step"):
        workspace.run("train", path)


def test_a_parameter_that_the_constructor_does_not_take_is_refused(workspace, tmp_path: Path):
    plugin = tmp_path / "strict_weighter.py"
    plugin.write_text(
        "from dataflex.weighters import Weighter, register_weighter\n"
        "@register_weighter('strict')\n"
        "class Strict(Weighter):\n"
        "    def __init__(self, strategy: str = 'uniform'):\n"
        "        self.strategy = strategy\n"
    )
    section = {"plugins": [str(plugin)], "params": {"strategi": "loss_based"}}
    path = weigh(workspace, "strict", "strict", dataflex=section)
    with pytest.raises(ConfigError, match=r"strategi.*did you mean 'strategy'"):
        workspace.run("train", path)
