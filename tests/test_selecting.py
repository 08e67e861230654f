"""`dataflex select` writes the chosen records and registers them, and they can be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataflex.config import load
from dataflex.errors import ConfigError, CoverageError
from dataflex.pipelines.select import select


def chosen(workspace: Any, name: str, num: int, *overrides: str, **keys: Any) -> tuple[list[Any], Any]:
    output = workspace.folder / "chosen" / f"{name}.json"
    select(load(workspace.write(name, **keys), overrides), num, output)
    return json.loads(output.read_text("utf-8")), pq.read_table(output.with_suffix(".parquet"))


def test_records_keep_all_their_fields_and_can_be_trained_on(workspace: Any, tiny: Any) -> None:
    pool = json.loads((Path(tiny.dataset_dir) / "pool.json").read_text())
    records, table = chosen(workspace, "picked", 12)
    assert table.column_names == ["index", "row_key", "score", "rank", "dataset", "record", "tokens"]
    assert records == [pool[i] for i in table["record"].to_pylist()]
    assert records[0].keys() == {"id", "source", "instruction", "input", "output"}
    scores = table["score"].to_numpy()
    assert (np.diff(scores) <= 0).all()
    assert table["rank"].to_pylist() == list(range(12))
    folder = workspace.folder / "chosen"
    assert json.loads((folder / "dataset_info.json").read_text())["picked"]["file_name"] == "picked.json"
    # LLaMA-Factory trains on the file, and `static` trains on the same rows of the pool.
    plain = {
        "train_type": "static",
        "component_name": None,
        "warmup_step": None,
        "update_step": None,
        "update_times": None,
    }
    keys = {"dataset": "picked", "dataset_dir": str(folder), "eval_dataset": None, "max_steps": 1, "dataflex": None}
    workspace.run("train", workspace.write("plain", **plain, **keys))
    section = {"params": {"path": str(folder / "picked.parquet")}}
    workspace.run(
        "train", workspace.write("fixed", component_name="static", warmup_step=0, update_step=3, dataflex=section)
    )
    rows = [row for round in workspace.rounds("fixed") for row in round]
    assert sorted(rows[:12]) == sorted(rows[12:]) == sorted(table["index"].to_pylist())


def test_choosing_again_computes_nothing_and_a_longer_choice_begins_alike(workspace: Any) -> None:
    _, short = chosen(workspace, "picked", 5)
    _, long = chosen(workspace, "picked", 20)
    assert long["index"].to_pylist()[:5] == short["index"].to_pylist()
    summary = json.loads((workspace.folder / "out" / "picked" / "dataflex_select.json").read_text())
    assert (summary["computed"], summary["batches"]) == (0, 0)
    assert summary["started_from"]


def test_a_grown_reordered_pool_recomputes_only_what_is_new(workspace: Any, tiny: Any) -> None:
    pool = json.loads((Path(tiny.dataset_dir) / "pool.json").read_text())
    folder = workspace.folder / "data"
    folder.mkdir()
    info = {
        "small": {"file_name": "small.json"},
        "large": {"file_name": "large.json"},
        "target": {"file_name": "target.json"},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "target.json").write_text((Path(tiny.dataset_dir) / "target_words.json").read_text())
    (folder / "small.json").write_text(json.dumps(pool[:30]))
    (folder / "large.json").write_text(json.dumps(pool[40:10:-1] + pool[:20]))
    checkpoints = [str(workspace.folder / "out" / "made" / "checkpoint-3")]
    workspace.run(
        "train", workspace.write("made", component_name="random", max_samples=40, update_times=1, dataflex=None)
    )
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 64, "checkpoints": checkpoints}}
    keys = {"dataset_dir": str(folder), "eval_dataset": "target", "dataflex": section}
    first = workspace.run("featurize", workspace.write("run", dataset="small", **keys))
    assert first["computed"] == 30 + 8
    grown = workspace.run("featurize", workspace.write("run", dataset="large", **keys))
    assert grown["rows"] == 50
    assert grown["computed"] == 11  # records 30 to 40; the others, twice there or moved, are known
    both = workspace.run("featurize", workspace.write("run", dataset="large,small", **keys))
    assert both["computed"] == 0
    cut = workspace.run("featurize", workspace.write("run", dataset="small", cutoff_len=40, **keys))
    assert cut["computed"] > 0  # other tokens, other keys


def test_several_datasets_keep_their_registration(workspace: Any, tiny: Any) -> None:
    records, table = chosen(workspace, "mixed", 65, dataset="pool,target_words", component_name="random", dataflex=None)
    assert set(table["dataset"].to_pylist()) == {"pool", "target_words"}
    assert len(records) == 65


@pytest.mark.parametrize(
    ("num", "keys", "error", "said"),
    [
        (0, {}, ConfigError, "--num: found 0"),
        (1000, {}, CoverageError, "--num: found 1000; expected at most 62, the rows with labels"),
        (2, {"stage": "pt", "dataset": "text", "eval_dataset": "text_target"}, ConfigError, "packing: false"),
        (2, {"train_type": "static", "component_name": None, "warmup_step": None}, ConfigError, "component_name"),
    ],
    ids=["none", "too many", "packed", "static"],
)
def test_what_cannot_be_selected_is_an_error(
    workspace: Any, num: int, keys: dict[str, Any], error: Any, said: str
) -> None:
    with pytest.raises(error, match=said):
        chosen(workspace, "bad", num, **keys)


def test_unpacked_text_is_selected_as_records(workspace: Any, tiny: Any) -> None:
    keys = {"stage": "pt", "dataset": "text", "eval_dataset": "text_target", "packing": False, "cutoff_len": 64}
    records, _ = chosen(workspace, "texts", 4, **keys)
    texts = json.loads((Path(tiny.dataset_dir) / "text.json").read_text())
    assert all(record in texts for record in records)
