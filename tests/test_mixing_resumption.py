"""A mixing run that is resumed or killed ends as the uninterrupted one, to the bit; another run's is refused."""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
import sys
import time
from typing import Any

import pytest

from dataflex.errors import MismatchError
from dataflex.pipelines.mixing.mixture_log import by_name, in_order
from tests.processes import signalled
from tests.workspace import NAMES, assert_equal_weights, cut_back, lines, mix

MIXERS: dict[str, dict[str, Any]] = {
    "odm": {"component_name": "odm"},
    "odm, whole batches": {
        "component_name": "odm",
        "update_step": 2,
        "update_times": 2,
        "warmup_step": 2,
        "train_step": None,
        "dataflex": {"params": {"variant": "paper", "batches": "single"}},
    },
    "exp3": {"component_name": "odm", "dataflex": {"params": {"variant": "exp3"}}},
    "ado": {
        "component_name": "ado",
        "dataflex": {"params": {"ignore_steps": 1, "fit_interval": 2}},
    },
    "random": {"component_name": "random", "update_step": 1, "update_times": -1},
    "unimax": {"component_name": "unimax", "dataflex": {"mixture": {"unit": "tokens"}}},
    "with a weighter": {
        "component_name": "odm",
        "dataflex": {"weighter": {"name": "loss", "params": {"strategy": "linupper"}}},
    },
}


@pytest.mark.parametrize(
    "name", ["odm", *(pytest.param(name, marks=pytest.mark.slow) for name in MIXERS if name != "odm")]
)
def test_what_is_resumed_ends_as_the_uninterrupted_run(workspace: Any, drawn: list[list[int]], name: str) -> None:
    """From every step: the same rows, the same shares, weights equal to the bit."""
    keys = MIXERS[name] | {"save_strategy": "steps", "save_steps": 1, "lora_dropout": 0.1}
    workspace.run("train", mix(workspace, "whole", **keys))
    whole, before = list(drawn), lines(workspace, "whole")
    assert len(whole) == 12
    for step in (1, 3, 4):
        out = workspace.folder / "out"
        cut_back(shutil.copytree(out / "whole", out / f"from-{step}"), step)
        drawn.clear()
        workspace.run("train", mix(workspace, f"from-{step}", **keys))
        assert drawn == whole[2 * step :]
        after = lines(workspace, f"from-{step}")
        resumed = [i for i, line in enumerate(after) if "resumed" in line][-1]
        assert after[resumed]["resumed"] == step
        assert after[resumed + 1 :] == [line for line in before if line["step"] >= step]
        assert_equal_weights(workspace.weights(f"from-{step}"), workspace.weights("whole"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(workspace: Any, drawn: list[list[int]]) -> None:
    """Twice, at a random step and wherever it was within that; what was saved is not lost, and no row is another."""
    keys = MIXERS["with a weighter"] | {
        "save_strategy": "steps",
        "save_steps": 1,
        "lora_dropout": 0.1,
        "train_step": 30,
    }
    workspace.run("train", mix(workspace, "whole", **keys))
    whole, expected = list(drawn), lines(workspace, "whole")
    path, log = mix(workspace, "killed", **keys), workspace.folder / "out" / "killed" / "mixture.jsonl"
    draw, command = random.Random(), [sys.executable, "-m", "dataflex.cli", "train", str(path)]

    def is_there(step: int) -> bool:
        if not (log.is_file() and f'"step": {step},' in log.read_text("utf-8")):
            return False
        time.sleep(draw.uniform(0, 0.3))
        return True

    for first in (2, 14):
        wanted = draw.randint(first, first + 10)
        status, said = signalled(command, signal.SIGKILL, functools.partial(is_there, wanted))
        assert status == -signal.SIGKILL, said[-4000:]
    drawn.clear()
    workspace.run("train", path)
    done = [line["resumed"] for line in lines(workspace, "killed") if "resumed" in line][-1]
    assert done > 0
    assert drawn == whole[2 * done :]
    in_force = {line["step"]: line for line in lines(workspace, "killed") if "step" in line}
    assert list(in_force.values()) == expected
    assert_equal_weights(workspace.weights("killed"), workspace.weights("whole"))


def test_another_mixture_is_not_resumed(workspace: Any) -> None:
    keys = {"save_strategy": "steps", "save_steps": 3, "component_name": "uniform"}
    workspace.run("train", mix(workspace, "first", **keys))
    cut_back(workspace.folder / "out" / "first", 5)
    with pytest.raises(MismatchError, match="found global_batch 4, this run has 2"):
        workspace.run("train", mix(workspace, "first", **keys, gradient_accumulation_steps=1))
    with pytest.raises(MismatchError, match=r"found methods .*'uniform'.*, this run has .*'odm'"):
        workspace.run("train", mix(workspace, "first", **{**keys, "component_name": "odm"}))
    arms = {**keys, "component_name": "odm"}
    workspace.run("train", mix(workspace, "arms", **arms))
    cut_back(workspace.folder / "out" / "arms", 5)
    with pytest.raises(MismatchError, match=r"found parameters .*'official'.*, this run has .*'paper'"):
        workspace.run("train", mix(workspace, "arms", **arms, dataflex={"params": {"variant": "paper"}}))


def test_a_checkpoint_says_what_belongs_to_which_domain(workspace: Any) -> None:
    """By name, whatever is a number for each domain; and read back it is what it was."""
    keys = {"save_strategy": "steps", "save_steps": 6, "component_name": "odm"}
    workspace.run("train", mix(workspace, "named", **keys))
    path = workspace.folder / "out" / "named" / "checkpoint-6" / "dataflex" / "mixture.json"
    state = json.loads(path.read_text("utf-8"))
    for found in (state["proportions"], state["pending"]["loss"], state["mixer"]["estimates"], state["rows"]):
        assert list(found) == list(NAMES)
    plain = {"a": [1.0, None, 2.5], "b": {"c": [[1, 2, 3], [4]]}, "d": [{"e": 1}, {}, {}], "f": "x", "g": [True, False]}
    named = by_name(NAMES, plain)
    assert named["b"]["c"] == [dict(zip(NAMES, (1, 2, 3), strict=True)), [4]]
    assert in_order(NAMES, json.loads(json.dumps(named))) == plain


def test_a_checkpoint_of_another_schedule_or_seed_is_not_resumed(workspace: Any) -> None:
    keys = {"save_strategy": "steps", "save_steps": 3, "component_name": "odm"}
    workspace.run("train", mix(workspace, "first", **keys, update_step=2, update_times=-1))
    cut_back(workspace.folder / "out" / "first", 5)
    with pytest.raises(MismatchError, match="its shares were set at step 2, where this run sets none"):
        workspace.run("train", mix(workspace, "first", **keys, update_step=3, update_times=-1))
    with pytest.raises(MismatchError, match="found seed 42, this run has 7"):
        workspace.run("train", mix(workspace, "first", **keys, update_step=2, update_times=-1, seed=7))


def test_a_finished_run_that_is_run_again_says_the_same(workspace: Any) -> None:
    path = mix(workspace, "again", save_strategy="steps", save_steps=6, component_name="uniform")
    first = workspace.run("train", path)
    assert workspace.run("train", path)["realised_rows"] == first["realised_rows"]
    assert sum(first["realised_rows"].values()) == 24
