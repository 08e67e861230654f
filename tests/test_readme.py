"""What the README says can be done: its links and commands exist, its run file and its selector run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import OmegaConf

from dataflex.cli import app
from dataflex.config import load
from dataflex.pipelines.select import select
from dataflex.stores.root import open_store

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found
    return found[1]


def test_it_is_short_and_its_links_and_commands_exist() -> None:
    assert len(TEXT.splitlines()) <= 140
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", TEXT, re.MULTILINE)) <= set(targets)
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    verbs |= {str(group.name) for group in app.registered_groups}
    assert set(re.findall(r"^dataflex (\w+)", TEXT, re.MULTILINE)) <= verbs
    links = [link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXT)]
    for name, _, part in links:
        assert (ROOT / name).exists()
        headings = re.findall(r"^#+ (.+)", (ROOT / name).read_text("utf-8") if part else "", re.MULTILINE)
        assert not part or part in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings]
    tree = re.findall(r"^ *([a-z_]+(?:/[a-z_]+)*/|[a-z_]+\.py) ", TEXT.split("## Where things are")[1], re.MULTILINE)
    assert len(tree) > 10
    assert all((ROOT / name).exists() or (ROOT / "dataflex" / name).exists() for name in tree)


def test_its_run_file_and_its_selector_run(workspace: Any) -> None:
    written = OmegaConf.to_container(OmegaConf.create(block("yaml")))
    assert isinstance(written, dict)
    local = {
        "model_name_or_path": str(workspace.tiny.model),
        "template": "qwen3_nothink",
        "dataset": workspace.tiny.pool,
        "dataset_dir": str(workspace.tiny.dataset_dir),
        "eval_dataset": workspace.tiny.targets[0],
        "output_dir": str(workspace.folder / "out" / "readme"),
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    assert set(local) & set(written) == set(local) - {"dataset_dir", "use_cpu", "report_to", "save_strategy"}
    path = workspace.folder / "readme.yaml"
    path.write_text(OmegaConf.to_yaml(written | local))
    assert load(path).schedule.describe().startswith("100 optimizer steps")
    (workspace.folder / "my_selector.py").write_text(block("python"))
    section = {
        "plugins": [f"{workspace.folder}/my_selector.py"],
        "store": str(workspace.folder / "store"),
        "params": {"most": 100.0},
    }
    mine = {"component_name": "surprising", "dataflex": section}
    path.write_text(OmegaConf.to_yaml(written | local | mine))
    short = ("warmup_step=1", "update_step=2", "update_times=1")
    workspace.run("train", path, *short)
    select(load(path, short), 5, workspace.folder / "chosen.json")
    (folder,) = (workspace.folder / "store").glob("loss-*")
    store = open_store(folder)
    chosen = pq.read_table(workspace.folder / "chosen.parquet")["row_key"].to_pylist()
    every = {k.tobytes(): loss / max(1, n) for b in store.scan() for k, loss, n in
             zip(b.keys, b.scalars["loss_sum"], b.scalars["tokens"], strict=True)}  # fmt: skip
    assert min(every[key] for key in chosen) >= sorted(every.values())[-5]
