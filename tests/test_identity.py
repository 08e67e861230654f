"""What is loaded, decoded and computed with is in the name of what comes out of it, wherever it is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataflex.access.policy_source import _decoding  # what it is part of needs a run with a model
from dataflex.access.sources import EncoderSource
from dataflex.features.spec import EmbeddingSpec, RewardSpec
from dataflex.fingerprint import model_digest
from dataflex.folders import folder_digest
from dataflex.live.state import ModelState
from dataflex.stores.root import StoreRoot


def keep(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def sharded(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Copy a model in two files that both hold every tensor; which is taken from which, the index says."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "parts").mkdir()
    keep(tensors, folder / "first.safetensors")
    save_file(
        {name: t * 2 for name, t in tensors.items()}, folder / "parts" / "b.safetensors", metadata={"format": "pt"}
    )
    return tensors


def indexed(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_weights_count_as_they_are_loaded(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tensors = sharded(tiny.model, folder)
    names = dict.fromkeys(tensors, "first.safetensors")
    digests, sums = [], []
    moved = next(iter(tensors))
    for index in (names, names | {moved: "parts/b.safetensors"}):
        indexed(folder, index)
        digests.append(model_digest(folder))
        sums.append(float(AutoModelForCausalLM.from_pretrained(folder).state_dict()[moved].sum()))
    assert sums[0] != sums[1]
    save_file(
        {name: t * 3 for name, t in tensors.items()}, folder / "parts" / "b.safetensors", metadata={"format": "pt"}
    )
    digests.append(model_digest(folder))
    assert len(set(digests)) == 3
    save_file({"v": torch.zeros(3)}, folder / "value_head.safetensors")
    assert model_digest(folder) == digests[-1]  # not the model's


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickled_weights_count_beside_a_file_that_is_not_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"v": torch.zeros(3)}, tmp_path / "value_head.safetensors")
    found = set()
    for content in (b"1", b"2"):
        (tmp_path / name).write_bytes(content)
        found.add(model_digest(tmp_path))
    assert len(found) == 2
    save_file({"v": torch.ones(3)}, tmp_path / name.replace("pytorch_", "").replace(".bin", ".safetensors"))
    preferred = model_digest(tmp_path)
    (tmp_path / name).write_bytes(b"3")
    assert model_digest(tmp_path) == preferred  # safetensors are loaded then


def test_an_adapter_as_encoder_is_named_with_its_base(tiny: Any, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny.model, base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(adapter))
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)

    def source() -> EncoderSource:
        state: Any = SimpleNamespace(trainer=SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu"))))
        state.encoders, state.encoder = {}, MethodType(ModelState.encoder, state)  # of a run of its own
        return EncoderSource(str(adapter), state, 64)

    recipes = [source().recipe(EmbeddingSpec())]
    weights = load_file(base / "model.safetensors")
    keep({name: t * 2 for name, t in weights.items()}, base / "model.safetensors")
    recipes.append(source().recipe(EmbeddingSpec()))
    assert recipes[0] != recipes[1]
    before = folder_digest(adapter)
    (adapter / "README.md").write_text("more")
    assert folder_digest(adapter) == before


def test_what_decodes_a_response_is_in_its_name(tiny: Any, tmp_path: Path) -> None:
    """A reward is of the text, and other tokenizers make other texts of the same tokens."""
    folder = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(folder)
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text("utf-8"))
    added = [{**token, "special": not token["special"]} for token in whole["added_tokens"]]
    found = []
    for changed in ({}, {}, {"decoder": {"type": "ByteFallback"}}, {"added_tokens": added}):
        file.write_text(json.dumps(whole | changed), "utf-8")
        found.append(_decoding(AutoTokenizer.from_pretrained(folder)))
    assert found[0] == found[1]
    assert found[2] != found[0]
    assert found[3] not in (found[0], found[2])


def test_a_precision_that_a_launcher_sets_is_in_the_name(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"store": str(workspace.folder / "store"), "params": {"model": "base", "mode": "topk_high"}}
    keys = {"component_name": "loss", "eval_dataset": None, "warmup_step": 0, "update_times": 1, "dataflex": section}
    counts = []
    for precision in ("no", "bf16", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        AcceleratorState._reset_state(True)
        counts.append(workspace.run("featurize", workspace.write("run", **keys))["computed"])
    AcceleratorState._reset_state(True)
    assert counts[0] == counts[1] > 0
    assert counts[2] == 0


OWN = """
from transformers import Qwen2ForCausalLM

class Own(Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * {factor}
        return output
"""


def test_losses_by_a_models_own_code_are_computed_anew_when_it_changes(
    workspace: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(tiny.model, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}))
    section = {"store": str(workspace.folder / "store"), "params": {"model": "base", "mode": "topk_high"}}
    keys = {"component_name": "loss", "eval_dataset": None, "warmup_step": 0, "update_times": 1, "dataflex": section}
    more = {"model_name_or_path": str(folder), "trust_remote_code": True}
    found = []
    for factor in (1, 1, 3):
        (folder / "modeling.py").write_text(OWN.format(factor=factor))
        computed = workspace.run("featurize", workspace.write("run", **keys, **more))["computed"]
        stores = {store.folder: store for store in StoreRoot(workspace.folder / "store").stores()}
        losses = {
            name: sum(block.scalars["loss_sum"].sum() for block in store.scan()) for name, store in stores.items()
        }
        found.append((computed > 0, losses))
    assert [computed for computed, _ in found] == [True, False, True]
    assert found[0][1] == found[1][1]
    ((name, first),) = found[0][1].items()
    (other,) = (total for each, total in found[2][1].items() if each != name)
    assert other != pytest.approx(first, rel=1e-3)  # by the changed code, and not the old one's under another name


@pytest.mark.parametrize("value", [float("nan"), [1.0, float("inf")], {"deep": [{"er": float("-inf")}]}])
def test_what_a_users_code_is_given_is_finite(value: Any) -> None:
    with pytest.raises(ValidationError, match="expected finite numbers"):
        RewardSpec.model_validate({"type": "function", "function": "r.py:f", "arguments": {"a": value}})
    assert RewardSpec.model_validate({"type": "function", "function": "r.py:f", "arguments": {"a": 1.5}})
