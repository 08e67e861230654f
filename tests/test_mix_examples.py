"""Every run file under examples/mixers and examples/weighters trains on tiny data, and resumes to the same weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from dataflex.components.registry import MIXERS, WEIGHTERS
from tests.example import EXAMPLES, assert_there
from tests.workspace import assert_equal_weights, cut_back, lines

MIXED = sorted((EXAMPLES / "mixers").glob("*.yaml"))
WEIGHTED = sorted((EXAMPLES / "weighters").glob("*.yaml"))
REFERENCE, PROXY, TARGET = sorted((EXAMPLES / "mixers" / "doremi").glob("*.yaml"))
QUICK = ("odm", "loss")
BATCH = 4


@pytest.fixture(scope="module")
def shared(tiny: Any, workspace_class: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return workspace_class(tmp_path_factory.mktemp("mix_examples"), tiny)


@pytest.fixture(scope="module")
def experts(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the family that dynamic_moe.yaml names: two layers of four experts, two for every token."""
    from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM, set_seed

    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    shape: dict[str, Any] = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 32)
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "num_experts": 4}
    shape |= {"num_experts_per_tok": 2, "shared_expert_intermediate_size": 32, "vocab_size": len(tokenizer)}
    shape |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    set_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape))
    folder = tmp_path_factory.mktemp("experts")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(path: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[return-value]


def small(path: Path, workspace: Any, output: str, model: Path, **params: Any) -> Path:
    """Return the run file with a tiny model, the tiny data of the same names, and fewer steps."""
    keys = written(path)
    section = {**keys["dataflex"], "store": str(workspace.folder / "store")}
    if params:
        section["params"] = section["params"] | params
    keys |= {
        "model_name_or_path": str(model),
        "template": "qwen3_nothink",
        "dataset_dir": str(workspace.tiny.dataset_dir),
        "output_dir": str(workspace.folder / "out" / output),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 1,
        "cutoff_len": 128,
        "use_cpu": True,
        "bf16": False,
        "dataflex": section,
    }
    shorter = {"warmup_step": 2, "update_step": 2, "update_times": 3, "train_step": 6}
    if keys["component_name"] == "ado":  # a law is fitted to five points of ten steps
        shorter["train_step"], keys["save_steps"] = 54, 18
        section["params"] = section["params"] | {"ignore_steps": 0}
    keys |= {name: value for name, value in shorter.items() if name in keys}
    if keys["finetuning_type"] == "lora":
        keys |= {"lora_rank": 4, "lora_dropout": 0.1}
    file: Path = workspace.folder / f"{output}.yaml"
    file.write_text(OmegaConf.to_yaml(keys), "utf-8")
    return file


def assert_resumes(workspace: Any, again: Path, name: str) -> None:
    """A run that lost the checkpoints of its last third, and its end, ends with the same weights, to the bit."""
    out = workspace.folder / "out"
    saved = sorted(int(folder.name.partition("-")[2]) for folder in (out / name).glob("checkpoint-*"))
    cut_back(shutil.copytree(out / name, out / again.stem), saved[2 * len(saved) // 3 - 1])
    workspace.run("train", again)
    assert_equal_weights(workspace.weights(again.stem), workspace.weights(name))


def cases(paths: list[Path]) -> list[Any]:
    return [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else pytest.mark.slow) for p in paths]


@pytest.mark.parametrize("path", cases(MIXED))
def test_a_mixture_trains_and_resumes(path: Path, shared: Any, request: pytest.FixtureRequest) -> None:
    name = path.stem
    model = request.getfixturevalue("experts") if name == "dynamic_moe" else shared.tiny.model
    summary = shared.run("train", small(path, shared, name, model))
    assert_there(path, shared.folder / "out" / name)
    steps = summary["steps"]
    assert steps == (54 if name == "ado" else 6)
    told, domains = lines(shared, name), written(path)["dataset"].split(",")
    assert sum(summary["realised_rows"].values()) == BATCH * steps
    for line in told:
        assert list(line["proportions"]) == domains
        assert sum(line["proportions"].values()) == pytest.approx(1, abs=1e-12)
    shares = np.array([list(line["proportions"].values()) for line in told])
    if name in ("random", "odm", "odm_weighted", "dynamic_moe"):  # what moves, moves at every update
        assert len(np.unique(shares, axis=0)) >= 3
    elif name == "ado":
        assert all(told[-1]["laws"].values())
        assert (shares[:50] == shares[0]).all()
        assert len(np.unique(shares[50:], axis=0)) == 4
    else:
        rows = np.array(list(summary["realised_rows"].values()))
        assert len(shares) == 1
        assert told[0]["unit"] == "tokens" or np.abs(rows - shares[0] * BATCH * steps).max() <= 1
    assert_resumes(shared, small(path, shared, f"{name}-again", model), name)
    after = lines(shared, f"{name}-again")
    at = next(i for i, line in enumerate(after) if "resumed" in line)
    assert after[at + 1 :] == [line for line in told if line["step"] >= after[at]["resumed"]]


@pytest.mark.parametrize("path", cases(WEIGHTED))
def test_a_weighting_trains_and_resumes(path: Path, shared: Any) -> None:
    name = path.stem
    assert shared.run("train", small(path, shared, name, shared.tiny.model))["steps"] == 6
    assert_there(path, shared.folder / "out" / name)
    assert_resumes(shared, small(path, shared, f"{name}-again", shared.tiny.model), name)


@pytest.mark.slow
def test_the_three_steps_of_doremi(shared: Any) -> None:
    """As docs/mixing.md has them: the reference's token losses are computed once, before the proxy asks for them."""
    out = shared.folder / "out"
    shared.run("train", small(REFERENCE, shared, "reference", shared.tiny.model))
    own = {"reference_model_path": str(out / "reference")}
    proxy = small(PROXY, shared, "proxy", shared.tiny.model, **own)
    assert shared.run("featurize", proxy)["computed"] > 0
    assert shared.run("train", proxy)["computed"] == 0
    assert_resumes(shared, small(PROXY, shared, "proxy-again", shared.tiny.model, **own), "proxy")
    found = json.loads((out / "proxy" / "mixture_proportions.json").read_text("utf-8"))
    assert found == json.loads((out / "proxy-again" / "mixture_proportions.json").read_text("utf-8"))
    alphas = [list(line["alpha"].values()) for line in lines(shared, "proxy") if line["step"]]
    assert len(alphas) == 6
    assert np.ptp(alphas[-1]) > 0
    assert list(found["proportions"].values()) == pytest.approx(np.mean(alphas, axis=0).tolist(), abs=1e-12)
    file = str(out / "proxy" / "mixture_proportions.json")
    shared.run("train", small(TARGET, shared, "target", shared.tiny.model, proportions=file))
    assert lines(shared, "target")[0]["proportions"] == pytest.approx(found["proportions"], abs=1e-12)
    for path, name in ((REFERENCE, "reference"), (PROXY, "proxy"), (TARGET, "target")):
        assert_there(path, out / name)


OWN = (("mixing", "fading"), ("mixing", "by_loss"), ("weighting", "harder"), ("weighting", "below"))


@pytest.mark.slow
@pytest.mark.parametrize(("page", "name"), OWN)
def test_the_components_in_the_docs_run(page: str, name: str, shared: Any) -> None:
    text = (EXAMPLES.parent / "docs" / f"{page}.md").read_text("utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f'("{name}")' in block)
    plugin = shared.folder / f"{name}.py"
    plugin.write_text(code)
    run = small(MIXED[0] if page == "mixing" else WEIGHTED[0], shared, name, shared.tiny.model)
    keys = written(run) | {"component_name": name, "train_step": 6, "update_step": 2, "update_times": -1}
    keys["dataflex"] = {"store": keys["dataflex"]["store"], "plugins": [str(plugin)]}
    run.write_text(OmegaConf.to_yaml(keys), "utf-8")
    assert shared.run("train", run)["steps"] == 6
    if page == "mixing":
        shares = [tuple(line["proportions"].values()) for line in lines(shared, name)]
        assert len(shares) == len(set(shares)) == 3


def test_every_method_has_a_run_file() -> None:
    for registry, files in ((MIXERS, [*MIXED, PROXY]), (WEIGHTERS, WEIGHTED)):
        built_in = {name for name, place in registry.places().items() if place.startswith("dataflex.")}
        assert {str(written(path)["component_name"]) for path in files} == built_in
