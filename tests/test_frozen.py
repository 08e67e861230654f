"""A checkpoint's trained weights are put over the frozen weights that they were trained with, and over no others."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dataflex.errors import MismatchError
from dataflex.live import frozen
from dataflex.live import weights as checkpoint

FROZEN = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(tiny: Any) -> Any:
    """Return the tiny model with all but its last layer frozen, and a buffer."""
    found: Any = AutoModelForCausalLM.from_pretrained(tiny.model)
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(".layers.1." in name)
    found.model.register_buffer("scale", torch.tensor([1.0, 2.0]))
    return found


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    """Return a checkpoint whose trainable weights have moved."""
    model.save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights[name] += 1
    save_file(weights, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    return tmp_path / "saved"


def change(file: Path, name: str, value: Any) -> None:
    """Write another tensor, or none, under a name."""
    weights = load_file(file)
    weights[name] = value(weights.get(name))
    save_file({key: tensor for key, tensor in weights.items() if tensor is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_broken_adapter_config_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(MismatchError, match=r"adapter_config\.json: cannot be read"):
        checkpoint.adapter_config(tmp_path)


def test_trained_weights_are_put_in_and_taken_out(model: Any, saved: Path) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert frozen.covers(saved, model)  # the tied output layer, which the file has not, is no other weight
    with checkpoint.loaded(saved, model, {}):
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name] + 1 if p.requires_grad else before[name])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", [FROZEN, "model.embed_tokens.weight", "model.norm.weight", "model.scale"])
def test_a_frozen_weight_that_differs_is_named(model: Any, saved: Path, name: str) -> None:
    change(saved / "model.safetensors", name, lambda w: torch.nextafter(w, w + 1))
    with pytest.raises(MismatchError, match=rf"its {name}, which this run does not train, differs"):
        frozen.covers(saved, model)
    if name == "model.scale":
        assert frozen.covers(saved, model, buffers=False)


def test_of_several_shards_those_of_the_index_count(model: Any, saved: Path) -> None:
    shutil.rmtree(saved)
    model.save_pretrained(saved, max_shard_size="100KB")
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    shutil.copy(saved / index["weight_map"][FROZEN], saved / "model-00001-of-00009.safetensors")  # of an older save
    change(saved / "model-00001-of-00009.safetensors", FROZEN, lambda w: w + 1)
    assert frozen.covers(saved, model)
    change(saved / index["weight_map"][FROZEN], FROZEN, lambda w: w + 1)
    with pytest.raises(MismatchError, match=f"its {FROZEN}"):
        frozen.covers(saved, model)
    wrong: list[Any] = [{FROZEN: "../other.safetensors"}, {FROZEN: 3}, [], None]
    for names in wrong:
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(MismatchError, match=r"index\.json"):
            frozen.covers(saved, model)


@pytest.mark.parametrize(("stored", "live"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
def test_types_may_differ_and_numbers_may_not(model: Any, saved: Path, stored: str, live: str) -> None:
    change(saved / "model.safetensors", "model.scale", lambda w: w)
    weights = load_file(saved / "model.safetensors")
    save_file({k: w.to(getattr(torch, stored)) for k, w in weights.items()}, saved / "model.safetensors")
    model.to(getattr(torch, live))
    assert frozen.covers(saved, model)
    change(saved / "model.safetensors", FROZEN, lambda w: w * 1.01)
    with pytest.raises(MismatchError, match=f"its {FROZEN}"):
        frozen.covers(saved, model)


def test_names_and_shapes_are_those_of_the_model(model: Any, saved: Path) -> None:
    file = saved / "model.safetensors"
    kept = file.read_bytes()
    for name, value, said in (
        (FROZEN, lambda w: None, f"1 missing .first: .'{FROZEN}'"),
        (FROZEN, lambda w: w[:3], f"1 of another shape .first: .'{FROZEN}'"),
        ("model.layers.2.mlp.up_proj.weight", lambda w: torch.zeros(3), "1 unknown .first: .'model.layers.2"),
        ("model.layers.1.mlp.up_proj.weight", lambda w: None, "1 missing .first: .'model.layers.1"),
    ):
        change(file, name, value)
        with pytest.raises(MismatchError, match=said):
            checkpoint.check(saved, model, {})
        file.write_bytes(kept)
    change(file, "model.layers.0.self_attn.rotary_emb.inv_freq", lambda w: torch.zeros(3))
    checkpoint.check(saved, model, {})


def adapted(tiny: Any, **keys: Any) -> Any:
    """Return the tiny model under LoRA, its adapter's weights set to ones."""
    from peft import LoraConfig, get_peft_model

    made: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny.model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **keys)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.fill_(1)
    return made


def test_whole_modules_beside_lora_are_part_of_a_checkpoint(tiny: Any, tmp_path: Path) -> None:
    made = adapted(tiny, modules_to_save=["lm_head"])
    made.save_pretrained(tmp_path)
    scaling = {"r": 2, "lora_alpha": 8}
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.zero_()
    assert not frozen.covers(tmp_path, made)
    with checkpoint.loaded(tmp_path, made, scaling):
        assert all(bool((p == 1).all()) for p in trained.values())
    assert not any(p.any() for p in trained.values())


def test_embeddings_in_an_adapters_file_are_compared(tiny: Any, tmp_path: Path) -> None:
    made = adapted(tiny)
    made.save_pretrained(tmp_path, save_embedding_layers=True)
    checkpoint.check(tmp_path, made, {"r": 2, "lora_alpha": 8})
    assert not frozen.covers(tmp_path, made)
    change(tmp_path / "adapter_model.safetensors", "base_model.model.model.embed_tokens.weight", lambda w: w + 1)
    with pytest.raises(MismatchError, match=r"its base_model.model.model.embed_tokens.weight"):
        frozen.covers(tmp_path, made)


def test_an_adapters_base_is_compared_by_content(tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from dataflex.fingerprint import model_digest

    other, copy = (shutil.copytree(tiny.model, tmp_path / name) for name in ("other", "copy"))
    change(other / "model.safetensors", FROZEN, lambda w: w + 1)
    adapted(tiny).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    kept = json.loads(config.read_text())
    base = {"weights": model_digest(tiny.model), "merged": [], "drawn": {}}
    args = SimpleNamespace(model_name_or_path=str(tiny.model), cache_dir=None)
    for named in (str(tiny.model), str(copy)):
        config.write_text(json.dumps({**kept, "base_model_name_or_path": named}))
        frozen.require_base(tmp_path, base, args)
    config.write_text(json.dumps({**kept, "base_model_name_or_path": str(other)}))
    with pytest.raises(MismatchError, match=r"was trained on another base than this run's \(weights: \w{8} → \w{8}\)"):
        frozen.require_base(tmp_path, base, args)
    assert not [record for record in caplog.records if record.name.startswith("dataflex")]
    config.write_text(json.dumps({**kept, "base_model_name_or_path": str(tmp_path / "gone")}))
    with caplog.at_level(logging.WARNING):
        frozen.require_base(tmp_path, base, args)
    assert "is not known here" in caplog.text


@pytest.mark.parametrize("kind", ["freeze", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_over_another_base_is_refused_before_it_trains(workspace: Any, kind: str) -> None:
    keys = {"finetuning_type": kind, "freeze_trainable_layers": 1, "warmup_step": 0, "update_step": 1}
    keys |= {"lora_target": "all" if kind == "lora" else None}
    section = {"store": str(workspace.folder / "store")}
    path = workspace.write("run", component_name="random", update_times=1, dataflex=section, **keys)
    workspace.run("train", path)
    made = workspace.folder / "out" / "run" / "checkpoint-1"
    base = json.loads((made / "dataflex" / "complete.json").read_text())["base"]
    assert len(base["weights"]) == 32
    other = shutil.copytree(workspace.tiny.model, workspace.folder / "other")
    change(other / "model.safetensors", FROZEN, lambda w: w * 2)
    said = f"its {FROZEN}, which this run does not train" if kind == "freeze" else "trained on another base than"
    with pytest.raises(MismatchError, match=said):
        workspace.run("train", path, f"model_name_or_path={other}", "update_times=2")
    less = {"proj_dim": 64, "checkpoints": [str(made)], "gradient_type": "sgd"}
    offline = workspace.write(
        "offline", component_name="less", update_times=2, dataflex={**section, "params": less}, **keys
    )
    with pytest.raises(MismatchError, match=said):
        workspace.run("featurize", offline, f"model_name_or_path={other}")
    assert workspace.run("featurize", offline)["computed"] > 0
