"""Several methods trained and measured by one command, each an ordinary run; finished ones are kept."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dataflex.config import load
from dataflex.errors import ConfigError, ConflictError, DataflexError, MismatchError
from dataflex.pipelines.compare import compare
from dataflex.pipelines.comparing.arms import arms_of, overrides
from dataflex.pipelines.comparing.plans import plans_of
from dataflex.pipelines.comparing.running import alone, processes, shares
from dataflex.pipelines.comparing.trials import trials_of
from dataflex.schedule import MOST_STEPS
from tests.processes import environment
from tests.workspace import assert_equal_weights


def write(workspace: Any, name: str = "run", **more: Any) -> Path:
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "test_dataset": "target_words"}
    section |= more.pop("dataflex", {})
    keys: dict[str, Any] = {"save_strategy": "no", "update_step": 1, **more}
    return Path(workspace.write(name, dataflex=section, **keys))


def laid_out(path: Path, methods: str, seeds: int = 2, targets: tuple[str, ...] = (), draws: int = 1) -> list[Any]:
    base = load(path, [])
    return trials_of(path, [], arms_of(methods.split(","), base), seeds, targets, draws, base)


def test_every_arm_is_laid_out_as_an_ordinary_run(workspace: Any) -> None:
    path = write(workspace, seed=7)
    trials = laid_out(path, "less,random,random_length:less,full,full_epoch,base,odm")
    assert [t.name for t in trials if t.arm.name in ("less", "base")] == [
        "less for target_arithmetic seed 7", "less for target_arithmetic seed 8", "base",
    ]  # fmt: skip
    found = {t.arm.name: t for t in trials}
    steps = {name: t.settings.schedule.total(62, 4) for name, t in found.items()}
    assert steps == {name: 16 if name == "full_epoch" else 5 for name in found}
    assert found["less"].settings.params.proj_dim == 256
    assert found["random"].settings.component_name == "random"
    assert found["odm"].settings.train_type == "dynamic_mix"
    assert [r.kind for r in found["full"].settings.schedule.rounds(62, 4)] == ["warmup"]
    assert [r.kind for r in found["full_epoch"].settings.schedule.rounds(62, 4)] == ["warmup"]
    assert found["full_epoch"].settings.schedule.warmup_step == MOST_STEPS
    assert (found["base"].verb, found["base"].seed) == ("evaluate", None)
    folders = [t.folder.relative_to(workspace.folder / "out" / "run").as_posix() for t in trials]
    assert folders[:3] == ["compare/less/seed-7", "compare/less/seed-8", "compare/random/seed-7"]
    assert len(set(folders)) == len(folders)


def test_targets_and_their_draws_are_for_methods_that_are_shown_some(workspace: Any) -> None:
    path = write(workspace, dataflex={"target_rows": 3, "test_dataset": "target_records"})
    trials = laid_out(path, "less,random", 1, ("target_arithmetic", "target_words"), 2)
    found = [(t.arm.name, t.target, t.target_seed) for t in trials]
    assert found == [
        *(("less", target, draw) for target in ("target_arithmetic", "target_words") for draw in (0, 1)),
        ("random", None, None),
    ]
    assert trials[3].settings.llamafactory["eval_dataset"] == "target_words"
    assert trials[3].settings.dataflex.target_seed == 1


def test_rows_of_like_lengths_are_drawn_for_each_target_of_what_they_mirror(workspace: Any) -> None:
    path = write(workspace)
    trials = laid_out(path, "less,random,random_length:less", 2, ("target_arithmetic", "target_words"))
    plans = plans_of(trials, path, [], 1, False)
    mirrored = {t.name: plans[t.name].of for t in trials if t.arm.mirrors}
    assert {name: of.name for name, of in mirrored.items() if of} == {
        f"random_length:less for {target} seed {seed}": f"less for {target} seed {seed}"
        for target in ("target_arithmetic", "target_words")
        for seed in (42, 43)
    }


def test_arms_of_the_run_file_are_its_variants(workspace: Any) -> None:
    variants = {
        "narrow": {"dataflex.params": {"proj_dim": 64}},
        "by loss": {"component_name": "loss", "dataflex.params": {}},
    }
    trials = laid_out(write(workspace, dataflex={"arms": variants}), "narrow,by loss,less", 1)
    assert trials[0].settings.params.proj_dim == 64
    assert trials[1].settings.component_name == "loss"
    assert trials[1].folder.parent.name == "by-loss"
    assert trials[2].settings.params.proj_dim == 256


@pytest.mark.parametrize(
    ("methods", "more", "said"),
    [
        ("less,lss", {}, r"--methods: found 'lss'; expected base, .*did you mean 'loss'"),
        ("less,less", {}, "found less twice"),
        ("random_length,random", {}, "expected random_length:METHOD with another method of the list"),
        ("random_length:rds_plus,less", {}, r"whose lengths it takes \(less\)"),
        ("full,less", {"update_times": -1}, "full is trained for as many steps as the run.*set train_step"),
        ("less", {"dataflex": {"arms": {"less": {"seed": "x"}}}}, "seed: found 'x'"),
        ("a b,a-b", {"dataflex": {"arms": {"a b": {}, "a-b": {}}}}, "would share the folder a-b"),
    ],
)
def test_what_cannot_be_compared_is_refused(workspace: Any, methods: str, more: dict[str, Any], said: str) -> None:
    path = write(workspace, **more)
    with pytest.raises(ConfigError, match=said):
        laid_out(path, methods)


def test_nothing_is_begun_where_something_is_refused(workspace: Any) -> None:
    with pytest.raises(ConfigError, match="test_dataset: found none"):
        compare(write(workspace, dataflex={"test_dataset": []}), [], ["less"])
    with pytest.raises(ConfigError, match="random_length:odm: odm chooses no rows"):
        compare(write(workspace), [], ["odm", "random_length:odm"])
    with pytest.raises(ConfigError, match=r"--target-seeds: found no dataflex\.target_rows"):
        compare(write(workspace), [], ["less"], target_seeds=2)
    assert not (workspace.folder / "out").exists()


def test_a_folder_is_one_runs_alone(workspace: Any) -> None:
    (trial,) = laid_out(write(workspace), "less", 1)
    command = trial.command(workspace.folder / "run.yaml", [], {})
    assert command[-2:] == ["seed=42", f'output_dir="{trial.folder}"']
    assert trial.check(trial.identity(None, 1)) is False
    trial.note(trial.identity(None, 1), command)
    assert trial.check(trial.identity(None, 1)) is False  # not finished: it goes on
    (other,) = laid_out(write(workspace, learning_rate=1e-4), "less", 1)
    assert other.check(other.identity(None, 1)) is False  # nothing was trained yet
    (trial.folder / "rounds").mkdir()
    with pytest.raises(MismatchError, match=r"arguments\.learning_rate: 0\.003 → 0\.0001"):
        other.check(other.identity(None, 1))
    with pytest.raises(MismatchError, match="processes: 1 → 2"):
        trial.check(trial.identity(None, 2))
    trial.about.unlink()
    with pytest.raises(MismatchError, match="what no comparison made"):
        trial.check(trial.identity(None, 1))


def test_two_comparisons_are_not_made_in_one_folder(workspace: Any) -> None:
    path = write(workspace)
    with alone(workspace.folder / "out" / "run" / "compare") as held:
        with pytest.raises(ConflictError, match="found another comparison at work there"):
            compare(path, [], ["base"])
        # Nor where the other is gone and one of its runs is not.
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(held,))
    with pytest.raises(ConflictError):
        compare(path, [], ["base"])
    child.communicate(b"\n")
    with alone(workspace.folder / "out" / "run" / "compare"):
        pass


def test_it_is_called_once_whatever_starts_processes(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="expected to be called once"):
        compare(write(workspace), [], ["base"])


def test_each_run_has_its_share_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,4,6,7")
    name = "CUDA_VISIBLE_DEVICES"
    assert shares(1) == [{}]
    port = {"MASTER_PORT": ""}  # a run finds a free one
    assert shares(2) == [{name: "0,2", **port}, {name: "4,6", **port}]
    assert shares(5) == [{name: each, **port} for each in "02467"]
    assert [each[name] for each in shares(7)] == ["0", "2", "4", "6", "7", "0", "2"]
    assert (processes({}), processes({name: "0,2"})) == (5, 2)
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    assert processes({}) == 4
    with pytest.raises(ConfigError, match="NPROC_PER_NODE: found 4; expected at most 2"):
        processes({name: "0,2"})


def test_whatever_says_which_model_is_measured_is_in_the_identity(workspace: Any, tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("def f(prompts, responses, references):\n    return [0.0] * len(prompts)\n")
    judged = {"dataflex": {"test_reward": {"type": "function", "function": f"{reward}:f"}}}
    evaluated: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}

    def named(**more: Any) -> dict[str, Any]:
        path = write(workspace, **({**judged, **evaluated, "save_strategy": "steps"} | more))
        return dict(laid_out(path, "less", 1)[0].identity(None, 1))

    before = named()
    assert named(load_best_model_at_end=True) != before
    assert named(eval_steps=2, save_steps=2) != before
    assert named(output_dir=str(workspace.folder / "elsewhere")) == before
    reward.write_text(reward.read_text().replace("0.0", "1.0"))
    assert named() != before


def test_changed_data_are_another_comparison(workspace: Any, tmp_path: Path) -> None:
    import shutil

    data = shutil.copytree(workspace.tiny.dataset_dir, tmp_path / "copied")
    path = write(workspace, dataset_dir=str(data))
    before = laid_out(path, "less", 1)[0].identity(None, 1)
    assert laid_out(path, "less", 1)[0].identity(None, 1) == before
    for name in ("pool", "target_arithmetic", "target_words"):
        file = data / f"{name}.json"
        kept = file.read_text()
        file.write_text(kept.replace("0", "1", 1))
        assert laid_out(path, "less", 1)[0].identity(None, 1) != before, name
        file.write_text(kept)
    assert laid_out(path, "less", 1)[0].identity(None, 1) == before


def test_values_pass_the_command_line_as_they_are() -> None:
    keys = {"a.b": {"text": "x: y # z", "none": None, "list": [1, 2.5]}, "path": "/tmp/a b/ä=1", "flag": True}
    assert overrides(keys)[1] == 'path="/tmp/a b/ä=1"'
    assert overrides(keys)[0] == 'a.b={"text": "x: y # z", "none": null, "list": [1, 2.5]}'


FAILING = """
from dataflex.selectors import NativeSelector, register_selector

@register_selector("failing")
class Failing(NativeSelector):
    def select(self, model, step_id, num_samples, *, context, **kwargs):
        raise ValueError("not today")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_methods_are_trained_measured_and_kept(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dataflex")
    (workspace.folder / "failing.py").write_text(FAILING)
    path = write(workspace, dataflex={"plugins": [str(workspace.folder / "failing.py")]})
    out = workspace.folder / "out" / "run"
    table = compare(path, [], ["less", "loss", "random"], seeds=1)
    assert [line.arm for line in table] == ["less", "loss", "random"]
    summaries = {
        name: json.loads((out / "compare" / name / "seed-42" / "dataflex_summary.json").read_text())
        for name in ("less", "loss", "random")
    }
    # What both ask for at the first update was computed once, before either began.
    assert summaries["less"]["updates"][0]["computed"] == summaries["loss"]["updates"][0]["computed"] == 0
    for line in table:
        assert line.loss is not None
        assert line.loss.mean == summaries[line.arm]["test"]["target_words"]["loss"]
    # Each is an ordinary run.
    workspace.run("train", write(workspace, "alone"))
    compared = out / "compare" / "less" / "seed-42"
    rounds = [pq.read_table(each)["index"].to_pylist() for each in sorted((compared / "rounds").glob("round-*"))]
    assert rounds == workspace.rounds("alone")
    from safetensors.torch import load_file

    assert_equal_weights(load_file(compared / "adapter_model.safetensors"), workspace.weights("alone"))
    # More methods beside: what is finished is kept, and one that fails keeps none of the others.
    before = (compared / "status.json").stat().st_mtime_ns
    caplog.clear()
    with pytest.raises(DataflexError, match=r"1 of 6 runs did not finish; the first, failing seed 42: .*not today"):
        compare(path, [], ["less", "loss", "random", "random_length:less", "failing", "base"], seeds=1, jobs=2)
    assert "6 runs, 3 of them finished before" in caplog.text
    assert (compared / "status.json").stat().st_mtime_ns == before
    found = pq.read_table(out / "compare.parquet").to_pylist()
    assert [record["arm"] for record in found] == ["less", "loss", "random", "random_length:less", "base"]
    lengths = [
        sorted(t for each in sorted((out / "compare" / name / "seed-42" / "rounds").glob("round-0000[12]*"))
               for t in pq.read_table(each)["tokens"].to_pylist())
        for name in ("less", "random_length-less", "random")
    ]  # fmt: skip
    assert sum(abs(a - b) for a, b in zip(*lengths[:2], strict=True)) < sum(
        abs(a - b) for a, b in zip(lengths[0], lengths[2], strict=True)
    )
    assert "failing" in (out / "compare.md").read_text()
    page = (out / "report.html").read_text("utf-8")  # of all that finished, the table of the comparison in it
    assert "less, loss, random, random_length:less, failing, base compared" in page
    for name in ("less", "loss", "random", "random_length-less"):
        assert f"<bdi>{name}/seed-42</bdi>" in page


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_interrupted_it_goes_on(workspace: Any) -> None:
    path = write(workspace)
    command = [sys.executable, "-m", "dataflex.cli", "compare", str(path), "--methods", "random,base", "--seeds", "1"]
    table = workspace.folder / "table.jsonl"
    command += ["--table", str(table)]
    status = workspace.folder / "out" / "run" / "compare" / "random" / "seed-42" / "status.json"
    child = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not status.is_file() and time.monotonic() < until:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=150)
    assert child.returncode == 75, said
    assert "Traceback" not in said
    left = json.loads(status.read_text())
    assert left["state"] != "running"  # it was ended too, and could say so
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "2 runs, 0 of them finished before" in ran.stderr
    assert "| random" in ran.stdout
    walls = {line["arm"]: line["wall_seconds"] for line in map(json.loads, table.read_text().splitlines())}
    assert walls["random"] is None  # of what the first launch took, the second knows nothing
    assert walls["base"] > 0
