"""Training in rounds: hand-off from featurize, resumption, reuse, and what LLaMA-Factory offers besides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dataflex.checkpoints.marks import incomplete_reason
from dataflex.errors import ConfigError, CorruptionError, CoverageError, DataflexError, MismatchError
from dataflex.stores.root import StoreRoot
from tests.workspace import assert_equal_weights


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


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return what the training's log has of the updates."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "dataflex/scored" in entry]


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6])
def test_resuming_at_any_step_ends_as_the_uninterrupted_run(workspace: Any, step: int, whole: Path) -> None:
    """In the warm-up, at its end, inside a round and at a boundary: the same rows, and weights equal to the bit."""
    out = workspace.folder / "out" / "resumed"
    shutil.copytree(whole / "out" / "whole", out)
    for later in range(step + 1, 8):
        shutil.rmtree(out / f"checkpoint-{later}")
    for number in range(3):  # what a crash before the next round was decided leaves
        begun = [0, 3, 5][number] < step
        if not begun:
            (out / "rounds" / f"round-0000{number}.parquet").unlink()
    (out / "adapter_model.safetensors").unlink()
    shutil.copytree(whole / "store", workspace.folder / "store")
    summary = workspace.run("train", workspace.write("resumed"))
    before = type(workspace)(whole, workspace.tiny)
    assert workspace.rounds("resumed") == before.rounds("whole")
    assert_equal_weights(workspace.weights("resumed"), before.weights("whole"))
    earlier = json.loads((whole / "out" / "whole" / "dataflex_summary.json").read_text())
    assert summary["diagnostics"] == earlier["diagnostics"]
    assert [update["round"] for update in summary["diagnostics"]] == [1, 2]
    assert logged(workspace.folder / "out" / "resumed") == logged(whole / "out" / "whole")


@pytest.fixture(scope="module")
def whole(tiny: Any, tmp_path_factory: pytest.TempPathFactory, workspace_class: Any) -> Path:
    """A finished run with a checkpoint after each of its seven steps."""
    folder = tmp_path_factory.mktemp("whole")
    space = workspace_class(folder, tiny)
    space.run("train", space.write("whole"))
    return folder


def test_an_incomplete_checkpoint_is_never_resumed_from(workspace: Any, whole: Path) -> None:
    out = workspace.folder / "out" / "broken"
    shutil.copytree(whole / "out" / "whole", out)
    (out / "checkpoint-7" / "optimizer.pt").unlink()
    state = out / "checkpoint-6" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-5])
    shutil.copytree(whole / "store", workspace.folder / "store")
    run = workspace.write("broken")
    with pytest.raises(DataflexError, match=r"trainer_state\.json has"):
        workspace.run("train", run, f"resume_from_checkpoint={out}/checkpoint-6")
    workspace.run("train", run)
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert 6 in [entry["current_steps"] for entry in log]
    assert_equal_weights(workspace.weights("broken"), type(workspace)(whole, workspace.tiny).weights("whole"))


def flip(path: Path) -> None:
    """Change bytes in the middle of a file; its size stays."""
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, min(len(data), len(data) // 2 + 570)):
        data[at] ^= 0xFF
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_noticed_wherever_it_is_loaded(
    workspace: Any, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = workspace.folder / "out" / "flipped"
    shutil.copytree(whole / "out" / "whole", out)
    shutil.copytree(whole / "store", workspace.folder / "store")
    flip(out / "checkpoint-7" / "adapter_model.safetensors")
    run, damaged = workspace.write("flipped"), f"{out}/checkpoint-7"
    said = r"checkpoint-7 .*adapter_model\.safetensors is damaged"
    for more in (f"resume_from_checkpoint={damaged}", f"adapter_name_or_path={damaged}"):
        with pytest.raises(CorruptionError, match=said):
            workspace.run("train", run, more)
    params = {"proj_dim": 256, "checkpoints": [f"{out}/checkpoint-6", damaged]}
    section = {"store": str(workspace.folder / "store"), "params": params}
    with pytest.raises(CorruptionError, match=said):
        workspace.run("featurize", workspace.write("featurized", dataflex=section))
    assert not (workspace.folder / "out" / "featurized" / "rounds").exists()
    workspace.run("train", run)
    assert "skipping the checkpoint" in caplog.text
    assert "adapter_model.safetensors is damaged" in caplog.text
    assert_equal_weights(workspace.weights("flipped"), type(workspace)(whole, workspace.tiny).weights("whole"))
    # It was written again.
    assert incomplete_reason(damaged) is None


def test_checkpoints_carry_the_moments_by_name(workspace: Any, whole: Path) -> None:
    from dataflex.features.adam import Moments

    folder = whole / "out" / "whole" / "checkpoint-5"
    moments = Moments.load(folder / "dataflex" / "moments.safetensors")
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    assert len(moments.scalars) == len(saved["state"])
    assert {scalars.step for scalars in moments.scalars.values()} == {5}
    total = sum(float(m.double().sum()) for m in moments.exp_avg.values())
    assert total == pytest.approx(sum(float(s["exp_avg"].double().sum()) for s in saved["state"].values()))


def test_adam_steps_at_the_rate_of_each_group(workspace: Any) -> None:
    """LoRA+: B learns faster than A, so in Adam's step it counts more; the optimizer's own file tells the same."""
    from dataflex.features.adam import Moments

    keys = {"loraplus_lr_ratio": 16.0, "update_times": 1, "lr_scheduler_type": "cosine"}
    workspace.run("train", workspace.write("plus", **keys))
    folder = workspace.folder / "out" / "plus" / "checkpoint-4"
    moments = Moments.load(folder / "dataflex" / "moments.safetensors")
    assert {n: s.rate for n, s in moments.scalars.items()} == {
        n: pytest.approx(16.0 if "lora_B" in n else 1.0) for n in moments.scalars
    }
    shutil.rmtree(folder / "dataflex")  # as LLaMA-Factory leaves a checkpoint
    section: dict[str, Any] = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}}
    section["params"]["checkpoints"] = [str(folder)]
    workspace.run("featurize", workspace.write("foreign", dataflex=section, **keys))
    names = [store.recipe["optimizer"]["adam"] for store in StoreRoot(workspace.folder / "store").stores()
             if "optimizer" in store.recipe]  # fmt: skip
    assert moments.digest() in names


def test_evaluating_and_workers_do_not_change_what_is_trained(workspace: Any, whole: Path) -> None:
    shutil.copytree(whole / "store", workspace.folder / "store")
    changed = {"eval_strategy": "steps", "eval_steps": 1, "dataloader_num_workers": 2, "plot_loss": True}
    workspace.run("train", workspace.write("changed", **changed))
    before = type(workspace)(whole, workspace.tiny)
    assert workspace.rounds("changed") == before.rounds("whole")
    assert_equal_weights(workspace.weights("changed"), before.weights("whole"))
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


def test_rotating_resumes_with_the_ages_it_had(workspace: Any) -> None:
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}}
    section["refresh"] = {"policy": "rotating", "refresh_fraction": 0.3, "max_age": 2}
    workspace.run("train", workspace.write("through", update_times=3, dataflex=section))
    out = workspace.folder / "out"
    shutil.copytree(out / "through", out / "resumed")
    for step in range(7, 10):
        shutil.rmtree(out / "resumed" / f"checkpoint-{step}")
    for name in ("round-00003", "pool-00003"):
        (out / "resumed" / "rounds" / f"{name}.parquet").unlink()
    workspace.run("train", workspace.write("resumed", update_times=3, dataflex=section))
    assert workspace.rounds("resumed") == workspace.rounds("through")
    assert_equal_weights(workspace.weights("resumed"), workspace.weights("through"))


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


def test_what_was_resumed_otherwise_is_neither_kept_nor_replayed(
    workspace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A run resumed with other arguments says so, keeps no state, and decides the rounds not begun anew."""
    path = workspace.write("run", update_times=1)
    workspace.run("train", path)
    out, states = workspace.folder / "out" / "run", workspace.folder / "store" / "states"

    def resumed(*overrides: str) -> dict[str, Any]:
        for step in (3, 4, 5):
            shutil.rmtree(out / f"checkpoint-{step}")
        shutil.rmtree(states, ignore_errors=True)
        return dict(workspace.run("train", path, *overrides))

    assert resumed()["updates"] == []  # the update was in the journal
    assert "under other settings" not in caplog.text
    assert len(resumed("neftune_noise_alpha=5", "seed=43")["updates"]) == 1
    (said,) = [r.getMessage() for r in caplog.records if "under other settings" in r.getMessage()]
    assert said.count("\n") == 2
    assert "checkpoint-2 was written under other settings (there → here): " in said
    assert "neftune_noise_alpha: (none) → 5" in said
    assert "seed: 42 → 43" in said
    assert not list(states.glob("*/manifest*"))
    with pytest.raises(MismatchError, match="global batch of 8"):
        resumed("per_device_train_batch_size=4")


def test_checkpoints_without_the_optimizer_are_not_resumed_from(workspace: Any) -> None:
    path = workspace.write("run", component_name="random", dataflex=None, update_times=1)
    workspace.run("train", path, "save_only_model=true")
    before = workspace.weights("run")
    workspace.run("train", path)
    assert_equal_weights(workspace.weights("run"), before)
    workspace.run("train", path, "save_only_model=true", "overwrite_output_dir=true")
    checkpoint = workspace.folder / "out" / "run" / "checkpoint-5"
    with pytest.raises(DataflexError, match="save_only_model"):
        workspace.run("train", path, f"resume_from_checkpoint={checkpoint}")


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


@pytest.mark.slow
def test_static_training_resumes_from_the_newest_checkpoint_that_is_whole(
    workspace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"component_name": None, "warmup_step": None, "update_step": None, "update_times": None, "max_steps": 3}
    run = workspace.write("static", train_type="static", dataflex=None, **keys)
    workspace.run("train", run)
    before, out = workspace.weights("static"), workspace.folder / "out" / "static"
    flip(out / "checkpoint-3" / "optimizer.pt")
    shutil.rmtree(out / "checkpoint-1")
    with pytest.raises(CorruptionError, match=r"optimizer\.pt is damaged"):
        workspace.run("train", run, f"resume_from_checkpoint={out}/checkpoint-3")
    workspace.run("train", run)
    assert "optimizer.pt is damaged" in caplog.text
    assert_equal_weights(workspace.weights("static"), before)
    assert incomplete_reason(out / "checkpoint-3") is None
    # Those that LLaMA-Factory wrote alone have no mark, and are gone on from with a word.
    for step in (2, 3):
        shutil.rmtree(out / f"checkpoint-{step}" / "dataflex")
    shutil.rmtree(out / "checkpoint-3")
    workspace.run("train", run)
    assert "checkpoint-2: dataflex did not write it" in caplog.text
    assert_equal_weights(workspace.weights("static"), before)


def test_offline_less_over_checkpoints_equals_their_weighted_sum(workspace: Any, whole: Path) -> None:
    """Given checkpoints, ours with named moments or a foreign one with optimizer.pt alone, choose the same rows."""
    foreign = workspace.folder / "foreign"
    for step in (3, 7):
        shutil.copytree(whole / "out" / "whole" / f"checkpoint-{step}", foreign / f"checkpoint-{step}")
        shutil.rmtree(foreign / f"checkpoint-{step}" / "dataflex")
    params = {"proj_dim": 256, "checkpoints": [str(whole / "out" / "whole" / f"checkpoint-{s}") for s in (3, 7)]}
    section = {"store": str(workspace.folder / "store"), "params": params}
    first = workspace.run("train", workspace.write("ours", dataflex=section, save_strategy="no"))
    assert [update["computed"] for update in first["updates"]] == [138, 0]
    params = {**params, "checkpoints": [str(foreign / f"checkpoint-{s}") for s in (3, 7)]}
    second = workspace.run(
        "train", workspace.write("theirs", dataflex={**section, "params": params}, save_strategy="no")
    )
    assert second["computed"] == 0
    rows = workspace.rounds("ours")
    assert rows == workspace.rounds("theirs")
    assert sorted(rows[1]) == sorted(rows[2])
