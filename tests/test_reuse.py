"""Experiments that follow each other on one root: what they share is computed once, counted and not timed."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import pytest

from tests.workspace import cut_back

POOL, TARGETS = 61, 8  # distinct rows with labels, and target rows
GRADIENT = {"kind": "gradient", "proj_dim": 256}


def run(workspace: Any, name: str, method: str, params: dict[str, Any], **keys: Any) -> dict[str, Any]:
    section = {"store": str(workspace.folder / "store"), "params": params}
    once = {"lr_scheduler_type": "constant", "save_strategy": "no", "update_times": 1}
    path = workspace.write(name, component_name=method, dataflex=section, **(once | keys))
    return dict(workspace.run("train", path))


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_later_experiments_compute_what_is_new_only(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dataflex")
    first = run(workspace, "less", "less", {"proj_dim": 256})
    assert (first["computed"], first["started_from"]) == (POOL + TARGETS, None)
    assert first["gradients_per_chosen_row"] == round((POOL + TARGETS) / 8, 3)
    later = {
        "another rule": run(workspace, "rule", "less", {"proj_dim": 256, "aggregation": "round_robin"}),
        "another budget": run(workspace, "budget", "less", {"proj_dim": 256}, update_step=3),
        "a composition": run(
            workspace, "parts", "composed", {"representation": GRADIENT, "within": "max", "across": "mean"}
        ),
        "NEAR": run(workspace, "near", "near", {"representation": GRADIENT}),
        "TSDS": run(workspace, "tsds", "tsds", {"representation": GRADIENT, "max_K": 6}),
    }
    for name, summary in later.items():
        assert (summary["computed"], summary["batches"], summary["tokens"]) == (0, 0, 0), name
        assert summary["started_from"], name
        assert summary["reused"] >= POOL + TARGETS, name
    # Another target costs its own rows; the training rows' gradients are there.
    both = ",".join(workspace.tiny.targets[:2])
    assert run(workspace, "targets", "less", {"proj_dim": 256}, eval_dataset=both)["computed"] == TARGETS
    # Under another schedule the warm-up learns at other rates: it is another state, and the log says why.
    caplog.clear()
    anew = run(workspace, "cosine", "less", {"proj_dim": 256}, lr_scheduler_type="cosine")
    assert (anew["computed"], anew["started_from"]) == (POOL + TARGETS, None)
    assert "the nearest differs in learning rates" in caplog.text


@pytest.mark.timeout(300)
def test_featurize_asks_what_a_selector_finds_out_while_choosing(workspace: Any) -> None:
    """The representatives of clusters are known once the embeddings are; their gradients are computed ahead too."""
    section = {"store": str(workspace.folder / "store")}
    section["params"] = {"proj_dim": 256, "cluster_size": 8, "samples_per_cluster": 2}  # type: ignore[assignment]
    path = workspace.write("ahead", component_name="cluster_less", dataflex=section, update_times=1)
    ahead = workspace.run("featurize", path)
    clusters = -(-62 // 8)  # rows that can be chosen, the duplicate among them
    assert ahead["gradients"] <= 2 * clusters + TARGETS < POOL
    trained = workspace.run("train", path)
    assert (trained["computed"], trained["gradients_per_chosen_row"]) == (0, 0)


@pytest.mark.timeout(300)
def test_features_of_the_base_model_are_shared_by_all_runs(workspace: Any) -> None:
    first = run(workspace, "rds", "rds_plus", {}, warmup_step=0, update_times=2)
    assert first["computed"] == POOL + TARGETS
    other = {"learning_rate": 1e-2, "lora_rank": 2, "seed": 7}
    for method in ("rds_plus", "near"):
        params: dict[str, Any] = {"near": {"representation": {"kind": "embedding", "pooling": "position_weighted"}}}
        again = run(
            workspace, f"other-{method}", method, params.get(method, {}), warmup_step=2, update_times=2, **other
        )
        assert again["computed"] == 0


@pytest.mark.timeout(300)
def test_a_model_trained_whole_has_base_losses_after_a_resumption(workspace: Any) -> None:
    """Its base is at hand before the first step only; later the losses come from the store."""
    whole = {"finetuning_type": "full", "learning_rate": 1e-3, "save_strategy": "steps", "update_times": 2}
    first = run(workspace, "whole", "delta_loss", {}, eval_dataset=None, **whole)
    assert first["computed"] == 3 * POOL  # at the base, and at two updates
    out = workspace.folder / "out" / "whole"
    cut_back(out, 3)
    rounds = workspace.rounds("whole")
    again = run(workspace, "whole", "delta_loss", {}, eval_dataset=None, **whole)
    assert again["computed"] == 0
    assert workspace.rounds("whole") == rounds


@pytest.mark.slow  # six trainings
@pytest.mark.timeout(300)
def test_what_has_another_name_is_not_reused(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    """No row of a store, no state at the end of a warm-up, no round of the journal."""
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}}
    keys: dict[str, Any] = {"component_name": "less", "dataflex": section, "lr_scheduler_type": "constant"}
    caplog.set_level(logging.INFO, logger="dataflex")
    workspace.run("train", workspace.write("first", **keys))
    out = workspace.folder / "out"

    def again(name: str, from_step: int | None, **changes: Any) -> tuple[Any, list[int], int]:
        """Train as the first run did but for some keys; return where it began, what it computed, rounds replayed."""
        if from_step is not None:
            cut_back(shutil.copytree(out / "first", out / name), from_step)
        caplog.clear()
        summary = workspace.run("train", workspace.write(name, **(keys | changes)))
        replayed = sum(record.getMessage().endswith("from the journal") for record in caplog.records)
        return summary["started_from"], [update["computed"] for update in summary["updates"]], replayed

    every = POOL + TARGETS
    assert again("same", 3) == (None, [], 2)
    began, computed, _ = again("anew", None)
    assert began is not None
    assert computed == [0, 0]
    others: dict[str, dict[str, Any]] = {"step": {"neftune_noise_alpha": 5.0}, "model": {"upcast_layernorm": True}}
    for name, changes in others.items():
        assert again(name, None, **changes) == (None, [every, every], 0), name
    assert again("round", 3, neftune_noise_alpha=5.0)[2] == 0
    assert again("setting", 3, dataflex=section | {"storage": "int8"}) == (None, [every, every], 0)
