"""`featurize` computes every feature in one pass, names what it cannot use, and shares a store with another."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.errors import ConfigError, DataflexError
from dataflex.rows import Status
from dataflex.stores.root import StoreRoot
from dataflex.stores.rounding import STORAGES
from tests.looked_at import problems
from tests.processes import environment

ALL = [{"kind": "loss"}, {"kind": "embedding"}, {"kind": "embedding", "pooling": "position_weighted", "layer": 1}]


def section(workspace: Any, **more: Any) -> dict[str, Any]:
    return {"store": str(workspace.folder / "store"), **more}


def stores_by_kind(workspace: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for store in StoreRoot(workspace.folder / "store").stores():
        assert problems(store) == []
        found.setdefault(store.kind, []).append(store)
    return found


def test_one_pass_gives_every_feature_and_what_is_there_is_left_alone(workspace: Any) -> None:
    run = workspace.write("run", dataflex=section(workspace, params={"proj_dim": 128}, features=ALL))
    summary = workspace.run("featurize", run)
    # 61 distinct rows and 8 target rows: three features more than LESS asks for, and as many passes.
    assert summary["computed"] == (61 + 8) * 4
    alone = workspace.run("featurize", run, f"dataflex.store={workspace.folder}/other", "dataflex.features=[]")
    assert summary["batches"] == alone["batches"]
    found = stores_by_kind(workspace)
    assert {kind: len(several) for kind, several in found.items()} == {"loss": 1, "embedding": 2, "gradient": 2}
    assert all((Path(store.path) / "derived" / "faiss").is_dir() for store in found["embedding"])
    more = section(workspace, params={"proj_dim": 128}, features=[*ALL, {"kind": "embedding", "pooling": "last"}])
    again = workspace.run("featurize", workspace.write("run", dataflex=more))
    assert again["computed"] == 69
    assert again["reused"] == 69 * 4


def test_values_are_those_of_the_plain_model_whatever_the_storage(workspace: Any, tiny: Any) -> None:
    """With LoRA's B at zero the model is its base, so another adapter computes nothing again."""
    from transformers import AutoModelForCausalLM

    features = [{"kind": "loss"}, {"kind": "embedding"}]
    keys: dict[str, Any] = {"component_name": "random", "eval_dataset": None}
    vectors = {}
    for storage in STORAGES:
        run = workspace.write("run", dataflex=section(workspace, features=features, storage=storage), **keys)
        workspace.run("featurize", run)
    other = workspace.run("featurize", run, "lora_rank=8", "seed=7", "gradient_checkpointing=false")
    assert other["computed"] == 0
    for store in stores_by_kind(workspace)["embedding"]:
        block = next(store.scan())
        vectors[store.layout.storage] = (block.keys, block.vectors)
    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()

    loss = next(s for s in stores_by_kind(workspace)["loss"] if s.layout.storage == "float32")
    rows = rows_of(workspace, run)
    for row in (0, 5, 40):
        example = rows.examples[row]
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        with torch.no_grad():
            output = model(input_ids=ids, labels=labels, output_hidden_states=True)
        value = loss.read(rows.keys[row : row + 1])
        assert value.scalars["tokens"][0] == rows.supervised[row]
        assert value.scalars["loss_sum"][0] / rows.supervised[row] == pytest.approx(float(output.loss), rel=1e-5)
        expected = output.hidden_states[-1][0].mean(dim=0).numpy()
        for storage, tolerance in (("float32", 1e-5), ("float16", 1e-3), ("int8", 1e-2), ("int4", 0.08)):
            keys_, stored = vectors[storage]
            at = int(np.flatnonzero(keys_ == rows.keys[row])[0])
            np.testing.assert_allclose(stored[at], expected, atol=tolerance * np.abs(expected).max())
        keys_, stored = vectors["int1"]
        signs = stored[int(np.flatnonzero(keys_ == rows.keys[row])[0])]
        np.testing.assert_allclose(np.abs(signs), np.abs(expected).mean(), rtol=1e-4)
        assert (np.sign(signs) == np.sign(expected))[np.abs(expected) > 1e-5].all()


def rows_of(workspace: Any, run: Path) -> Any:
    """Return the training rows of a run file."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from dataflex.config import load
    from dataflex.llamafactory.row_sets import load_rows

    arguments = load(run).llamafactory | {"overwrite_output_dir": True}
    model_args, data_args, training_args, _, _ = get_train_args(arguments)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    return load_rows(template, model_args, data_args, training_args, "sft", **module).train


def test_too_many_values_that_are_not_finite_stop_the_run(workspace: Any, tiny: Any) -> None:
    from safetensors.torch import load_file, save_file

    broken = workspace.folder / "broken"
    shutil.copytree(tiny.model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    keys: dict[str, Any] = {"component_name": "random", "eval_dataset": None, "model_name_or_path": str(broken)}
    run = workspace.write("run", dataflex=section(workspace, features=[{"kind": "loss"}]), **keys)
    with pytest.raises(DataflexError, match=r"61 of 61 rows gave NaN or infinity; dataflex\.nonfinite_limit"):
        workspace.run("featurize", run)
    summary = workspace.run("featurize", run, "dataflex.nonfinite_limit=1.0")
    (store,) = stores_by_kind(workspace)["loss"]
    assert set(next(store.scan()).status.tolist()) == {Status.NONFINITE}
    assert summary["rows"] == 62


def test_the_limit_is_a_share_of_the_whole_dataset_whatever_was_there_before(workspace: Any, tiny: Any) -> None:
    """A dataset that grows by one bad row is the same dataset as one that had it from the start."""
    from safetensors.torch import load_file, save_file

    keys: dict[str, Any] = {"component_name": "random", "eval_dataset": None}
    rows = rows_of(workspace, workspace.write("plain", dataflex=section(workspace), **keys))
    tokens = [set(rows.examples[row]["input_ids"]) for row in range(len(rows))]
    row = next(r for r in range(60) if tokens[r] - set().union(*tokens[:r], *tokens[r + 1 :]))
    token = min(tokens[row] - set().union(*tokens[:row], *tokens[row + 1 :]))
    broken = workspace.folder / "broken"
    shutil.copytree(tiny.model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"] = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).clone()
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    data = workspace.folder / "data"
    shutil.copytree(tiny.dataset_dir, data)
    (file,) = data.glob(f"{tiny.pool}.json*")
    records = json.loads(file.read_text())
    records.append(records.pop(int(rows.index[row])))  # the last one, so that `max_samples` can leave it out
    file.write_text(json.dumps(records))
    keys |= {"model_name_or_path": str(broken), "dataset_dir": str(data)}
    run = workspace.write("run", dataflex=section(workspace, features=[{"kind": "loss"}], nonfinite_limit=0.02), **keys)
    before = workspace.run("featurize", run, f"max_samples={len(records) - 1}")
    after = workspace.run("featurize", run)  # one of one row is bad, and one of 61
    assert (before["computed"], after["computed"], after["reused"]) == (60, 1, 60)
    assert workspace.run("featurize", run)["computed"] == 0
    for root in ("store", "fresh"):
        with pytest.raises(DataflexError, match="1 of 61 rows gave NaN or infinity"):
            workspace.run(
                "featurize", run, "dataflex.nonfinite_limit=0.01", f"dataflex.store={workspace.folder}/{root}"
            )


def test_what_is_missing_from_a_run_is_said(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="random asks for no features"):
        workspace.run("featurize", workspace.write("none", component_name="random", dataflex=section(workspace)))
    with caplog.at_level(logging.WARNING, logger="dataflex"):
        workspace.run("featurize", workspace.write("cold", warmup_step=0, update_times=1))
    assert "at LoRA's initialisation B is zero" in caplog.text


def test_featurize_leaves_the_runs_own_output_alone(workspace: Any) -> None:
    run = workspace.write("run")
    output = workspace.folder / "out" / "run"
    workspace.run("featurize", run)
    assert sorted(path.name for path in output.iterdir()) == [
        "dataflex_featurize.json", "dataflex_rows_featurize.parquet", "dataflex_run_featurize.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_at_once_on_one_store_both_finish(workspace: Any) -> None:
    """Independent processes, not one launch: they share nothing but the store."""
    made = workspace.run("train", workspace.write("made", component_name="random", update_times=1, dataflex=None))
    assert made["computed"] == 0
    params = {"proj_dim": 64, "checkpoints": [str(workspace.folder / "out" / "made" / "checkpoint-5")]}
    processes = []
    for name in ("a", "b"):
        run = workspace.write(name, dataflex=section(workspace, params=params, fragment_rows=16))
        command = [sys.executable, "-m", "dataflex.cli", "featurize", str(run)]
        log = (workspace.folder / f"{name}.log").open("wb")
        processes.append(subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT))
    for process, name in zip(processes, "ab", strict=True):
        assert process.wait(200) == 0, (workspace.folder / f"{name}.log").read_text()[-3000:]
    found = stores_by_kind(workspace)["gradient"]
    assert sorted(store.rows for store in found) == [8, 61]
    summaries = [json.loads((workspace.folder / "out" / n / "dataflex_featurize.json").read_text()) for n in "ab"]
    assert all(summary["computed"] + summary["reused"] == 69 for summary in summaries)
