"""Checkpoints are whole or not taken, damage is noticed wherever they are loaded, and they carry Adam's moments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dataflex.checkpoints.marks import incomplete_reason
from dataflex.errors import CorruptionError, DataflexError
from dataflex.stores.root import StoreRoot
from tests.workspace import assert_equal_weights


def test_an_incomplete_checkpoint_is_never_resumed_from(workspace: Any, whole: Any) -> None:
    out = workspace.folder / "out" / "broken"
    shutil.copytree(whole.folder / "out" / "whole", out)
    (out / "checkpoint-7" / "optimizer.pt").unlink()
    state = out / "checkpoint-6" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-5])
    shutil.copytree(whole.folder / "store", workspace.folder / "store")
    run = workspace.write("broken")
    with pytest.raises(DataflexError, match=r"trainer_state\.json has"):
        workspace.run("train", run, f"resume_from_checkpoint={out}/checkpoint-6")
    workspace.run("train", run)
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert 6 in [entry["current_steps"] for entry in log]
    assert_equal_weights(workspace.weights("broken"), whole.weights("whole"))


def flip(path: Path) -> None:
    """Change bytes in the middle of a file; its size stays."""
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, min(len(data), len(data) // 2 + 570)):
        data[at] ^= 0xFF
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_noticed_wherever_it_is_loaded(
    workspace: Any, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    out = workspace.folder / "out" / "flipped"
    shutil.copytree(whole.folder / "out" / "whole", out)
    shutil.copytree(whole.folder / "store", workspace.folder / "store")
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
    assert_equal_weights(workspace.weights("flipped"), whole.weights("whole"))
    # It was written again.
    assert incomplete_reason(damaged) is None


def test_checkpoints_carry_the_moments_by_name(workspace: Any, whole: Any) -> None:
    from dataflex.features.adam import Moments

    folder = whole.folder / "out" / "whole" / "checkpoint-5"
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


def test_offline_less_over_checkpoints_equals_their_weighted_sum(workspace: Any, whole: Any) -> None:
    """Given checkpoints, ours with named moments or a foreign one with optimizer.pt alone, choose the same rows."""
    foreign = workspace.folder / "foreign"
    for step in (3, 7):
        shutil.copytree(whole.folder / "out" / "whole" / f"checkpoint-{step}", foreign / f"checkpoint-{step}")
        shutil.rmtree(foreign / f"checkpoint-{step}" / "dataflex")
    params = {"proj_dim": 256, "checkpoints": [str(whole.folder / "out" / "whole" / f"checkpoint-{s}") for s in (3, 7)]}
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
