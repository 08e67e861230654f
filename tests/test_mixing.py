"""`train_type: dynamic_mix`: real trainings, what they drew, what they resume to."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex import distributed
from dataflex.errors import ConfigError, CoverageError, DataflexError, MismatchError
from dataflex.pipelines.mixing.domains import domains_of
from dataflex.pipelines.mixing.mixture_log import by_name, in_order
from dataflex.trainers.micro_batch import ROWS
from dataflex.trainers.observer import Observer
from dataflex.trainers.rounds import _Batches
from dataflex.trainers.weighing import Weighing
from tests.processes import environment
from tests.workspace import NAMES, assert_equal_weights, break_off, lines, mix


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows of every micro-batch that was asked for, in order."""
    found: list[list[int]] = []
    begin = _Batches.__iter__

    def noted(self: Any) -> Iterator[list[int]]:
        for rows in begin(self):
            found.append(rows)
            yield rows

    monkeypatch.setattr(_Batches, "__iter__", noted)
    return found


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def domains(rows: list[list[int]]) -> np.ndarray:
    """Domain of every row drawn: the datasets stand one behind the other."""
    return np.array(flat(rows)) // 8


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({"component_name": "uniform"}, (1 / 3, 1 / 3, 1 / 3)),
        ({"static_mix": True, "init_mixture_proportions": [1, 3, 0]}, (0.25, 0.75, 0)),
        (
            {
                "component_name": "static",
                "dataflex": {"params": {"proportions": dict(zip(NAMES, (5, 1, 2), strict=True))}},
            },
            (0.625, 0.125, 0.25),
        ),
        ({"mixture_sample_rule": "stratified"}, (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_constant_shares_are_exact_to_one_row(
    workspace: Any, drawn: list[list[int]], keys: dict[str, Any], shares: tuple[float, ...]
) -> None:
    summary = workspace.run("train", mix(workspace, "constant", **keys))
    counts = np.bincount(domains(drawn), minlength=3)
    assert np.abs(counts - 24 * np.array(shares)).max() <= 1
    assert summary["realised_rows"] == dict(zip(NAMES, counts.tolist(), strict=True))
    for domain in range(3):  # a permutation before any row comes again
        rows = [row for row in flat(drawn) if row // 8 == domain]
        for start in range(0, len(rows), 8):
            assert len(set(rows[start : start + 8])) == len(rows[start : start + 8])


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
        break_off(workspace, step)
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
    for first in (2, 14):
        wanted = draw.randint(first, first + 10)
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while process.poll() is None and not (log.is_file() and f'"step": {wanted},' in log.read_text("utf-8")):
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
    drawn.clear()
    workspace.run("train", path)
    done = [line["resumed"] for line in lines(workspace, "killed") if "resumed" in line][-1]
    assert done > 0
    assert drawn == whole[2 * done :]
    in_force = {line["step"]: line for line in lines(workspace, "killed") if "step" in line}
    assert list(in_force.values()) == expected
    assert_equal_weights(workspace.weights("killed"), workspace.weights("whole"))


def test_rows_and_shares_do_not_depend_on_batch_and_accumulation(workspace: Any, drawn: list[list[int]]) -> None:
    found = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        name = f"b{size}"
        keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        drawn.clear()
        workspace.run("train", mix(workspace, name, component_name="odm", **keys))
        found.append((flat(drawn), [list(line["proportions"].values()) for line in lines(workspace, name)]))
    for rows, shares in found[1:]:
        assert rows == found[0][0]
        np.testing.assert_allclose(shares, found[0][1], rtol=1e-5)
    assert np.ptp(found[0][1][-1]) > 1e-3


def test_one_loader_serves_shares_that_change_at_every_step_and_rows_are_processed_once(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is built anew at an update: one torch DataLoader in all, and each row goes through the template once."""
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor

    loaders: list[int] = []
    processed: list[tuple[str, str]] = []
    begin, process = torch.utils.data.DataLoader.__init__, SupervisedDatasetProcessor.preprocess_dataset

    def begun(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> None:
        loaders.append(len(dataset))
        begin(self, dataset, *args, **kwargs)

    def noted(self: Any, examples: Any) -> Any:
        for prompt, response in zip(examples["_prompt"], examples["_response"], strict=True):
            processed.append((prompt[-1]["content"], response[0]["content"]))
        return process(self, examples)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", begun)
    monkeypatch.setattr(SupervisedDatasetProcessor, "preprocess_dataset", noted)
    # overwrite_cache: what another run left in the cache of `datasets` would not be processed.
    workspace.run("train", mix(workspace, "once", component_name="odm", train_step=8, overwrite_cache=True))
    found = [tuple(line["proportions"].values()) for line in lines(workspace, "once")]
    assert len(found) == 8
    assert len(set(found[3:])) == 5  # of three arms, ODM only explores until its fourth update
    assert loaders == [24]
    expected = []
    for name in NAMES:
        for record in json.loads((workspace.tiny.dataset_dir / f"{name}.json").read_text("utf-8")):
            expected.append(("\n".join(filter(None, (record["instruction"], record["input"]))), record["output"]))
    assert len(set(expected)) == 24
    assert sorted(processed) == sorted(expected)


@pytest.mark.parametrize(("params", "is_single"), [({"batches": "single"}, True), ({}, False)])
def test_odm_draws_micro_batches_of_one_domain_if_asked_to(
    workspace: Any, drawn: list[list[int]], params: dict[str, Any], is_single: bool
) -> None:
    """Of two rows each, two to a step; by default some hold two domains."""
    workspace.run("train", mix(workspace, "batches", component_name="odm", dataflex={"params": params}))
    found = [{row // 8 for row in rows} for rows in drawn]
    assert [len(rows) for rows in drawn] == [2] * 12
    assert len(set.union(*found)) == 3
    assert all(len(batch) == 1 for batch in found) == is_single


def test_the_statistics_are_those_of_every_micro_batch(
    workspace: Any, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over each domain's tokens, of all micro-batches, before the step: against a forward pass of each row."""
    found: list[Any] = []
    collect = Observer.collect

    def noted(self: Any, steps: int) -> Any:
        found.append(collect(self, steps))
        return found[-1]

    monkeypatch.setattr(Observer, "collect", noted)
    expected: list[np.ndarray] = []
    begin = Weighing.begin

    def alone(self: Any, trainer: Any, batches: Any, items: Any) -> None:
        totals = np.zeros((2, 3))
        trainer.model.eval()
        for batch in batches:
            for i, row in enumerate(batch[ROWS].tolist()):
                keep = batch["attention_mask"][i].bool()
                ids, labels = batch["input_ids"][i][keep][None], batch["labels"][i][keep][1:]
                with torch.no_grad():
                    logits = trainer.model(input_ids=ids).logits[0, :-1].double()
                for at in torch.nonzero(labels != -100).flatten().tolist():
                    totals[:, row // 8] += (1, float(-logits[at].log_softmax(0)[labels[at]]))
        expected.append(totals)
        begin(self, trainer, batches, items)

    monkeypatch.setattr(Weighing, "begin", alone)
    workspace.run("train", mix(workspace, "observed", component_name="odm"))
    assert len(found) == len(expected) == 6
    for statistics, (tokens, loss) in zip(found, expected, strict=True):
        assert statistics.tokens.tolist() == tokens.tolist()
        np.testing.assert_allclose(statistics.loss, loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("mixture", "steps", "counts"),
    [
        ({"exhausted": "cycle"}, 6, (15, 6, 3)),
        ({"exhausted": "renormalise"}, 6, (8, 8, 8)),
        ({"exhausted": "renormalise", "passes": 1.5}, 6, (12, 8, 4)),
        ({"exhausted": "stop"}, 3, (7, 3, 2)),
    ],
)
def test_a_domain_that_is_used_up(
    workspace: Any, drawn: list[list[int]], mixture: dict[str, Any], steps: int, counts: tuple[int, ...]
) -> None:
    keys = {"component_name": "static", "init_mixture_proportions": [5, 2, 1]}
    summary = workspace.run("train", mix(workspace, "used", **keys, dataflex={"mixture": mixture}))
    assert summary["steps"] == steps
    found = np.bincount(domains(drawn), minlength=3)
    assert found.sum() == 4 * steps
    assert np.abs(found - np.array(counts)).max() <= 1
    assert workspace.weights("used")


def test_what_cannot_be_filled_is_refused_before_training(workspace: Any, drawn: list[list[int]]) -> None:
    path = mix(
        workspace, "short", component_name="uniform", train_step=7, dataflex={"mixture": {"exhausted": "renormalise"}}
    )
    with pytest.raises(CoverageError, match="28 rows wanted, found 24"):
        workspace.run("train", path)
    assert not drawn


PLUGIN = """
import numpy as np
from dataflex.mixers import Mixer, register_mixer

@register_mixer("falling")
class Falling(Mixer):
    def __init__(self, mixture_manager, seed):
        super().__init__(mixture_manager)
        self.seed = seed

    def mix(self, model, step_id: int, **kwargs) -> np.ndarray:
        assert len(self.mixture_manager.names) == 3
        assert kwargs["batch"] is None or len(kwargs["domain_ids"]) == len(kwargs["batch"]["input_ids"])
        raw = 1.0 / (1 + self.seed + step_id * np.arange(3))
        return raw / raw.sum()
"""


def test_a_mixer_of_the_documented_kind_runs_as_it_is(workspace: Any, drawn: list[list[int]]) -> None:
    (workspace.folder / "falling.py").write_text(PLUGIN)
    section = {"plugins": [str(workspace.folder / "falling.py")], "params": {"seed": 0}}
    path = mix(workspace, "own", component_name="falling", update_step=2, update_times=-1, dataflex=section)
    workspace.run("train", path)
    shares = [list(line["proportions"].values()) for line in lines(workspace, "own")]
    for step, found in zip((0, 2, 4), shares, strict=True):
        raw = 1 / (1 + step * np.arange(3))
        np.testing.assert_allclose(found, raw / raw.sum())
    assert len(drawn) == 12


def test_nothing_of_the_evaluation_split_is_trained_on(workspace: Any, drawn: list[list[int]]) -> None:
    workspace.run("train", mix(workspace, "split", component_name="uniform", val_size=0.25, train_step=9))
    assert len({row for batch in drawn for row in batch}) == 18


def test_the_arms_of_odm_begin_at_stored_losses(workspace: Any, drawn: list[list[int]]) -> None:
    section = {"params": {"initial_losses": "base"}, "storage": "float32"}
    path = mix(workspace, "arms", component_name="odm", dataflex=section)
    featurized = workspace.run("featurize", path)
    summary = workspace.run("train", path)
    assert (featurized["computed"], summary["computed"], summary["reused"]) == (24, 0, 24)
    state = json.loads((workspace.folder / "out" / "arms" / "mixture.jsonl").read_text().splitlines()[1])
    assert min(state["proportions"].values()) > 0.2  # no domain waits until it is drawn for the first time


def test_the_workers_of_a_loader_change_nothing(workspace: Any) -> None:
    found = {}
    for workers in (0, 2):
        name = f"workers-{workers}"
        keys = {"dataloader_num_workers": workers, "update_step": 2, "update_times": -1, "lora_dropout": 0.1}
        workspace.run("train", mix(workspace, name, component_name="odm", **keys))
        found[workers] = lines(workspace, name)
    assert found[0] == found[2]
    assert_equal_weights(workspace.weights("workers-0"), workspace.weights("workers-2"))


def test_processes_that_disagree_are_found_out(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = distributed.gather
    monkeypatch.setattr(
        "dataflex.pipelines.mixing.director.distributed.gather",
        lambda value: [value, "another"] if isinstance(value, str) else gather(value),
    )
    with pytest.raises(DataflexError, match="the processes have come to different proportions at step 0"):
        workspace.run("train", mix(workspace, "apart", component_name="odm"))


def test_another_mixture_is_not_resumed(workspace: Any) -> None:
    keys = {"save_strategy": "steps", "save_steps": 3, "component_name": "uniform"}
    workspace.run("train", mix(workspace, "first", **keys))
    shutil.rmtree(workspace.folder / "out" / "first" / "checkpoint-6")
    with pytest.raises(MismatchError, match="found global_batch 4, this run has 2"):
        workspace.run("train", mix(workspace, "first", **keys, gradient_accumulation_steps=1))
    with pytest.raises(MismatchError, match=r"found methods .*'uniform'.*, this run has .*'odm'"):
        workspace.run("train", mix(workspace, "first", **{**keys, "component_name": "odm"}))
    arms = {**keys, "component_name": "odm"}
    workspace.run("train", mix(workspace, "arms", **arms))
    shutil.rmtree(workspace.folder / "out" / "arms" / "checkpoint-6")
    with pytest.raises(MismatchError, match=r"found parameters .*'official'.*, this run has .*'paper'"):
        workspace.run("train", mix(workspace, "arms", **arms, dataflex={"params": {"variant": "paper"}}))


def test_a_mixer_without_effect_is_said_where_the_steps_follow_from_the_rows(
    workspace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    keys: dict[str, Any] = {"component_name": "odm", "train_step": None, "num_train_epochs": 0.5}
    with caplog.at_level("WARNING", logger="dataflex"):
        workspace.run("train", mix(workspace, "idle", **keys, dataflex={"params": {"warmup_steps": 2000}}))
    assert "odm has no effect: it stays at the initial proportions for 2001 steps, and the run has 3" in caplog.text


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


def test_constant_shares_are_held_against_the_rows_that_they_draw(workspace: Any, drawn: list[list[int]]) -> None:
    """A domain without a share has rows that never come: the run is refused at its first step, not at its last."""
    keys = {"component_name": "static", "init_mixture_proportions": [1, 1, 0], "train_step": 5}
    section = {"mixture": {"exhausted": "renormalise"}}
    with pytest.raises(CoverageError, match="20 rows wanted, found 16 within 1 passes"):
        workspace.run("train", mix(workspace, "short", **keys, dataflex=section))
    assert not drawn


def test_a_run_that_ends_early_tells_what_was_trained_on(workspace: Any, drawn: list[list[int]]) -> None:
    keys = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_steps": 1, "early_stopping_min_delta": 100.0}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_strategy": "steps"}
    path = mix(workspace, "early", component_name="uniform", save_steps=1, eval_dataset="target_words", **keys)
    summary = workspace.run("train", path)
    assert summary["steps"] == 2
    assert sum(summary["realised_rows"].values()) == 8


def test_a_domain_without_rows_is_refused() -> None:
    rows: Any = SimpleNamespace(names=("a", "b", "c"), dataset=np.array([0, 0, 1]), supervised=np.array([1, 0, 0]))
    with pytest.raises(ConfigError, match="found no row with a supervised token in b, c;"):
        domains_of(rows, ["a", "b", "c"], "rows")
    with pytest.raises(ConfigError, match="does not tell which rows are of d"):
        domains_of(rows, ["a", "d"], "rows")
    members, found = domains_of(rows, ["a"], "tokens")
    assert (members[0].tolist(), found.sizes.tolist()) == ([0], [1.0])


def test_a_checkpoint_of_another_schedule_or_seed_is_not_resumed(workspace: Any) -> None:
    keys = {"save_strategy": "steps", "save_steps": 3, "component_name": "odm"}
    workspace.run("train", mix(workspace, "first", **keys, update_step=2, update_times=-1))
    shutil.rmtree(workspace.folder / "out" / "first" / "checkpoint-6")
    with pytest.raises(MismatchError, match="its shares were set at step 2, where this run sets none"):
        workspace.run("train", mix(workspace, "first", **keys, update_step=3, update_times=-1))
    with pytest.raises(MismatchError, match="found seed 42, this run has 7"):
        workspace.run("train", mix(workspace, "first", **keys, update_step=2, update_times=-1, seed=7))


def test_a_finished_run_that_is_run_again_says_the_same(workspace: Any) -> None:
    path = mix(workspace, "again", save_strategy="steps", save_steps=6, component_name="uniform")
    first = workspace.run("train", path)
    assert workspace.run("train", path)["realised_rows"] == first["realised_rows"]
    assert sum(first["realised_rows"].values()) == 24


def test_an_epoch_is_a_pass_over_the_data(workspace: Any) -> None:
    keys = {"save_strategy": "epoch", "num_train_epochs": 2.0, "train_step": None}
    workspace.run("train", mix(workspace, "epochs", component_name="uniform", **keys))
    found = sorted(path.name for path in (workspace.folder / "out" / "epochs").glob("checkpoint-*"))
    assert found == ["checkpoint-12", "checkpoint-6"]


def test_nothing_to_train_on_is_an_error(workspace: Any) -> None:
    section = {"mixture": {"exhausted": "stop", "passes": 0.125}}
    with pytest.raises(CoverageError, match="the domains with a share are used up after 3 rows, at step 0"):
        workspace.run("train", mix(workspace, "nothing", component_name="uniform", dataflex=section))
