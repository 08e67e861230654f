"""Run files under examples/ differ where they mean to, say what they are in three lines, and are all in the list."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import load
from tests.example import EXAMPLES, assert_there, given, head

FILES = {path.relative_to(EXAMPLES).as_posix(): path for path in sorted(EXAMPLES.rglob("*.yaml"))}
LIST = (EXAMPLES / "README.md").read_text("utf-8")
ROWS = re.findall(r"^\| \[(.+?)\]\((.+?)\) \| (.+) \| (.+?) \| (.+?) \|$", LIST, re.MULTILINE)

FREE = {"eval_dataset", "output_dir"}
TARGETS = ("target_arithmetic", "target_words", "target_dates")
REAL_TARGETS = ("target_gsm8k", "target_wikisql")
ALONE: dict[str, str | None] = {  # LLaMA-Factory trains on rows that were written before
    "dataset_dir": "saves/less_offline",
    "num_train_epochs": "4",
    "lr_scheduler_type": "linear",
    "overwrite_output_dir": "true",
}
OWN: dict[str, dict[str, str | None]] = {  # in place of plain.yaml's keys, or beside them; None: without the key
    "plain.yaml": {"max_steps": "40"},  # where a method acts, its schedule says how many
    "quickstart/": {"overwrite_output_dir": "true", "save_steps": None, "save_strategy": '"no"'},  # run again and again
    "real/": {
        "model_name_or_path": "examples/real/model",
        "template": "smollm2",
        "dataset_dir": "examples/real/data",
        "cutoff_len": "288",
        "disable_gradient_checkpointing": "true",
        "per_device_train_batch_size": "4",
        "learning_rate": "4.0e-4",
        "overwrite_output_dir": "true",
        "logging_steps": "5",
        "save_steps": None,
        "save_strategy": '"no"',
    },
    "less_offline/": {"save_steps": None},
    "less_offline/select.yaml": {"lr_scheduler_type": None, "logging_steps": None},  # it trains nothing
    "less_offline/warmup.yaml": ALONE | {"dataset": "warmup", "logging_steps": "1", "save_strategy": "epoch"},
    "less_offline/train.yaml": ALONE | {"dataset": "chosen", "save_strategy": '"no"'},
    "mixers/": {"dataset": "pool,target_arithmetic,target_words"},
    "mixers/doremi/": {"finetuning_type": "full", "lora_target": None, "lora_rank": None, "learning_rate": "1.0e-3"},
    "mixers/dynamic_moe.yaml": {
        "model_name_or_path": "Qwen/Qwen1.5-MoE-A2.7B",
        "template": "qwen",
        "lora_target": "q_proj,k_proj,v_proj,o_proj",
        "learning_rate": "1.0e-4",
        "use_cpu": None,
        "bf16": "true",
    },
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_its_own_is_as_in_plain(name: str) -> None:
    plain = given(EXAMPLES / "plain.yaml")
    expected: dict[str, str | None] = {key: value for key, value in plain.items() if key != "max_steps"}
    for start, own in OWN.items():
        expected |= own if name.startswith(start) else {}
    found = given(FILES[name])
    assert {k: v for k, v in found.items() if k not in FREE} == {
        k: v for k, v in expected.items() if k not in FREE and v is not None
    }
    assert [key for key in found if key in plain] == [key for key in plain if key in found]
    targets = REAL_TARGETS if name.startswith("real/") else TARGETS
    assert set(found.get("eval_dataset", targets[0]).split(",")) <= set(targets)
    place = {"quickstart": ".demo", "real": ".demo-real"}.get(name.partition("/")[0], "saves")
    assert found["output_dir"].startswith(f"{place}/")
    assert set(re.findall(r"^  store: (.+)$", FILES[name].read_text("utf-8"), re.MULTILINE)) <= {f"{place}/store"}


def test_no_two_write_to_one_folder() -> None:
    assert len({given(path)["output_dir"] for path in FILES.values()}) == len(FILES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has whatever a run file names, each file as empty as it may be."""
    folder = tmp_path_factory.mktemp("root")
    quickstart, real, offline = folder / "examples/quickstart", folder / "examples/real", folder / "saves"
    for made in (offline / "mixers/doremi/reference", offline / "mixers/doremi/proxy", folder / ".demo"):
        made.mkdir(parents=True)
    for model in (quickstart / "model", real / "model"):
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    for place, names in (
        (quickstart / "data", ("pool", *TARGETS)),
        (real / "data", ("pool", *REAL_TARGETS, *(name.replace("target", "test") for name in REAL_TARGETS))),
        (offline / "less_offline", ("warmup", "chosen")),
    ):
        place.mkdir(exist_ok=True)
        for name in names:
            (place / f"{name}.json").write_text('[{"instruction": "a", "output": "b"}]')
        (place / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"} for name in names}))
    for step in (10, 20, 30, 40):
        (offline / f"less_offline/checkpoints/checkpoint-{step}").mkdir(parents=True)
    shares = {"proportions": {"pool": 0.5, "target_arithmetic": 0.25, "target_words": 0.25}, "unit": "rows"}
    (offline / "mixers/doremi/proxy/mixture_proportions.json").write_text(json.dumps(shares))
    (folder / ".demo/chosen.parquet").touch()
    return folder


@pytest.mark.parametrize("name", FILES)
def test_it_is_valid_and_its_head_tells_what_is_stored(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    settings = load(FILES[name])
    says, cost, look = head(FILES[name])
    assert says.endswith(".")
    assert cost.startswith("Cost: ")
    assert look.startswith("Look at ")
    assert ("nothing stored" in cost) != bool(settings.needs)
    states = {need.state for need in settings.needs}
    assert ("at every update" in cost) == (None in states)
    assert ("once" in cost.partition("nothing stored")[0]) == bool(states - {None})
    for number in re.findall(r"proj_dim: (\d+)", FILES[name].read_text("utf-8")):
        assert f" {number} numbers a row" in cost
    (verbs,) = (verbs for link, _, _, verbs, _ in ROWS if link == name)
    assert ("featurize" in verbs) == bool(settings.needs)


def test_the_list_has_every_file_once_as_it_says_of_itself() -> None:
    assert sorted(name for name, *_ in ROWS) == sorted(FILES)
    for name, link, says, _, data in ROWS:
        keys = given(FILES[name])
        assert link == name
        assert says == head(FILES[name])[0]
        assert data.replace("`", "").replace(", ", ",").split("; ") == [
            keys[key] for key in ("dataset", "eval_dataset") if key in keys
        ]
    for link in re.findall(r"\]\(([^)]+)\)", LIST):
        assert (EXAMPLES / link).exists()
    for name in re.findall(r"examples/[\w/]+\.\w+", LIST):
        assert (EXAMPLES.parent / name).is_file()


def test_plain_trains(workspace: Any) -> None:
    path, output = EXAMPLES / "plain.yaml", workspace.folder / "out"
    small = {"model_name_or_path": workspace.tiny.model, "dataset_dir": workspace.tiny.dataset_dir, "max_steps": 2}
    assert small.keys() <= given(path).keys()
    workspace.run("train", path, *(f"{key}={value}" for key, value in small.items()), f"output_dir={output}")
    assert_there(path, output)
