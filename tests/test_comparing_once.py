"""Rows chosen once, and a fresh model trained on them: how it is laid out, what it depends on, one real run."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dataflex.config import load
from dataflex.errors import ConfigError
from dataflex.pipelines.compare import compare
from dataflex.pipelines.comparing.arms import arms_of
from dataflex.pipelines.comparing.once import Once
from dataflex.pipelines.comparing.outlook import Outlook
from dataflex.pipelines.comparing.plans import plans_of, tasks_of
from dataflex.pipelines.comparing.running import Task, alone, run_all, shares
from dataflex.pipelines.comparing.trials import trials_of
from dataflex.pipelines.select import select


def write(workspace: Any, name: str = "run", **more: Any) -> Path:
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "test_dataset": "target_words"}
    section |= more.pop("dataflex", {})
    keys: dict[str, Any] = {"save_strategy": "no", "update_step": 0, "train_step": 7, "lora_dropout": 0.0, **more}
    return Path(workspace.write(name, dataflex=section, **keys))


def laid_out(path: Path, methods: str, rows: int = 10, seeds: int = 1) -> list[Any]:
    base = load(path, [])
    return trials_of(path, [], arms_of(methods.split(","), base), seeds, (), 1, base, Once.of(rows, base, 1))


def test_what_chooses_rows_does_so_once_and_all_are_trained_as_long(workspace: Any) -> None:
    path = write(workspace, dataflex={"arms": {"later": {"warmup_step": 5, "dataflex.params.proj_dim": 128}}})
    found = {t.arm.name: t for t in laid_out(path, "less,later,random,random_length:less,full,base,odm,adapt")}
    assert [name for name, trial in found.items() if trial.choice] == ["less", "later", "random", "random_length:less"]
    trained = {name: t.settings for name, t in found.items() if t.verb == "train"}
    assert {name: s.keys.train_step for name, s in trained.items()} == dict.fromkeys(trained, 7)
    later = found["later"]
    assert (later.choice.verb, later.choice.num, later.choice.settings.params.proj_dim) == ("select", 10, 128)
    assert later.choice.settings.schedule.warmup_step == 5
    # Ten rows are two and a half steps of four: about a pass is decided at once, and nothing is a warm-up.
    rounds = later.settings.schedule.rounds(62, 4)
    assert [(r.kind, r.steps) for r in rounds] == [("update", 3), ("update", 3), ("update", 1)]
    command = later.choice.command(path, [], {})
    assert command[3] == "select"
    assert command[-4:] == ["--num", "10", "--output", str(later.choice.folder / "chosen.json")]
    command = later.command(path, [], {})
    assert 'component_name="static"' in command
    assert f'dataflex.params={{"path": "{later.choice.folder / "chosen.parquet"}"}}' in command
    assert not any("proj_dim" in each for each in command)


def test_a_training_is_known_by_the_choice_that_it_is_of(workspace: Any) -> None:
    def named(rows: int = 10, **more: Any) -> dict[str, Any]:
        (trial,) = laid_out(write(workspace, **more), "less", rows)
        return dict(trial.identity(None, 1))

    before = named()
    assert named() == before
    assert named(output_dir=str(workspace.folder / "elsewhere")) == before
    assert named(rows=11)["choice"]["rows chosen"] == 11
    for more in ({"warmup_step": 4}, {"dataflex": {"params": {"proj_dim": 128}}}):
        changed = named(**more)
        assert changed["choice"] != before["choice"]
        assert {k: v for k, v in changed.items() if k != "choice"} == {k: v for k, v in before.items() if k != "choice"}


def test_what_has_no_steps_or_no_method_is_not_trained_on_a_choice(workspace: Any) -> None:
    with pytest.raises(ConfigError, match=r"--once: every model is trained for as many steps .* set train_step"):
        laid_out(write(workspace, train_step=None), "less")
    static: dict[str, Any] = {
        "train_type": "static",
        "component_name": None,
        "dataflex": {"test_dataset": [], "params": {}},
    }
    with pytest.raises(ConfigError, match="--once: found train_type: static"):
        laid_out(write(workspace, **static), "base")


def test_how_features_come_about_belongs_to_the_choice(workspace: Any) -> None:
    ways = {
        "prefilter": {"method": "rds_plus", "keep": 0.5},
        "refresh": {"policy": "rotating", "refresh_fraction": 0.2},
    }
    path = write(workspace, dataflex={**ways, "arms": {"narrow": {"dataflex.prefilter.keep": 0.3}}})
    less, narrow = laid_out(path, "less,narrow")
    assert less.choice.settings.dataflex.prefilter.keep == 0.5
    assert narrow.choice.settings.dataflex.prefilter.keep == 0.3
    assert less.choice.settings.dataflex.refresh.policy == "rotating"
    for trial in (less, narrow):
        assert trial.settings.dataflex.prefilter is None
        assert trial.settings.dataflex.refresh.policy == "full"


def test_a_run_waits_for_its_choice_and_that_for_the_lengths_of_another(workspace: Any) -> None:
    path = write(workspace)
    trials = laid_out(path, "random_length:less,less")
    plans = plans_of(trials, path, [], 1, False)
    nothing = {part.trial.name: False for plan in plans.values() for part in plan.parts}
    tasks = {task.name: task for task in tasks_of(list(plans.values()), plans, nothing, path, [], lambda plan, s: None)}
    less, mirror = (f"{arm} for target_arithmetic seed 42" for arm in ("less", "random_length:less"))
    assert {name: list(task.needs) for name, task in tasks.items()} == {
        f"choice of {less}": [],
        f"choice of {mirror}": [f"choice of {less}"],
        mirror: [f"choice of {mirror}"],
        less: [f"choice of {less}"],
    }
    lengths = trials[0].choice.folder.with_name("seed-42-choice-lengths.parquet")
    assert f'dataflex.params={{"lengths": "{lengths}"}}' in tasks[f"choice of {mirror}"].command
    # Where the result of one is known, its choice is made all the same for the other's sake; what is there is not.
    only = tasks_of([plans[mirror]], plans, nothing, path, [], lambda plan, s: None)
    assert [task.name for task in only] == [f"choice of {less}", f"choice of {mirror}", mirror]
    there = nothing | {f"choice of {less}": True, f"choice of {mirror}": True}
    assert [t.name for t in tasks_of([plans[mirror]], plans, there, path, [], lambda plan, s: None)] == [mirror]


def test_what_needs_something_that_failed_is_not_begun(tmp_path: Path) -> None:
    def task(name: str, code: str, *needs: str) -> Task:
        command = [sys.executable, "-c", code]
        return Task(name, command, tmp_path / f"{name}.log", tmp_path, "select", needs=needs, done=ended.append)

    ended: list[float] = []
    broken, good = "print('no rows'); raise SystemExit(6)", "open('made', 'w')"
    tasks = [task("training", f"import os; os.chdir({str(tmp_path)!r}); {good}", "choice"), task("choice", broken)]
    tasks += [task("other", "pass")]
    with alone(tmp_path / "compare") as held:
        outcome = run_all(tasks, [{}, {}], held)
    assert outcome.codes == {"choice": 6, "training": 6, "other": 0}
    assert outcome.reasons["training"].startswith("not begun, without the choice: no rows (exit code 6")
    assert not (tmp_path / "made").exists()
    assert len(ended) == 1


def test_runs_at_a_time_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert shares(3) == [{"MASTER_PORT": "", "OMP_NUM_THREADS": "5"}] * 3
    assert shares(1) == [{}]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # whoever says how many has them
    assert shares(3) == [{"MASTER_PORT": ""}] * 3


def test_how_long_it_takes_is_told_as_far_as_it_is_known(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dataflex")
    trials = laid_out(write(workspace), "less,random,base", seeds=2)
    outlook = Outlook(trials, [], 2)
    # Seven steps of each of four trainings, and three of warm-up before each choice of LESS; random needs none.
    assert str(outlook) == "to train: 4, 34 optimizer steps; how long that takes is told when the first has finished"
    outlook.finished(trials[0], 1800.0)
    assert "to train: 3, 24 optimizer steps, about 1.5 h one after another, 0.75 h with 2 at a time" in caplog.text
    assert "taken for as long as the others: 1" in caplog.text
    cost = {"seconds": 90.0, "choice_seconds": 270.0, "target_seed": None, "steps": 7}
    known = [{"arm": "random", "target": None, "seed": 42, **cost}] * 2  # one run, on two test sets
    assert "at least 0.2 h" in str(Outlook(trials[2:4], known, 1))  # starting and measuring is in none of these
    known = [{**known[0], "wall_seconds": 720.0}]
    assert "about 0.4 h one after another (by what has finished: 1)" in str(Outlook(trials[2:4], known, 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_is_trained_on_what_select_chooses(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dataflex")
    path, table = write(workspace), workspace.folder / "table.jsonl"
    out = workspace.folder / "out" / "run"
    (line,) = compare(path, [], ["less"], seeds=1, once=10, keep=table)
    folder = out / "compare" / "less"
    chosen = pq.read_table(folder / "seed-42-choice" / "chosen.parquet")
    assert chosen["index"].to_pylist() == select(load(path, []), 10, None).table["index"].to_pylist()
    rounds = [pq.read_table(each)["index"].to_pylist() for each in sorted((folder / "seed-42/rounds").glob("round-*"))]
    drawn = Counter(row for rows in rounds for row in rows)
    assert set(rounds[0]) == set(drawn) == set(chosen["index"].to_pylist())
    assert sorted(drawn.values()) == [2] * 2 + [3] * 8  # 28 rows: no row is in a pass before all were in the last
    (kept,) = [json.loads(text) for text in table.read_text().splitlines()]
    summary = json.loads((folder / "seed-42-choice" / "dataflex_select.json").read_text())
    assert (kept["choice_gradients"], kept["chosen"], kept["steps"]) == (summary["gradients"], 10, 7)
    assert kept["choice_gradients"] == 61 + 8  # two rows of the pool are the same
    assert kept["wall_seconds"] > kept["choice_seconds"] + kept["seconds"]
    assert line.choice_seconds == summary["seconds"]
    # Elsewhere: nothing of that run is there but the table, and the lengths of its choice are asked for.
    shutil.rmtree(out)
    moved = workspace.tiny.model.parent / "moved"
    if not moved.exists():
        shutil.copytree(workspace.tiny.model, moved, copy_function=shutil.copy)
    path = write(workspace, "there", model_name_or_path=str(moved))
    caplog.clear()
    again, mirror = compare(path, [], ["less", "random_length:less"], seeds=1, once=10, keep=table)
    assert again.loss == line.loss
    there = workspace.folder / "out" / "there" / "compare"
    assert not (there / "less" / "seed-42").exists()
    tokens = [
        sorted(pq.read_table(there / name / "seed-42-choice" / "chosen.parquet")["tokens"].to_pylist())
        for name in ("less", "random_length-less")
    ]
    assert sum(abs(a - b) for a, b in zip(*tokens, strict=True)) < 10 * 3
    assert mirror.steps == 7
    assert len(table.read_text().splitlines()) == 2
