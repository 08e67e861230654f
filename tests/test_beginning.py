"""What model and data rule out is refused when the run begins, before a step or a feature."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.config import load
from dataflex.errors import ConfigError, CoverageError, DataflexError
from dataflex.pipelines.select import select
from dataflex.selectors.base import Beginning
from dataflex.selectors.cluster_less import ClusterLess
from dataflex.selectors.composed import Composed, Composition
from dataflex.stores.root import StoreRoot
from tests.held import pool


def refused(workspace: Any, component: str, params: dict[str, Any], **keys: Any) -> str:
    """Return what a training says that ends before it did anything."""
    section = {"store": str(workspace.folder / "store"), "params": params}
    path = workspace.write("refused", component_name=component, dataflex=section, **keys)
    with pytest.raises(DataflexError) as caught:
        workspace.run("train", path)
    require_nothing_done(workspace, "refused")
    return str(caught.value)


def require_nothing_done(workspace: Any, name: str) -> None:
    out = workspace.folder / "out" / name
    assert not list(out.glob("checkpoint-*"))
    assert not (out / "rounds").exists()
    assert not StoreRoot(workspace.folder / "store").stores()


def test_a_layer_that_the_model_has_not(workspace: Any) -> None:
    assert "layer: found 99; the model has hidden states 0 to 2" in refused(workspace, "embedding", {"layer": 99})
    live = {"representation": {"kind": "embedding", "layer": -4, "model": "live"}}
    assert "layer: found -4; the model has hidden states 0 to 2" in refused(workspace, "composed", live)


def test_a_layer_that_the_encoder_has_not(workspace: Any, tiny: Any) -> None:
    params = {"embedding_model_name_or_path": str(tiny.model), "embedding_layer": 3, "proj_dim": 64}
    said = refused(workspace, "cluster_less", params)
    assert f"layer: found 3; {tiny.model} has hidden states 0 to 2" in said


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "damaged"])
def test_an_encoder_that_cannot_be_loaded(workspace: Any, tiny: Any, missing: str) -> None:
    folder = workspace.folder / "encoder"
    shutil.copytree(tiny.model, folder)
    if missing == "damaged":
        (folder / "config.json").write_text("{")
    else:
        (folder / missing).unlink()
    said = refused(workspace, "rds_plus", {"embedding_model_name_or_path": str(folder)})
    assert said.startswith(f"embedding_model_name_or_path: {folder}: ")


def test_an_encoder_that_the_hub_has_not(workspace: Any) -> None:
    said = refused(
        workspace, "near", {"representation": {"kind": "embedding", "embedding_model_name_or_path": "no-such/encoder"}}
    )
    assert "no-such/encoder: found no configuration" in said


def test_whole_gradients_are_too_wide_to_be_whitened(workspace: Any) -> None:
    said = refused(workspace, "less", {"similarity": "whitened_cosine", "projection": "identity"})
    assert "numbers per gradient; expected at most 4096" in said


def test_transport_needs_neighbours(workspace: Any) -> None:
    said = refused(workspace, "tsds", {}, max_samples=15, update_step=1)
    assert "15 candidates for nearest neighbours by transport, expected 20 or more" in said
    said = refused(workspace, "tsds", {"max_K": 2}, update_step=5)
    assert "20 rows wanted at one update, found at most 16 that 8 target rows with 2 neighbours each can reach" in said


def test_transport_is_asked_nothing_where_nothing_is_chosen() -> None:
    rule = Composed(Composition.model_validate({"rule": {"kind": "knn_uniform"}})).parts.rule
    rule.prepare(Beginning(pool(15), {"x": pool(3)}, 0, lambda spec: 8))
    with pytest.raises(CoverageError, match="15 candidates"):
        rule.prepare(Beginning(pool(15), {"x": pool(3)}, 2, lambda spec: 8))


def test_files_of_rows_are_held_against_the_training_set(workspace: Any) -> None:
    path = workspace.folder / "given.npy"
    near, tsds = {"indices_path": str(path)}, {"probs_path": str(path)}
    np.save(path, np.array([[0, 99]]))
    assert "found positions 0 to 99; the training set has rows" in refused(workspace, "near", near)
    np.save(path, np.array([[0, 1, 2], [0, 1, 2]]))
    assert "8 rows wanted at one update, found 3 with" in refused(workspace, "near", near)
    np.save(path, np.ones(7))
    assert "expected 62 finite numbers" in refused(workspace, "tsds", tsds)
    np.save(path, (np.arange(62) > 55).astype(float))
    assert "8 rows wanted at one update, found" in refused(workspace, "tsds", tsds)
    chosen = workspace.folder / "chosen.json"
    chosen.write_text(json.dumps([0, 99]))
    assert "found positions 0 to 99" in refused(workspace, "static", {"path": str(chosen)})


def test_targets_that_ask_nothing_have_no_answers(workspace: Any) -> None:
    data = workspace.folder / "data"
    shutil.copytree(workspace.tiny.dataset_dir, data)
    (data / "bare.json").write_text(json.dumps([{"instruction": "", "input": "", "output": "five"}]))
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps(info | {"bare": {"file_name": "bare.json"}}))
    keys = {"dataset_dir": str(data), "eval_dataset": "bare", "template": "empty"}
    said = refused(workspace, "nice", {"proj_dim": 64, "reward": {"type": "exact_match"}}, **keys)
    assert "row 0 of the target set begins with a supervised token" in said


def test_a_reward_model_without_a_head(workspace: Any, tiny: Any) -> None:
    said = refused(workspace, "nice", {"proj_dim": 64, "reward_model_path": str(tiny.model)})
    assert "expected a sequence-classification model with one label" in said


def test_more_rows_to_select_than_there_are_is_found_before_the_features_of_the_base(workspace: Any) -> None:
    section = {"store": str(workspace.folder / "store")}
    path = workspace.write("many", component_name="rds_plus", finetuning_type="full", dataflex=section)
    with pytest.raises(CoverageError, match="--num: found 1000; expected at most 62, the rows with labels"):
        select(load(path), 1000, Path(workspace.folder / "chosen.json"))
    require_nothing_done(workspace, "many")


def test_a_regression_takes_so_many_representatives() -> None:
    method = ClusterLess(ClusterLess.Params(carry_over="regress", cluster_size=2, samples_per_cluster=2))
    method.prepare(Beginning(pool(16_384), {}, 8, lambda spec: 8))
    with pytest.raises(ConfigError, match=r"found regress from 16400 representatives \(8200 clusters x"):
        method.prepare(Beginning(pool(16_400), {}, 8, lambda spec: 8))
    ClusterLess(ClusterLess.Params(cluster_size=2)).prepare(Beginning(pool(16_400), {}, 8, lambda spec: 8))
