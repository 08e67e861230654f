"""`dataflex plan` says what a run comes to before it runs, computes nothing, writes nothing into the store."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import load
from dataflex.errors import ConfigError
from dataflex.live import memory
from dataflex.pipelines.plan import plan
from dataflex.pipelines.planning.shown import lines
from dataflex.pipelines.reporting.arrays import Arrays
from dataflex.pipelines.reporting.facts import facts
from dataflex.results.folder import RunFolder
from dataflex.results.names import PLAN
from tests.command import run

POOL, TARGETS = 61, 8  # distinct rows, and target rows
COUNTED = ("computed", "reused", "bytes", "gradients", "tokens", "batches")
ONCE: dict[str, Any] = {"save_strategy": "no", "save_steps": None}


def write(workspace: Any, name: str, params: Any = None, **keys: Any) -> Path:
    section = {"store": str(workspace.folder / "store"), "params": params or {}, "fragment_rows": 16}
    section |= keys.pop("dataflex", {})
    return Path(workspace.write(name, **{**ONCE, "dataflex": section, **keys}))


def planned(path: Path, *overrides: str, sample: int | None = None) -> dict[str, Any]:
    return plan(load(path, overrides), sample)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def size_of_stores(workspace: Any) -> int:
    files = (p for store in (workspace.folder / "store").glob("*-*") for p in store.rglob("*") if p.is_file())
    return sum(p.stat().st_size for p in files if "derived" not in p.parts)


@pytest.fixture(scope="module")
def less(tiny: Any, tmp_path_factory: pytest.TempPathFactory, workspace_class: Any) -> Any:
    """A workspace, its run file, what was planned before the run, and what the run came to."""
    space = workspace_class(tmp_path_factory.mktemp("plan"), tiny)
    path = write(space, "less", {"proj_dim": 256})
    before = planned(path)
    assert not (space.folder / "store").exists()
    return space, path, before, space.run("train", path)


@pytest.fixture
def no_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a forward nor a backward pass is possible."""
    import torch
    from transformers.models.qwen2 import modeling_qwen2

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pass through the model")

    for cls in (modeling_qwen2.Qwen2ForCausalLM, modeling_qwen2.Qwen2Model):
        monkeypatch.setattr(cls, "forward", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is remembered of any model."""
    monkeypatch.setenv("DATAFLEX_CACHE", str(tmp_path / "cache"))


def test_a_plan_is_what_the_run_comes_to(less: Any) -> None:
    space, path, before, done = less
    assert {name: before["totals"][name] for name in COUNTED} == {name: done[name] for name in COUNTED}
    assert before["totals"]["computed"] == 2 * (POOL + TARGETS)
    assert before["totals"]["gradients_per_chosen_row"] == done["gradients_per_chosen_row"]
    assert before["totals"]["files"] == pytest.approx(size_of_stores(space), rel=0.05)
    assert (before["rows"], before["pool"]["dropped"]) == (done["rows"], done["dropped"])
    assert before["targets"]["target_arithmetic"]["rows"] == done["target_rows"]
    assert before["schedule"] | {"steps": done["steps"]} == before["schedule"]
    assert before["schedule"]["rows_trained"] == sum(len(rows) for rows in space.rounds("less")) == 28
    (state,) = before["states"]
    assert (state["exists"], state["step"]) == (False, 3)
    assert before["seconds"]["from"] == "arithmetic"
    assert json.loads((path.parent / "out" / "less" / PLAN).read_text("utf-8"))["format"] == 1


def test_after_the_run_everything_is_there(less: Any) -> None:
    space, path, before, _ = less
    there = tree(space.folder / "store")
    after = planned(path)
    assert tree(space.folder / "store") == there
    assert (after["totals"]["computed"], after["totals"]["bytes"], after["totals"]["files"]) == (0, 0, 0)
    assert after["totals"]["reused"] == before["totals"]["computed"]
    assert all(need["missing"] == 0 and need["present"] == need["rows"] for need in after["needs"])
    assert after["featurize"]["computed"] == 0
    (state,) = after["states"]
    assert state["exists"]
    assert space.run("train", path, f"output_dir={space.folder}/again")["started_from"] == state["lineage"]
    assert after["seconds"]["from"] == "measured"  # by the notes of the run under the root
    assert [part["what"] for part in after["seconds"]["details"]] == ["4 steps of training"]
    text = "\n".join(lines(after))
    assert "3 steps of warm-up are free" in text
    assert text.count("  free") == len(after["needs"])


def test_a_store_that_is_half_full_lacks_the_rest(less: Any, tmp_path: Path) -> None:
    """Held against what `featurize` then computes."""
    space, path, before, _ = less
    store, out = tmp_path / "store", f"output_dir={tmp_path}/out"
    shutil.copytree(space.folder / "store", store)
    first = before["featurize"]["needs"]
    named = planned(path, f"dataflex.store={store}", out)["featurize"]["needs"]
    (folder,) = [need["store"] for need in named if need["of"] == "train"]
    entries = sorted((store / folder / "log").glob("*.json"))
    lost = [json.loads(entry.read_text("utf-8"))["rows"] for entry in entries[:2]]
    for entry in entries[:2]:
        entry.unlink()
    found = planned(path, f"dataflex.store={store}", out)["featurize"]
    by_rows = {need["of"]: (need["present"], need["missing"]) for need in found["needs"]}
    assert by_rows == {"train": (POOL - sum(lost), sum(lost)), "target_arithmetic": (TARGETS, 0)}
    assert len(entries) == 4
    assert found["bytes"] * POOL == sum(need["bytes"] for need in first if need["of"] == "train") * sum(lost)
    done = space.run("featurize", path, f"dataflex.store={store}", out)
    assert {name: found[name] for name in COUNTED} == {name: done[name] for name in COUNTED}


@pytest.mark.usefixtures("no_passes", "forgotten")
def test_the_model_is_loaded_once_and_no_pass_is_made(
    less: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamafactory.train.sft import workflow

    _, path, _, _ = less
    model, loaded = tmp_path / "model", []
    shutil.copytree(load(path, []).llamafactory["model_name_or_path"], model)
    own = (f"model_name_or_path={model}", f"dataflex.store={tmp_path}/none", f"output_dir={tmp_path}/out")
    load_model = workflow.load_model

    def counted(*args: Any, **kwargs: Any) -> Any:
        loaded.append(1)
        return load_model(*args, **kwargs)

    monkeypatch.setattr(workflow, "load_model", counted)
    cold, warm = planned(path, *own), planned(path, *own)
    assert len(loaded) == 1
    for found in (cold, warm):
        del found["took"], found["time"], found["seconds"], found["featurize"]["seconds"]
    assert warm == cold
    planned(path, *own, "dataflex.params.proj_dim=64", "update_times=3")  # of the same model
    assert len(loaded) == 1
    for number, change in enumerate((["seed=7"], ["lora_rank=2"], []), 2):
        if not change:
            weights = bytearray((model / "model.safetensors").read_bytes())
            weights[-1] ^= 1
            (model / "model.safetensors").write_bytes(weights)
        planned(path, *own, *change)
        assert len(loaded) == number, change
    assert not (tmp_path / "none").exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [PLAN]


def test_a_large_file_is_another_when_it_was_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its size and the time of its content were put back: that of its status cannot be."""
    monkeypatch.setattr(memory, "SMALL", 3)
    path = tmp_path / "weights"
    path.write_bytes(b"1234")
    first, about = memory.contents(tmp_path), path.stat()
    assert not memory.is_settled(first)  # a moment ago
    assert memory.contents(tmp_path) == first
    monkeypatch.setattr(memory, "_SETTLED", -1e9)
    assert memory.is_settled(first)
    path.write_bytes(b"4321")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert memory.contents(tmp_path) != first


def test_a_memory_believes_no_damage(tmp_path: Path) -> None:
    kept = memory.Memory(tmp_path)
    kept.keep({"what": "a"}, [1])
    assert (kept.recall({"what": "a"}), kept.recall({"what": "b"})) == ([1], None)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    assert kept.recall({"what": "a"}) is None


def test_a_sample_stands_for_all_and_says_so(less: Any, tmp_path: Path) -> None:
    _, path, before, _ = less
    own = (f"dataflex.store={tmp_path}/none", f"output_dir={tmp_path}/out")
    found = planned(path, *own, sample=21)
    assert found["sample"]["of"] == {"pool": 63, "target_arithmetic": 8}
    assert found["sample"]["records"] == {"pool": 21, "target_arithmetic": 8}
    assert found["rows"] in (60, 63)  # 21 records, of which one may be dropped, three times
    assert 0.5 * before["tokens"] < found["tokens"] < 2 * before["tokens"]
    assert found["totals"]["computed"] == 2 * (found["pool"]["distinct"] + TARGETS)
    assert found["states"] == []
    assert "drawn at random" in found["notes"][0]
    assert planned(path, *own, sample=63)["tokens"] == before["tokens"]


@pytest.mark.parametrize(
    ("method", "params", "keys", "asked"),
    [
        ("random", {}, {}, 0),
        ("ifd", {}, {"eval_dataset": None}, 2 * POOL),
        ("delta_loss", {}, {"eval_dataset": None}, 3 * POOL),
        ("rds_plus", {}, {"eval_dataset": "target_words,target_records"}, POOL + 2 * TARGETS),
        ("nice", {"proj_dim": 64, "reward": {"type": "exact_match"}, "mc_samples": 2}, {}, 2 * (POOL + TARGETS)),
    ],
)
@pytest.mark.usefixtures("no_passes")
def test_selectors(workspace: Any, method: str, params: Any, keys: Any, asked: int) -> None:
    found = planned(write(workspace, "run", params, component_name=method, **keys))
    assert found["totals"]["computed"] == asked
    assert not (workspace.folder / "store").exists()


@pytest.mark.usefixtures("no_passes")
def test_what_a_method_does_not_declare_is_said(workspace: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def select(self, model, step_id, num_samples, **kw):\n        pass\n"
    )
    found = planned(write(workspace, "mine", component_name=f"{tmp_path}/mine.py:Mine"))
    assert found["totals"]["computed"] == 0
    assert any("declares no features" in note for note in found["notes"])
    clusters = planned(write(workspace, "clusters", {"proj_dim": 64}, component_name="cluster_less"))
    assert any("of some training rows that it finds while it chooses" in note for note in clusters["notes"])


def test_the_command_prints_lines_or_json(less: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, path, _, _ = less
    code, out, _ = run(capsys, "plan", str(path), "--json")
    assert code == 0
    found = json.loads(out)
    assert {"rows", "tokens", "targets", "schedule", "needs", "states", "totals", "seconds"} <= found.keys()
    code, out, _ = run(capsys, "plan", str(path))
    assert code == 0
    assert "nothing is computed; 138 values are there" in out


def test_several_processes_do_not_plan(less: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path, before, _ = less
    settings = load(path, [f"output_dir={path.parent}/two"])
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    two = plan(settings)
    assert (two["schedule"]["processes"], two["schedule"]["global_batch"]) == (2, 8)
    assert two["schedule"]["rows_trained"] == 2 * before["schedule"]["rows_trained"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="found 2 processes; expected one"):
        plan(settings)


def test_no_secret_is_in_a_plan(workspace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    judge = {"type": "judge", "base_url": "http://user:hunter2@localhost:1/v1?api_key=hunter3", "model": "m"}
    path = write(workspace, "nice", {"reward": judge, "proj_dim": 64}, component_name="nice")
    code, out, _ = run(capsys, "plan", str(path), "--json")
    assert code == 0
    kept = (workspace.folder / "out" / "nice" / PLAN).read_text()
    assert "hunter" not in out + kept
    assert "localhost:1/v1" in kept


def test_a_sample_plans_the_schedule_and_the_targets_of_all(workspace: Any) -> None:
    section = {"target_rows": 2}
    path = write(workspace, "whole", {"proj_dim": 64}, update_times=-1, num_train_epochs=1.0, dataflex=section)
    whole, some = planned(path), planned(path, sample=31)
    assert some["schedule"]["steps"] == whole["schedule"]["steps"]
    assert (
        [each["rows"] for each in some["targets"].values()]
        == [each["rows"] for each in whole["targets"].values()]
        == [2]
    )
    assert some["totals"]["computed"] == pytest.approx(whole["totals"]["computed"], rel=0.1)
    with pytest.raises(ConfigError, match="expected a share below 1"):
        planned(path, "val_size=8", "eval_dataset=null", sample=31)


def test_a_plan_names_what_the_run_names(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the division of the batch, and by DeepSpeed's file, which is a part of the identity."""
    path = write(workspace, "named", {"proj_dim": 64}, dataflex={"warmup_split": "exact"})
    one = planned(path)
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    two = planned(path, "gradient_accumulation_steps=1")
    assert one["schedule"]["global_batch"] == two["schedule"]["global_batch"]
    assert one["states"][0]["lineage"] != two["states"][0]["lineage"]
    file = workspace.folder / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}')
    sharded = planned(path, "gradient_accumulation_steps=1", f"deepspeed={file}")
    assert sharded["digest"] != two["digest"]
    file.write_text('{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": "auto"}')
    assert planned(path, "gradient_accumulation_steps=1", f"deepspeed={file}")["digest"] != sharded["digest"]


def test_a_report_has_the_plan_that_was_made_before_the_run(less: Any) -> None:
    space, path, before, _ = less
    folder = space.folder / "out" / "less"
    about = RunFolder(folder).about
    assert (about["digest"], about["planned"]) == (before["digest"], before["seconds"])
    planned(path, "update_times=5")  # another plan, and later
    said = dict(facts("x", Arrays(RunFolder(folder))).cost)["seconds, as planned"]
    assert float(said.split()[0].replace(",", "")) == pytest.approx(before["seconds"]["estimate"], rel=1e-3)
    planned(path)
