"""`dynamic_moe` on a stock mixture of experts counts loads as a loop does, and leaves routers alone if told to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.errors import ConfigError, DataflexError
from dataflex.mixers.dynamic_moe import deltas
from dataflex.pipelines.mixing.signals import ExpertLoads
from dataflex.trainers.trainer import DataflexTrainer, _auxiliary_weight
from tests.processes import TWO, dataflex
from tests.workspace import in_force, logged

DOMAINS = ("target_words", "target_records", "target_arithmetic")


def shape(tokenizer: Any) -> dict[str, Any]:
    """Return what configures a tiny mixture of experts."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "num_experts_per_tok": 2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(scope="module")
def models(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Qwen2-MoE and a Mixtral of 4 experts, with the tiny tokenizer."""
    from transformers import (
        AutoTokenizer,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
    )

    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    torch.manual_seed(0)
    qwen = shape(tokenizer) | {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}
    mixtral = shape(tokenizer) | {"num_local_experts": 4, "tie_word_embeddings": True}
    made: dict[str, Any] = {
        "qwen": Qwen2MoeForCausalLM(Qwen2MoeConfig(**qwen)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**mixtral)),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp("moe") / name
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("mlp.gate.weight"):
                    parameter.normal_(std=1.0)  # so that domains are routed apart
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, list[Any], dict[str, Any]]]:
    """At every update: the loads, the rows of each domain that they are of, and the weights of the live model."""
    found: list[tuple[np.ndarray, list[Any], dict[str, Any]]] = []
    call = ExpertLoads.__call__

    def noted(self: ExpertLoads) -> np.ndarray:
        model: Any = self._run.trainer.model  # which rows it routes, and when, is known inside alone
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        modes = [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters(recurse=False)]
        state = torch.random.get_rng_state()
        out = call(self)
        assert modes == [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters(recurse=False)]
        assert torch.equal(state, torch.random.get_rng_state())
        found.append((out, self._examples, before))
        return out

    monkeypatch.setattr(ExpertLoads, "__call__", noted)
    return found


def counted(folder: Path, weights: dict[str, Any], domains: Sequence[Any]) -> np.ndarray:
    """Return the tokens that the last layer's router sends to each expert, (K, E): row by row, token by token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.load_state_dict(weights)
    routed: list[Any] = []
    router = model.model.layers[-1].mlp.gate
    handle = router.register_forward_pre_hook(lambda module, given: routed.append(given[0].reshape(-1, 64)))
    found = np.zeros((len(domains), 4))
    for domain, examples in enumerate(domains):
        for example in examples:
            routed.clear()
            with torch.no_grad():
                model(input_ids=torch.tensor([list(example["input_ids"])]))
            for token in routed[0]:
                scores = [float(token.double() @ expert.double()) for expert in router.weight.detach()]
                for expert in sorted(range(4), key=lambda e: -scores[e])[:2]:
                    found[domain, expert] += 1
    handle.remove()
    return found


def write(workspace: Any, name: str, model: Path, params: dict[str, Any] | None = None, **keys: Any) -> Path:
    values: dict[str, Any] = {
        "model_name_or_path": str(model),
        "finetuning_type": "full",
        **{key: None for key in ("lora_target", "lora_rank", "lora_dropout", "eval_dataset", "save_steps")},
        "train_type": "dynamic_mix",
        "component_name": "dynamic_moe",
        "dataset": ",".join(DOMAINS),
        "warmup_step": 1,
        "update_step": 2,
        "update_times": 2,
        "cutoff_len": 96,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "dataflex": {"store": str(workspace.folder / "store"), "params": {"eval_batch_size": 3, **(params or {})}},
    }
    path: Path = workspace.write(name, **{**values, **keys})
    return path


@pytest.mark.parametrize("family", ["qwen", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_loads_are_those_of_a_loop_and_move_the_proportions(
    workspace: Any, models: dict[str, Path], loads: Any, family: str
) -> None:
    """After the warm-up and two steps later, under the weights of then; padding counts nowhere."""
    workspace.run("train", write(workspace, "run", models[family]))
    lines = in_force(workspace, "run")
    assert [(line["kind"], line["step"]) for line in lines] == [("warmup", 0), ("update", 1), ("update", 3)]
    assert len(loads) == 2
    weights = np.full(3, 1 / 3)
    for (found, domains, before), line in zip(loads, lines[1:], strict=True):
        assert [len(examples) for examples in domains] == [8, 8, 8]
        expected = counted(models[family], before, domains)
        assert expected.sum() == 2 * sum(len(e["input_ids"]) for examples in domains for e in examples)
        np.testing.assert_array_equal(found, expected)
        raised = weights * np.exp(10 * deltas(expected, "mean", "l2"))
        weights = 0.95 * raised / raised.sum() + 0.05 / 3
        np.testing.assert_allclose([line["proportions"][name] for name in DOMAINS], weights, rtol=1e-12)
    assert np.ptp(weights) > 0.01
    (_, _, first), (_, _, second) = loads
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_come_to_the_proportions_of_one(workspace: Any, models: dict[str, Path]) -> None:
    """They share the evaluation batches: three of a domain, of which one process has two."""
    keys: dict[str, Any] = {"per_device_train_batch_size": 2, "learning_rate": 1e-4}
    workspace.run("train", write(workspace, "one", models["qwen"], gradient_accumulation_steps=2, **keys))
    dataflex("train", write(workspace, "two", models["qwen"], gradient_accumulation_steps=1, **keys), **TWO)
    one, two = ([list(line["proportions"].values()) for line in in_force(workspace, name)] for name in ("one", "two"))
    assert np.ptp(one[-1]) > 0.01
    np.testing.assert_allclose(two, one, rtol=1e-3)


def test_held_out_rows_by_name_and_no_more_than_asked(workspace: Any, models: dict[str, Path], loads: Any) -> None:
    """Called `<domain>_eval` they belong by name, whatever their order; and need not be in eval_dataset as well."""
    folder = workspace.folder / "data"
    folder.mkdir()
    info = {}
    for i, name in enumerate(("a", "b", "b_eval", "a_eval")):
        rows = [{"instruction": f"{name} {n}", "input": "", "output": "x" * (i + 1)} for n in range(6)]
        (folder / f"{name}.json").write_text(json.dumps(rows), "utf-8")
        info[name] = {"file_name": f"{name}.json"}
    (folder / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    keys: dict[str, Any] = {"dataset_dir": str(folder), "dataset": "a,b", "eval_dataset": "a_eval,b_eval"}
    keys |= {"warmup_step": None, "update_step": 1, "update_times": 1}
    params = {"eval_samples": 5, "collect_steps": 1}
    for order, more in (("b_eval,a_eval", {}), ("a_eval,b_eval", {"eval_dataset": None})):
        run = write(workspace, "run", models["qwen"], params, mixer_eval_dataset=order, **(keys | more))
        workspace.run("train", run, "overwrite_output_dir=true")
    first, second = (found for found, _, _ in loads)
    np.testing.assert_array_equal(first, second)
    _, domains, before = loads[0]
    assert [len(examples) for examples in domains] == [5, 5]
    np.testing.assert_array_equal(first, counted(models["qwen"], before, [examples[:3] for examples in domains]))
    run = write(workspace, "wrong", models["qwen"], mixer_eval_dataset="a_eval,a", **keys)
    with pytest.raises(ConfigError, match=r"mixer_eval_dataset: found .*; expected 2 datasets of eval_dataset"):
        workspace.run("train", run)


def test_a_model_that_tells_no_experts_is_an_error_before_training(
    workspace: Any, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Ernie4_5_MoeConfig

    trained: list[int] = []
    monkeypatch.setattr(DataflexTrainer, "training_step", lambda *_: trained.append(1))
    with pytest.raises(ConfigError, match=r"the model \(qwen2\) has no experts"):
        workspace.run("train", write(workspace, "dense", workspace.tiny.model))
    biased = workspace.folder / "biased"
    more: dict[str, Any] = {"moe_intermediate_size": 48, "moe_num_experts": 4, "moe_layer_start_index": 0}
    more |= shape(AutoTokenizer.from_pretrained(workspace.tiny.model))
    AutoModelForCausalLM.from_config(Ernie4_5_MoeConfig(**more)).save_pretrained(biased)
    AutoTokenizer.from_pretrained(workspace.tiny.model).save_pretrained(biased)
    with pytest.raises(ConfigError, match=r"chooses experts by router logits and .*e_score_correction_bias"):
        workspace.run("train", write(workspace, "biased", biased))
    assert not trained


def test_equal_weights_are_plain_training_of_experts(workspace: Any, models: dict[str, Path]) -> None:
    """With the auxiliary loss, which the model adds to its own loss alone; Transformers sums it over micro-batches."""
    keys: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    keys |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    keys |= {name: None for name in ("warmup_step", "update_step", "update_times", "component_name", "dataflex")}
    keys |= {"train_type": "static", "model_name_or_path": str(models["qwen"])}
    weighted: dict[str, Any] = {"train_type": "dynamic_weight", "component_name": "loss"}
    weighted["dataflex"] = {"store": str(workspace.folder / "store"), "params": {"strategy": "uniform"}}
    for coefficient in (0.0, 0.5):
        for name, more in (("plain", {}), ("equal", weighted)):
            own = {**keys, **more, "moe_aux_loss_coef": coefficient or None}
            workspace.run("train", write(workspace, f"{name}-{coefficient}", models["qwen"], **own))
        plain, equal = (logged(workspace, f"{name}-{coefficient}") for name in ("plain", "equal"))
        np.testing.assert_allclose(equal, plain, rtol=2e-6)
        one, other = workspace.weights(f"plain-{coefficient}"), workspace.weights(f"equal-{coefficient}")
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-5)
    assert logged(workspace, "equal-0.5")[0] > logged(workspace, "equal-0.0")[0] + 0.1


@pytest.mark.parametrize(
    ("model", "config", "weight"),
    [
        (SimpleNamespace(router_aux_loss_coef=0.2), SimpleNamespace(), 0.2),  # DBRX
        (SimpleNamespace(), SimpleNamespace(router_aux_loss_coef=0.3), 0.3),
        (SimpleNamespace(), SimpleNamespace(aux_loss_coef=0.4), 0.4),  # JetMoE
        (SimpleNamespace(get_base_model=lambda: SimpleNamespace(router_aux_loss_coef=0.5)), SimpleNamespace(), 0.5),
    ],
)
def test_the_weight_of_the_auxiliary_loss_is_the_models(model: Any, config: Any, weight: float) -> None:
    assert _auxiliary_weight(model, config) == weight
    with pytest.raises(DataflexError, match="no coefficient of it"):
        _auxiliary_weight(SimpleNamespace(), SimpleNamespace())


def test_freeze_gate_freezes_routers_alone(
    workspace: Any, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    grads: dict[str, bool] = {}
    optimized: set[str] = set()
    step = DataflexTrainer.training_step

    def stepped(self: Any, *args: Any) -> Any:
        out = step(self, *args)
        names = {id(p): name for name, p in self.model.named_parameters()}
        grads.update({name: p.grad is not None for name, p in self.model.named_parameters()})
        optimized.update(names[id(p)] for group in self.optimizer.param_groups for p in group["params"])
        return out

    monkeypatch.setattr(DataflexTrainer, "training_step", stepped)
    keys: dict[str, Any] = {"freeze_gate": True, "weight_decay": 0.1, "warmup_step": 2, "update_times": 1}
    workspace.run("train", write(workspace, "frozen", models["qwen"], **keys))
    before, after = load_file(models["qwen"] / "model.safetensors"), workspace.weights("frozen")
    gates = {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == gates
    assert {name for name, has in grads.items() if not has} == gates
    assert optimized == set(grads) - gates
    assert {name for name in grads if "gate_proj" in name or "shared_expert_gate" in name} <= optimized
    uniform = {"component_name": "uniform", "dataflex": {"store": str(workspace.folder / "store")}}
    with pytest.raises(ConfigError, match="freeze_gate: found no router"):
        workspace.run("train", write(workspace, "dense", workspace.tiny.model, **(keys | uniform)))
