"""What the README says can be done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dataflex.cli import app
from dataflex.config import load

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found
    return found[1]


def test_it_is_short_and_its_links_and_commands_exist() -> None:
    assert len(TEXT.splitlines()) <= 120
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
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= {name for name, _, _ in links}
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
    mine = {"component_name": "longest", "dataflex": {"plugins": [f"{workspace.folder}/my_selector.py"]}}
    path.write_text(OmegaConf.to_yaml(written | local | mine))
    workspace.run("train", path, "warmup_step=1", "update_step=2", "update_times=1", "disable_shuffling=true")
    pool = json.loads((Path(workspace.tiny.dataset_dir) / "pool.json").read_text())
    chosen = workspace.rounds("readme")[1]
    lengths = [len(str(row["instruction"]) + str(row["input"]) + str(row["output"])) for row in pool]
    assert min(lengths[i] for i in chosen) > sum(lengths) / len(lengths)
