"""Every run file under examples/selectors trains on a tiny pool, and resumes inside a round to the same rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dataflex.components.registry import SELECTORS
from dataflex.config import load
from dataflex.errors import ConfigError
from tests.example import assert_there
from tests.workspace import assert_equal_weights, cut_back

FILES = sorted((Path(__file__).parents[1] / "examples" / "selectors").glob("*.yaml"))


@pytest.fixture(scope="module")
def shared(tiny: Any, workspace_class: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One workspace for all: what one method's run has computed, the next one's reuses."""
    return workspace_class(tmp_path_factory.mktemp("examples"), tiny)


def small(path: Path, workspace: Any, output: str) -> Path:
    """Return the run file with the tiny model and pool, and fewer steps."""
    written: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    section = {**written["dataflex"], "store": str(workspace.folder / "store")}
    params = json.loads(
        json.dumps(section.get("params", {})).replace("2048", "128").replace('"max_K": 100', '"max_K": 6')
    )
    if "reward" in params:  # an untrained model gets no sum right
        rewards = workspace.folder / "rewards.py"
        rewards.write_text("def brevity(prompts, responses, references): return [-len(r) for r in responses]\n")
        params["reward"] = {"type": "function", "function": f"{rewards}:brevity"}
    keys = {
        "model_name_or_path": str(workspace.tiny.model),
        "dataset_dir": str(workspace.tiny.dataset_dir),
        "output_dir": str(workspace.folder / "out" / output),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_step": min(written["warmup_step"], 1),
        "update_step": 2,
        "update_times": 2,
        "save_steps": 1,
        "cutoff_len": 128,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "dataflex": {**section, **({"params": params} if params else {})},
    }
    if "eval_dataset" in written:
        keys["eval_dataset"] = ",".join(workspace.tiny.targets[:2])
    file: Path = workspace.folder / f"{output}.yaml"
    file.write_text(OmegaConf.to_yaml(written | keys), "utf-8")
    return file


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_trains_and_resumes_inside_a_round_to_the_same_rows(path: Path, shared: Any) -> None:
    whole = shared.run("train", small(path, shared, path.stem))
    assert_there(path, shared.folder / "out" / path.stem)
    rounds = shared.rounds(path.stem)
    updates = [rows for rows in rounds if len(rows) == 8]
    assert len(updates) == 2
    assert all(0 <= row < 62 for rows in rounds for row in rows)
    out = shared.folder / "out"
    copy = shutil.copytree(out / path.stem, out / f"{path.stem}-again")
    cut_back(copy, whole["steps"] - 3, rounds=0)  # inside the first update's round
    again = shared.run("train", small(path, shared, f"{path.stem}-again"))
    assert shared.rounds(f"{path.stem}-again") == rounds
    assert again["computed"] == 0
    assert_equal_weights(shared.weights(f"{path.stem}-again"), shared.weights(path.stem))


def test_every_method_has_a_run_file() -> None:
    named = {str(OmegaConf.to_container(OmegaConf.load(path))["component_name"]) for path in FILES}  # type: ignore[call-overload, index]
    quickstart = {"static", "random"}  # examples/quickstart has theirs
    built_in = {name for name, place in SELECTORS.places().items() if place.startswith("dataflex.")}
    assert named | quickstart == built_in


STALE = {
    "loss": {"mode": "topk_low"},
    "delta_loss": {},
    "less": {"proj_dim": 128, "aggregation": "round_robin"},
    "composed": {"representation": {"kind": "embedding", "model": "live"}, "within": "max"},
}


@pytest.mark.parametrize("policy", ["rotating", "static"])
@pytest.mark.parametrize("method", STALE)
def test_methods_of_the_live_model_choose_from_older_values(method: str, policy: str, shared: Any) -> None:
    refresh = {"policy": policy, **({"refresh_fraction": 0.3} if policy == "rotating" else {})}
    section = {"store": str(shared.folder / "stale"), "params": STALE[method], "refresh": refresh}
    run = shared.write(
        f"{method}-{policy}", component_name=method, dataflex=section, update_times=3, save_strategy="no"
    )
    summary = shared.run("train", run)
    later = summary["updates"][1:]
    targets = 0 if "loss" in method or policy == "static" else 8
    share = -(-62 * 3 // 10) if policy == "rotating" else 0
    assert all(update["computed"] <= share + targets for update in later)
    assert all(update["reused"] > 0 for update in later)


@pytest.mark.parametrize(
    ("method", "params", "policy"),
    [
        ("cluster_less", {}, "rotating"),
        ("influence_distillation", {}, "static"),
        ("near", {"representation": {"kind": "gradient"}}, "rotating"),
    ],
)
def test_methods_that_need_one_state_refuse_older_values(method: str, params: Any, policy: str, shared: Any) -> None:
    run = shared.write("refused", component_name=method, dataflex={"params": params, "refresh": {"policy": policy}})
    with pytest.raises(ConfigError, match=f"dataflex.refresh.policy: found '{policy}'; expected full"):
        load(run)
