"""Verbs called from Python, one after the other in one process, do what the commands do and leave it as it was."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import dataflex
from dataflex.errors import Cancelled, ConfigError, DataflexError, Interrupted
from tests.workspace import assert_equal_weights

pytestmark = pytest.mark.slow

FAULTY = """\
import os, signal, sys
from dataflex import register_selector

@register_selector("faulty")
class Faulty:
    def __init__(self, dataset, accelerator, data_collator, cache_dir, how="well"):
        self.how = how
    def select(self, model, step_id, num_samples, **kwargs):
        if self.how == "exit":
            sys.exit(3)
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.how == "error":
            raise ValueError("no such luck")
        return list(range(num_samples))
"""


def surroundings() -> dict[str, Any]:
    """What a verb must leave as it was."""
    root = logging.getLogger()
    ours = logging.getLogger("dataflex")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    names = (
        "LLAMAFACTORY_VERBOSITY",
        "TRANSFORMERS_VERBOSITY",
        "TQDM_DELAY",
        "WORLD_SIZE",
        "ACCELERATE_MIXED_PRECISION",
    )
    return {
        "handlers": list(root.handlers),
        "levels": (root.level, ours.level, list(ours.handlers)),
        "signals": handlers,
        "environment": {name: os.environ.get(name) for name in names},
        "folder": Path.cwd(),
        "hook": sys.excepthook,
    }


@pytest.fixture(autouse=True, scope="module")
def bitsandbytes() -> None:
    """Have it imported before: what it logs of a package that it lacks keeps the frames of whoever imports it first."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        importlib.import_module("bitsandbytes")


def models() -> int:
    """Return how many models are in memory, garbage that nobody has collected among them."""
    from transformers import PreTrainedModel

    return sum(PreTrainedModel in type(each).__mro__ for each in gc.get_objects())


def state(run: dataflex.Run, name: str = "status.json") -> tuple[str, int | None]:
    found = json.loads((run.folder / name).read_text("utf-8"))
    return found["state"], found["exit_code"]


def test_verbs_one_after_the_other(workspace: Any) -> None:
    keys: dict[str, Any] = {"save_strategy": "no", "save_steps": None, "overwrite_output_dir": True}
    path = workspace.write(
        "mine", **keys, dataflex={"store": str(workspace.folder / "own"), "params": {"proj_dim": 64}}
    )
    gc.collect()
    before, alive = surroundings(), models()
    run = dataflex.load(path)
    assert not (workspace.folder / "own").exists()

    featurized = run.featurize()
    assert (featurized["computed"], featurized["rows"]) == (61 + 8, 62)
    assert state(run, "status_featurize.json") == ("finished", 0)
    choice = run.select(5, workspace.folder / "chosen.json")
    assert choice.table == pq.read_table(workspace.folder / "chosen.parquet")
    assert json.loads((workspace.folder / "chosen.json").read_text("utf-8")) == list(choice.records)
    assert choice.to_dataset()["id"][:] == [record["id"] for record in choice.records]
    assert run.select(3).table["index"].to_pylist() == choice.to_pandas()["index"].tolist()[:3]
    with pytest.raises(ConfigError, match="--num: found 0; expected at least 1"):
        run.select(0)
    assert state(run, "status_select.json") == ("failed", 2)

    first = run.train()
    assert (first.status["state"], first.round_numbers, first.summary["reused"] > 0) == ("finished", [0, 1, 2], True)
    weights, rounds = workspace.weights("mine"), workspace.rounds("mine")
    assert (
        choice.table["index"].to_pylist() == first.scores(1).sort_by([("score", "descending")])["index"].to_pylist()[:5]
    )
    half = dataflex.load(
        path,
        output_dir=workspace.folder / "out" / "half",
        bf16=True,
        component_name="random",
        dataflex={"params": None},
    )
    assert len(half.train().losses()) == 7  # other numerics and another method between the two
    again = run.train()
    assert again.summary["computed"] == 0
    assert workspace.rounds("mine") == rounds
    assert_equal_weights(workspace.weights("mine"), weights)

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run.featurize()["computed"]))
    thread.start()
    thread.join()
    assert found == [0]
    assert surroundings() == before
    assert models() == alive

    workspace.run("train", path, f"output_dir={workspace.folder}/out/command")  # as the command does it
    assert workspace.rounds("command") == rounds
    assert_equal_weights(workspace.weights("command"), weights)


def test_a_finished_folder_is_refused_as_by_the_command_and_a_test_set_is_measured(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"store": str(workspace.folder / "store"), "test_dataset": "target_words"}
    plain = {"component_name": "random", "save_strategy": "no", "save_steps": None, "update_times": 1}
    run = dataflex.load(workspace.write("measured", **plain, dataflex=section))
    before = run.evaluate()["target_words"]
    assert (before["rows"], state(run, "status_evaluate.json")) == (8, ("finished", 0))
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])  # as where nobody has set logging up
        after = run.train()
    warning = "training set: LLaMA-Factory dropped 1 records"
    assert capsys.readouterr().err.count(warning) == 1
    assert [text for text in after.warnings if text.startswith(warning)]
    table = after.test()
    assert table is not None
    loss = table["loss_sum"].to_numpy().sum() / table["tokens"].to_numpy().sum()
    assert after.summary["test"]["target_words"]["loss"] == pytest.approx(loss)
    assert before["loss"] != pytest.approx(loss, abs=1e-6)
    with pytest.raises(ConfigError, match="Output directory already exists and is not empty"):
        run.train()
    assert state(run) == ("finished", 0)
    with pytest.raises(ConfigError, match=r"dataflex\.test_dataset: found none"):
        dataflex.load(run.settings.path, dataflex={"test_dataset": None}).evaluate()


def test_what_ends_a_verb_early_leaves_the_process_fit_for_the_next(workspace: Any) -> None:
    plugin = workspace.folder / "faulty.py"
    plugin.write_text(FAULTY)

    def run(how: str, name: str = "") -> dataflex.Run:
        path = workspace.write(
            name or how, component_name="faulty", eval_dataset=None, save_strategy="no", save_steps=None,
            dataflex={"plugins": [str(plugin)], "params": {"how": how}},
        )  # fmt: skip
        return dataflex.load(path)

    gc.collect()
    before, alive = surroundings(), models()
    well = run("well")
    dataflex.load(workspace.write("other", component_name="random", dataflex=None))  # whose run file names no plugin
    well.train()
    with pytest.raises(DataflexError, match=r"train was ended by code that it ran, before it was done: .*faulty\.py"):
        run("exit").train()
    with pytest.raises(ValueError, match="no such luck") as caught:
        run("error").train()
    assert "faulty.py, line 16, in Faulty.select: ValueError: no such luck" in caught.value.__notes__[0]
    caught = None  # type: ignore[assignment]  # its frames hold the model
    stopped = run("interrupt")
    with pytest.raises(Cancelled, match="Ctrl-C: stopped after step 3 of 7"):
        stopped.train()
    assert state(stopped) == ("interrupted", 130)
    asked = run("term")
    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 4 of 7; the same command goes on from step 4"):
        asked.train()
    assert state(asked) == ("interrupted", 75)
    on = dataflex.load(asked.settings.path, dataflex={"params": {"how": "well"}})
    on.train()
    assert state(on) == ("finished", 0)
    assert workspace.rounds("term") == workspace.rounds("well")
    assert_equal_weights(workspace.weights("term"), workspace.weights("well"))
    assert surroundings() == before
    gc.collect()
    assert models() == alive
    assert np.isfinite(on.results.losses()["loss"].to_numpy()).all()
