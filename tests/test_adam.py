"""Adam directions are those of a float64 oracle and of `torch.optim`; moments come back from disk as they were."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from dataflex.errors import ConfigError, DataflexError, MismatchError
from dataflex.features.adam import Moments, Scalars, adam_direction
from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import GradientSpec, Projection

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EXAMPLES = [
    {"input_ids": [5, 9, 11, 2, 30], "labels": [-100, -100, 11, 2, 30]},
    {"input_ids": [7, 1, 1], "labels": [7, 1, 1]},
    {"input_ids": [12, 13, 14, 15, 16, 17, 18], "labels": [-100, 13, 14, -100, 16, 17, 18]},
]


def lora_model() -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMALL))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def full_model() -> Any:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**SMALL, "tie_word_embeddings": True})).eval()


def trained(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for example in [EXAMPLES[i % 3] for i in range(steps)]:
        optimizer.zero_grad()
        loss(model, example).backward()
        optimizer.step()
    optimizer.zero_grad()


def loss(model: Any, example: dict[str, list[int]]) -> Tensor:
    return model(**{key: torch.tensor([value]) for key, value in example.items()}, use_cache=False).loss


def decay_groups(model: Any, **settings: Any) -> torch.optim.AdamW:
    """Make an optimizer as the Transformers trainer does: parameters with weight decay first, so not in model order."""
    arguments = TrainingArguments("unused", weight_decay=0.1, report_to=[], use_cpu=True)
    names = Trainer(model, arguments).get_decay_parameter_names(model)
    pairs = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in pairs if n in names], "weight_decay": 0.1},
        {"params": [p for n, p in pairs if n not in names], "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, **settings)


def oracle(variant: str, m: np.ndarray, v: np.ndarray, g: np.ndarray, s: Scalars) -> np.ndarray:
    """Write the formulas out in float64."""
    return s.rate * at_one_rate(variant, m, v, g, s)


def at_one_rate(variant: str, m: np.ndarray, v: np.ndarray, g: np.ndarray, s: Scalars) -> np.ndarray:
    m, v, g, t = m.astype(np.float64), v.astype(np.float64), g.astype(np.float64), s.step + 1
    m_new, v_new = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g * g
    if variant == "less_reference":
        return m_new / np.sqrt(v_new + s.eps)
    if variant == "precond_only":
        return (1 - s.beta1) / (1 - s.beta1**t) / (np.sqrt(v / (1 - s.beta2**t)) + s.eps) * g
    return (m_new / (1 - s.beta1**t)) / (np.sqrt(v_new / (1 - s.beta2**t)) + s.eps)


@pytest.mark.parametrize("variant", ["pytorch", "less_reference", "precond_only"])
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_equals_the_formulas(variant: str, step: int) -> None:
    random = np.random.default_rng(step)
    g = (random.normal(size=(5, 60)) * np.exp(random.normal(size=60) * 4)).astype(np.float32)
    m, v = (
        (random.normal(size=(6, 10)) * 1e-2).astype(np.float32),
        (random.normal(size=(6, 10)) ** 2).astype(np.float32),
    )
    s = Scalars(step, 0.9, 0.999, 1e-8)
    moments = Moments({"w": torch.from_numpy(m)}, {"w": torch.from_numpy(v)}, {"w": s})
    kept = torch.from_numpy(g.copy())
    found = adam_direction(moments, variant, "w", 13, kept[:, 13:50])
    wanted = oracle(variant, m.reshape(-1)[13:50], v.reshape(-1)[13:50], g[:, 13:50], s)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-6, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_array_equal(kept.numpy(), g)


def several_rates(parameters: dict[str, Tensor], rates: tuple[float, ...]) -> torch.optim.AdamW:
    """Make an optimizer whose groups, parameters dealt out in turn, have these rates."""
    dealt = list(parameters.values())
    groups = [{"params": dealt[i :: len(rates)], "lr": 1e-3 * rate} for i, rate in enumerate(rates)]
    return torch.optim.AdamW(groups, weight_decay=0.0)


@pytest.mark.parametrize("make", [lora_model, full_model])
@pytest.mark.parametrize("rates", [(1.0,), (1.0, 16.0), (1.0, 0.25, 4.0, 1e-3)])
def test_engine_equals_the_step_of_the_optimizer(make: Callable[[], Any], rates: tuple[float, ...]) -> None:
    """The change that one more step on one example makes, over minus the first learning rate; nothing is decayed.

    A schedule is on its way down by then: it scales all rates alike, so it does not act.
    """
    model = make()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = several_rates(parameters, rates)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)
    trained(model, optimizer)
    for _ in range(3):
        schedule.step()
    spec = GradientSpec(direction="adam", projection=Projection(type="identity"))
    engine = FeatureEngine(model, pad_token_id=0, moments=Moments.from_optimizer(optimizer, parameters.items()))
    alone = [engine.compute([example], [spec]) for example in EXAMPLES]
    order = [p.name for p in sorted(engine.parameters, key=lambda p: p.key)]
    weights, state = {n: p.detach().clone() for n, p in parameters.items()}, copy.deepcopy(optimizer.state_dict())
    for row, example in enumerate(EXAMPLES):
        optimizer.load_state_dict(copy.deepcopy(state))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # so that the change is not lost in the rounding of the weights
        loss(model, example).backward()
        norm = torch.cat([p.grad.double().reshape(-1) for p in parameters.values() if p.grad is not None]).norm()
        # Alone, as the optimizer has it: how far a batch moves float32 depends on the CPU, and other tests bound it.
        (found,) = alone[row]
        assert found.scalars["gradient_norm"][0] == pytest.approx(float(norm), rel=1e-5)  # of no step, not projected
        optimizer.step()
        optimizer.zero_grad()
        change = torch.cat([(weights[n] - parameters[n]).detach().reshape(-1) for n in order])
        assert found.vectors is not None
        difference = torch.from_numpy(found.vectors[0]) - change
        assert float(difference.norm() / change.norm()) < 2e-5
        for name, parameter in parameters.items():
            parameter.data.copy_(weights[name])


@pytest.mark.parametrize("variant", ["pytorch", "less_reference", "precond_only"])
def test_engine_equals_the_oracle(variant: str) -> None:
    model = full_model()
    optimizer = decay_groups(model)
    optimizer.param_groups[1]["lr"] = 4e-3
    trained(model, optimizer)
    moments = Moments.from_optimizer(optimizer, model.named_parameters())
    assert {s.rate for s in moments.scalars.values()} == {1.0, 4.0}
    engine = FeatureEngine(model, pad_token_id=0, moments=moments)
    whole = Projection(type="identity")
    plain, adam = engine.compute(
        EXAMPLES,
        [GradientSpec(projection=whole), GradientSpec(direction="adam", adam_variant=variant, projection=whole)],
    )
    at = 0
    assert plain.vectors is not None
    assert adam.vectors is not None
    for p in sorted(engine.parameters, key=lambda p: p.key):
        part, at = slice(at, at + p.size), at + p.size
        m, v = (t[p.name].reshape(-1).numpy() for t in (moments.exp_avg, moments.exp_avg_sq))
        wanted = oracle(variant, m, v, plain.vectors[:, part], moments.scalars[p.name])
        np.testing.assert_allclose(adam.vectors[:, part], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_decay_groups_are_matched_by_identity() -> None:
    model = full_model()
    optimizer = decay_groups(model)
    trained(model, optimizer, steps=4)
    moments = Moments.from_optimizer(AcceleratedOptimizer(optimizer), model.named_parameters())
    assert list(moments.scalars) == [n for n, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(moments.exp_avg[name], optimizer.state[parameter]["exp_avg"])
        assert torch.equal(moments.exp_avg_sq[name], optimizer.state[parameter]["exp_avg_sq"])
    assert moments.scalars["model.norm.weight"] == Scalars(4, 0.8, 0.95, 1e-6)
    assert moments.scalars["model.embed_tokens.weight"] == Scalars(4, 0.9, 0.999, 1e-8)


def test_moments_are_a_copy() -> None:
    model = lora_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trained(model, optimizer)
    moments = Moments.from_optimizer(optimizer, model.named_parameters())
    before = moments.digest()
    trained(model, optimizer)
    assert moments.digest() == before
    assert Moments.from_optimizer(optimizer, model.named_parameters()).digest() != before


def test_survives_the_disk(tmp_path: Path) -> None:
    model = full_model()
    optimizer = decay_groups(model)
    trained(model, optimizer)
    moments = Moments.from_optimizer(optimizer, model.named_parameters())
    moments.save(tmp_path / "moments.safetensors")
    read = Moments.load(tmp_path / "moments.safetensors")
    assert read.scalars == moments.scalars
    assert read.digest() == moments.digest()


def test_rates_are_part_of_the_name_and_of_every_file(tmp_path: Path) -> None:
    """Other rates, other moments by name; a file of an older version, which tells none, is refused."""
    model = lora_model()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = several_rates(parameters, (1.0, 16.0))
    trained(model, optimizer)
    moments = Moments.from_optimizer(optimizer, parameters.items())
    assert {s.rate for s in moments.scalars.values()} == {1.0, 16.0}
    ordered = [n for i in range(2) for n in list(parameters)[i::2]]
    read = Moments.from_optimizer_pt(optimizer.state_dict(), ordered, {n: p.shape for n, p in parameters.items()})
    assert read.digest() == moments.digest()
    optimizer.param_groups[1]["lr"] /= 2
    assert Moments.from_optimizer(optimizer, parameters.items()).digest() != moments.digest()
    tensors = {f"{kind}/{n}": t for kind in ("exp_avg", "exp_avg_sq") for n, t in getattr(moments, kind).items()}
    plain = {n: {k: v for k, v in asdict(s).items() if k != "rate"} for n, s in moments.scalars.items()}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"scalars": json.dumps(plain)})
    with pytest.raises(MismatchError, match="found no learning rates"):
        Moments.load(tmp_path / "old.safetensors")
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(DataflexError, match="first group has a learning rate of 0"):
        Moments.from_optimizer(optimizer, parameters.items())


def test_reads_the_optimizer_of_a_checkpoint(tmp_path: Path) -> None:
    """Its integers follow the groups, decay first, not the model."""
    model = full_model()
    optimizer = decay_groups(model)
    trained(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    names = {id(p): n for n, p in model.named_parameters()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert ordered != list(names.values())
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    read = Moments.from_optimizer_pt(state, ordered, shapes)
    assert read.digest() == Moments.from_optimizer(optimizer, model.named_parameters()).digest()
    with pytest.raises(MismatchError, match="order of the optimizer's groups"):
        Moments.from_optimizer_pt(state, list(names.values()), shapes)
    with pytest.raises(MismatchError, match=f"has {len(ordered)} parameters, the model has {len(ordered) - 1}"):
        Moments.from_optimizer_pt(state, ordered[:-1], shapes)


def test_refuses_optimizers_without_moments() -> None:
    model = lora_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for optimizer in (torch.optim.SGD(parameters, lr=0.1, momentum=0.9), torch.optim.Adafactor(parameters)):
        trained(model, optimizer)
        with pytest.raises(DataflexError, match="needs exp_avg and exp_avg_sq"):
            Moments.from_optimizer(optimizer, model.named_parameters())
    quantised = torch.optim.AdamW(parameters)
    trained(model, quantised)
    for state in quantised.state.values():
        state["exp_avg"] = state["exp_avg"].to(torch.uint8)
    with pytest.raises(DataflexError, match="needs exp_avg and exp_avg_sq"):
        Moments.from_optimizer(quantised, model.named_parameters())
    nesterov = torch.optim.NAdam(parameters)
    trained(model, nesterov)
    with pytest.raises(DataflexError, match="keeps mu_product too, so it is another optimizer than Adam"):
        Moments.from_optimizer(nesterov, model.named_parameters())


def test_refuses_moments_of_no_step_and_other_adams() -> None:
    model = lora_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(DataflexError, match="keeps nothing"):
        Moments.from_optimizer(torch.optim.AdamW(parameters), model.named_parameters())
    optimizer = torch.optim.AdamW(parameters, amsgrad=True)
    trained(model, optimizer)
    with pytest.raises(DataflexError, match="amsgrad"):
        Moments.from_optimizer(optimizer, model.named_parameters())
    for state in optimizer.state.values():
        state["step"].zero_()
    optimizer.param_groups[0]["amsgrad"] = False
    with pytest.raises(DataflexError, match="has done no step"):
        Moments.from_optimizer(optimizer, model.named_parameters())


def test_engine_refuses_what_it_cannot_do() -> None:
    model = lora_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trained(model, optimizer)
    moments = Moments.from_optimizer(optimizer, model.named_parameters())
    adam = GradientSpec(direction="adam")
    with pytest.raises(ConfigError, match="train a warm-up first"):
        FeatureEngine(model, pad_token_id=0).compute(EXAMPLES, [adam])
    engine = FeatureEngine(model, pad_token_id=0, moments=moments)
    name = next(iter(moments.scalars))
    scalars = {n: s for n, s in moments.scalars.items() if n != name}
    engine.moments = Moments(moments.exp_avg, moments.exp_avg_sq, scalars)
    with pytest.raises(ConfigError, match=name):
        engine.compute(EXAMPLES, [adam])
