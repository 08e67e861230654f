"""`train_type: dynamic_mix` draws the rows that its shares ask for, whatever batches, workers and processes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from dataflex import distributed
from dataflex.errors import DataflexError
from dataflex.trainers.micro_batch import ROWS
from dataflex.trainers.observer import Observer
from dataflex.trainers.weighing import Weighing
from tests.workspace import NAMES, assert_equal_weights, lines, mix


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


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
    counts = np.bincount(np.array(flat(drawn)) // 8, minlength=3)  # the datasets stand one behind the other
    assert np.abs(counts - 24 * np.array(shares)).max() <= 1
    assert summary["realised_rows"] == dict(zip(NAMES, counts.tolist(), strict=True))
    for domain in range(3):  # a permutation before any row comes again
        rows = [row for row in flat(drawn) if row // 8 == domain]
        for start in range(0, len(rows), 8):
            assert len(set(rows[start : start + 8])) == len(rows[start : start + 8])


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


def test_a_mixer_without_effect_is_said_where_the_steps_follow_from_the_rows(
    workspace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    keys: dict[str, Any] = {"component_name": "odm", "train_step": None, "num_train_epochs": 0.5}
    with caplog.at_level("WARNING", logger="dataflex"):
        workspace.run("train", mix(workspace, "idle", **keys, dataflex={"params": {"warmup_steps": 2000}}))
    assert "odm has no effect: it stays at the initial proportions for 2001 steps, and the run has 3" in caplog.text


def test_an_epoch_is_a_pass_over_the_data(workspace: Any) -> None:
    keys = {"save_strategy": "epoch", "num_train_epochs": 2.0, "train_step": None}
    workspace.run("train", mix(workspace, "epochs", component_name="uniform", **keys))
    found = sorted(path.name for path in (workspace.folder / "out" / "epochs").glob("checkpoint-*"))
    assert found == ["checkpoint-12", "checkpoint-6"]
