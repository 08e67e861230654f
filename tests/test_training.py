"""Training in rounds: what featurize left is used, features are reused or refreshed, and every setting trains."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataflex.errors import ConfigError, CoverageError
from tests.workspace import assert_equal_weights, cut_back


def test_training_from_a_featurized_state_is_training_through(workspace: Any) -> None:
    """Same rows and bit-identical weights, with dropout, whether the warm-up ran before or in the run itself."""
    keys: dict[str, Any] = {"dataflex": {"store": str(workspace.folder / "a"), "params": {"proj_dim": 256}}}
    through = workspace.run("train", workspace.write("through", **keys))
    assert through["started_from"] is None
    keys["dataflex"]["store"] = str(workspace.folder / "b")
    ahead = workspace.write("ahead", **keys)
    featurized = workspace.run("featurize", ahead)
    assert not (workspace.folder / "out" / "ahead" / "checkpoint-3").exists()
    trained = workspace.run("train", ahead)
    assert trained["started_from"]
    assert trained["updates"][0]["computed"] == 0
    # 61 distinct rows (one of the 62 left is a duplicate) and 8 target rows, at two updates.
    assert (featurized["computed"], trained["computed"], through["computed"]) == (69, 69, 138)
    assert workspace.rounds("ahead") == workspace.rounds("through")
    assert [len(rows) for rows in workspace.rounds("ahead")] == [12, 8, 8]
    assert_equal_weights(workspace.weights("ahead"), workspace.weights("through"))
    # The state may go, and the folder be moved: what was taken from the store is the run's own.
    out = workspace.folder / "out" / "ahead"
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    shutil.rmtree(workspace.folder / "b" / "states")
    cut_back(out, 5)
    workspace.run("train", ahead)
    assert workspace.rounds("ahead") == workspace.rounds("through")
    assert_equal_weights(workspace.weights("ahead"), workspace.weights("through"))


def test_a_second_run_over_the_same_states_computes_nothing(workspace: Any) -> None:
    first, again = workspace.write("first"), workspace.write("again")
    workspace.run("train", first)
    summary = workspace.run("train", again)
    assert (summary["computed"], summary["batches"], summary["tokens"]) == (0, 0, 0)
    assert summary["reused"] == 138
    assert workspace.rounds("first") == workspace.rounds("again")
    assert_equal_weights(workspace.weights("first"), workspace.weights("again"))
    workspace.run("train", again, "overwrite_output_dir=true", "dataflex.on_missing=error")
    with pytest.raises(CoverageError, match=r"nearest differs in feature\.projection\.dim: 256 → 128"):
        workspace.run(
            "train", again, "overwrite_output_dir=true", "dataflex.on_missing=error", "dataflex.params.proj_dim=128"
        )


def test_evaluating_and_workers_do_not_change_what_is_trained(workspace: Any, whole: Any) -> None:
    shutil.copytree(whole.folder / "store", workspace.folder / "store")
    changed = {"eval_strategy": "steps", "eval_steps": 1, "dataloader_num_workers": 2, "plot_loss": True}
    workspace.run("train", workspace.write("changed", **changed))
    assert workspace.rounds("changed") == whole.rounds("whole")
    assert_equal_weights(workspace.weights("changed"), whole.weights("whole"))
    assert (workspace.folder / "out" / "changed" / "training_eval_loss.png").is_file()


def test_the_reused_part_of_the_pool_has_a_known_age(workspace: Any) -> None:
    """Rotating: a share of the pool is computed at an update. Static: nothing is, and the first values stay."""
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}}
    refresh = {"policy": "rotating", "refresh_fraction": 0.25}
    path = workspace.write("rotating", update_times=3, dataflex={**section, "refresh": refresh})
    summary = workspace.run("train", path)
    share = int(np.ceil(0.25 * 62))
    assert summary["updates"][0]["computed"] == 69
    for number in (2, 3):
        pool = pq.read_table(workspace.folder / "out" / "rotating" / "rounds" / f"pool-0000{number}.parquet")
        updated = pool["updated"].to_numpy()
        assert (updated == number - 1).sum() == share
        assert share - 1 <= summary["updates"][number - 1]["computed"] - 8 <= share  # the duplicate shares its value
    ages = pq.read_table(workspace.folder / "out" / "rotating" / "rounds" / "round-00003.parquet")["age"].to_numpy()
    assert set(ages.tolist()) <= {0, 1, 2}
    path = workspace.write("static", update_times=3, dataflex={**section, "refresh": {"policy": "static"}})
    summary = workspace.run("train", path)
    assert [update["computed"] for update in summary["updates"]] == [0, 0, 0]
    rows = workspace.rounds("static")
    assert sorted(rows[1]) == sorted(rows[2]) == sorted(rows[3])


CUSTOM = """
from dataflex.selectors import Selector, register_selector


@register_selector("custom")
class CustomSelector(Selector):
    def __init__(self, dataset, accelerator, data_collator, cache_dir):
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        self.seen = []

    def warmup(self, num_samples, replacement):
        assert replacement is True
        return [list(range(num_samples))]

    def select(self, model, step_id: int, num_samples: int, **kwargs):
        assert len(self.dataset[0]["input_ids"]) and self.accelerator.is_main_process
        assert kwargs["update_times"] == 2 and kwargs["current_update_times"] in (1, 2)
        assert kwargs["tokenizer"].pad_token_id is not None and kwargs["scheduler_state"] is not None
        assert len(kwargs["optimizer_state"]) == sum(p.requires_grad for p in model.parameters())
        model(**self.data_collator([self.dataset[0]])).loss.backward()
        return list(range(step_id, step_id + num_samples))
"""


def test_a_selector_of_the_documented_kind_runs_as_it_is(workspace: Any) -> None:
    (workspace.folder / "mine.py").write_text(CUSTOM)
    section = {"store": str(workspace.folder / "store"), "plugins": [str(workspace.folder / "mine.py")]}
    path = workspace.write(
        "custom", component_name="custom", eval_dataset=None, disable_shuffling=True, dataflex=section
    )
    workspace.run("train", path)
    assert workspace.rounds("custom") == [list(range(12)), list(range(3, 11)), list(range(5, 13))]


@pytest.mark.parametrize(
    "keys",
    [
        {"stage": "pt", "dataset": "text", "eval_dataset": "text_target", "cutoff_len": 32},
        {"finetuning_type": "full", "learning_rate": 1e-4},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        {"bf16": True, "neftune_noise_alpha": 5, "disable_gradient_checkpointing": True},
        {"warmup_step": None, "update_step": 2, "update_times": 1},
        {"eval_dataset": "target_words,target_records", "eval_on_each_dataset": True, "use_rslora": True},
        {"eval_dataset": None, "val_size": 0.1, "lr_scheduler_type": "cosine", "warmup_ratio": 0.2},
    ],
    ids=["pt", "full", "freeze", "bf16", "no warm-up", "several targets", "val_size"],
)
def test_less_trains_in_every_setting(workspace: Any, keys: dict[str, Any]) -> None:
    summary = workspace.run("train", workspace.write("run", save_strategy="no", **keys))
    assert summary["computed"] > 0
    assert summary["skipped"] == {}
    last = sorted((workspace.folder / "out" / "run" / "rounds").glob("round-*.parquet"))[-1]
    scores = pq.read_table(last)["score"].to_numpy()
    assert np.isfinite(scores).all()
    assert len(set(scores.tolist())) > 1


@pytest.mark.parametrize(
    ("override", "error", "said"),
    [
        ("lora_target=nosuch_proj", ConfigError, "nosuch_proj"),
        ("update_step=20", CoverageError, "an update needs 80 rows .20 steps of 4., found 62"),
    ],
)
def test_what_only_llamafactory_knows_is_said_too(workspace: Any, override: str, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        workspace.run("train", workspace.write("run"), override)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "constant_with_warmup", "cosine"])
def test_every_schedule_of_learning_rates_trains(workspace: Any, schedule: str) -> None:
    keys = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 2, "group_by_length": None}
    run = workspace.write("run", train_sampling_strategy="group_by_length", update_times=1, save_strategy="no", **keys)
    workspace.run("train", run)
    log = [
        json.loads(line) for line in (workspace.folder / "out" / "run" / "trainer_log.jsonl").read_text().splitlines()
    ]
    assert len([entry for entry in log if "loss" in entry]) == 5


def test_early_stopping_counts_only_improvements_that_matter(workspace: Any) -> None:
    keys = {"early_stopping_steps": 1, "early_stopping_min_delta": 100.0, "eval_strategy": "steps", "eval_steps": 1}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "component_name": "random"}
    summary = workspace.run("train", workspace.write("run", dataflex=None, **keys))
    assert summary["steps"] == 2
    assert (
        workspace.run("train", workspace.write("all", dataflex=None, **keys | {"early_stopping_min_delta": 0.0}))[
            "steps"
        ]
        > 2
    )


def test_epochs_are_those_of_the_schedule(workspace: Any) -> None:
    """Two epochs of a warm-up and two updates: each warms up on rows of its own and ends with a checkpoint."""
    workspace.run(
        "train",
        workspace.write("twice", num_train_epochs=2, save_strategy="epoch", component_name="random", dataflex=None),
    )
    out = workspace.folder / "out" / "twice"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-14", "checkpoint-7"]
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["epoch"] for entry in state["log_history"] if "loss" in entry] == pytest.approx(
        [s / 7 for s in range(1, 15)]
    )
    rounds = workspace.rounds("twice")
    assert [len(rows) for rows in rounds] == [12, 8, 8, 12, 8, 8]
    assert sorted(rounds[0]) != sorted(rounds[3])
    assert all(len(set(rows)) == len(rows) for rows in rounds)


def test_static_training_is_llamafactory_untouched(workspace: Any) -> None:
    keys = {"component_name": None, "warmup_step": None, "update_step": None, "update_times": None, "max_steps": 2}
    workspace.run("train", workspace.write("static", train_type="static", dataflex=None, **keys))
    out = workspace.folder / "out" / "static"
    assert (out / "adapter_model.safetensors").is_file()
    assert not (out / "rounds").exists()
