"""What methods know stands in every log of a training; and a plain run says little."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.processes import environment

MIX: dict[str, Any] = {
    "train_type": "dynamic_mix",
    "component_name": "odm",
    "dataset": "pool,target_words",
    "warmup_step": 1,
}
MIX |= {"update_step": 1, "update_times": 4, "eval_dataset": None}


def own_numbers(workspace: Any, name: str) -> list[dict[str, Any]]:
    """Return the lines of LLaMA-Factory's own log that have numbers of ours."""
    lines = (workspace.folder / "out" / name / "trainer_log.jsonl").read_text().splitlines()
    return [found for found in map(json.loads, lines) if any(key.startswith("dataflex/") for key in found)]


def test_an_update_is_told_with_what_was_chosen_and_what_it_took(workspace: Any) -> None:
    workspace.run("train", workspace.write("run", save_strategy="no"))
    found = own_numbers(workspace, "run")
    assert [line["current_steps"] for line in found] == [3, 5]
    for number, line in enumerate(found, 1):
        table = pq.read_table(workspace.folder / "out" / "run" / "rounds" / f"round-{number:05d}.parquet")
        about = json.loads(table.schema.metadata[b"dataflex"])
        for name in ("computed", "reused", "seconds"):
            assert line[f"dataflex/{name}"] == about[name]
        assert line["dataflex/score_mean"] == about["diagnostics"]["score_mean"]
        assert line["dataflex/share/pool"] == 1.0
        assert line["dataflex/age_mean"] == line["dataflex/age_most"] == 0
    assert "dataflex/overlap" in found[1]
    state = json.loads((workspace.folder / "out" / "run" / "trainer_state.json").read_text())
    logged = [line for line in state["log_history"] if "dataflex/computed" in line]
    assert [line["dataflex/computed"] for line in logged] == [line["dataflex/computed"] for line in found]


def test_a_mixture_is_told_with_shares_and_rewards(workspace: Any) -> None:
    workspace.run("train", workspace.write("run", save_strategy="no", dataflex={}, **MIX))
    found = own_numbers(workspace, "run")
    log = [json.loads(line) for line in (workspace.folder / "out" / "run" / "mixture.jsonl").read_text().splitlines()]
    assert [line["current_steps"] for line in found] == [line["step"] for line in log][: len(found)] == [0, 1, 2, 3, 4]
    for line, kept in zip(found, log, strict=False):
        for name, share in kept["proportions"].items():
            assert line[f"dataflex/proportions/{name}"] == share
    assert "dataflex/loss/pool" in found[-1]


def test_no_more_often_than_losses_are(workspace: Any) -> None:
    workspace.run("train", workspace.write("run", save_strategy="no", logging_steps=2, dataflex={}, **MIX))
    assert [line["current_steps"] for line in own_numbers(workspace, "run")] == [0, 2, 4]


def test_weights_are_told_beside_the_loss(workspace: Any) -> None:
    keys: dict[str, Any] = {"train_type": "dynamic_weight", "component_name": "loss", "update_step": None}
    keys |= {"update_times": None, "warmup_step": None, "train_step": 2}
    workspace.run("train", workspace.write("run", save_strategy="no", dataflex={}, **keys))
    for line in own_numbers(workspace, "run"):
        assert {f"dataflex/weight_{name}" for name in ("mean", "max", "ess")} <= line.keys()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tensorboard_and_wandb_hear_of_it(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a real event file, and by W&B's own file of a run that is not uploaded."""
    pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, runs = workspace.folder / "events", workspace.folder / "runs"
    runs.mkdir()
    for name, value in {
        "TENSORBOARD_LOGGING_DIR": str(events),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(runs),
    }.items():
        monkeypatch.setenv(name, value)
    path = workspace.write("run", save_strategy="no", report_to=["tensorboard", "wandb"], logging_dir=str(events))
    ran = subprocess.run(
        [sys.executable, "-m", "dataflex.cli", "train", str(path)], env=environment(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    expected = [line["dataflex/score_mean"] for line in own_numbers(workspace, "run")]
    (folder,) = {file.parent for file in events.rglob("events.out.*")}
    read = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in read.Scalars("train/dataflex/score_mean")] == pytest.approx(expected, rel=1e-5)
    (kept,) = runs.rglob("run-*.wandb")
    assert b"train/dataflex/score_mean" in kept.read_bytes()


CALM = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) (dataflex|dataflex_plugin_\w+)[\w.]*: ")
PLUGIN = """
import logging
from dataflex.selectors import NativeSelector, register_selector

log = logging.getLogger(__name__)

@register_selector("talking")
class Talking(NativeSelector):
    def select(self, model, step_id, num_samples, *, context, **kwargs):
        log.info("choosing %d rows", num_samples)
        return list(range(num_samples))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_plain_run_says_our_lines_and_warnings(workspace: Any) -> None:
    (workspace.folder / "talking.py").write_text(PLUGIN)
    section = {"store": str(workspace.folder / "store"), "plugins": [str(workspace.folder / "talking.py")]}
    path = workspace.write("run", component_name="talking", dataflex=section)

    def said(*options: str) -> tuple[list[str], str]:
        command = [sys.executable, "-m", "dataflex.cli", *options, "train", str(path), "overwrite_output_dir=true"]
        ran = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stderr.splitlines(), ran.stdout

    lines, out = said()
    ours = [line for line in lines if CALM.match(line)]
    others = [line for line in lines if not CALM.match(line)]
    assert any("choosing 8 rows" in line for line in ours)  # a plugin's own logger is heard
    assert any("trained to step 7: loss" in line for line in ours)
    assert len(others) <= 5, others  # warnings of the libraries
    assert not [line for line in others if "Offline mode" in line or "Model config" in line or "it/s" in line]
    assert len(out.splitlines()) <= 3, out
    assert len(ours) < 20
    loud, _ = said("-v")
    assert len(loud) > 5 * len(lines)
    assert any("loading configuration file" in line for line in loud)
    quiet, _ = said("-q")
    assert not [line for line in quiet if " INFO " in line]
