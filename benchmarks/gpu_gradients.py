"""Per-example gradients of the engine against autograd, and against themselves. Run by `benchmarks.gpu`.

The yardstick is autograd in float64 of the same weights. In bfloat16 the engine and autograd differ because kernels are
not batch-invariant, so neither is the truth: the engine is right if it is as near to the float64 gradient as autograd
in bfloat16 is. Distances are L2, relative, of a row's whole gradient; the largest of eight rows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import GradientSpec, Projection
from tests.reference import single_gradient

PRECISIONS = ("float32", "bfloat16", "bfloat16 by autocast", "float32, every weight trained")
"""The third is what LLaMA-Factory does with `bf16: true`: the adapter stays in float32."""

FOUR_BITS = "float32 over 4 bits"
"""An adapter over NF4 (QLoRA); the float64 gradient is that over the weights which the 4 bits stand for."""

WHOLE = GradientSpec(projection=Projection(type="identity"))
Row = dict[str, list[int]]


def equality(shape: dict[str, int], longest: int, precision: str, device: torch.device) -> dict[str, Any]:
    """Return the distances of engine, autograd and the float64 gradient, and whether the engine is right."""
    model, autocast = _model(shape, precision, device)
    engine = FeatureEngine(model, pad_token_id=0, autocast=autocast)
    exact = FeatureEngine(_dequantised(copy.deepcopy(model)).double(), pad_token_id=0)
    rows = _rows(longest, shape["vocab_size"])
    alone, truth = (np.stack([_by_autograd(e, row) for row in rows]) for e in (engine, exact))
    found = _vectors(engine, rows, WHOLE)
    near = distance(alone, truth)
    # 1e-5: some hundred roundings of 6e-8, in another order. 1.5: the chance of eight rows.
    right = distance(found, truth) <= max(1e-5, 1.5 * near)
    return {
        "right": right,
        "engine to autograd": distance(found, alone),
        "engine to float64": distance(found, truth),
        "autograd to float64": near,
    }


def repetition(shape: dict[str, int], longest: int, precision: str, device: torch.device) -> dict[str, Any]:
    """Return whether two passes over the same rows agree in every bit, and their distance otherwise.

    The projection adds atomically on a GPU, in any order, so only the whole gradient can be expected to be the same;
    what torch's deterministic algorithms make of it stands beside. Batches of another size are other arithmetic.
    """
    model, autocast = _model(shape, precision, device)
    rows = _rows(longest, shape["vocab_size"])
    engine = FeatureEngine(model, pad_token_id=0, autocast=autocast)
    projected = GradientSpec(projection=Projection(dim=1024))
    found = {
        "whole gradient": again(engine, rows, WHOLE),
        "projected": again(engine, rows, projected),
    }
    with _deterministic():
        found["projected, deterministic algorithms"] = again(engine, rows, projected)
    apart = FeatureEngine(model, pad_token_id=0, autocast=autocast, token_budget=1)
    others = distance(_vectors(apart, rows, WHOLE), _vectors(engine, rows, WHOLE))
    return found | {"one row at a time": {"bitwise": others == 0, "distance": others}}


def again(engine: FeatureEngine, rows: list[Row], spec: GradientSpec) -> dict[str, Any]:
    """Featurize twice, and compare."""
    first, second = _vectors(engine, rows, spec), _vectors(engine, rows, spec)
    return {"bitwise": bool(np.array_equal(first, second)), "distance": distance(second, first)}


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest relative L2 distance of two rows, to three digits."""
    difference = np.linalg.norm(found.astype(np.float64) - wanted, axis=1)
    return float(f"{(difference / np.linalg.norm(wanted.astype(np.float64), axis=1)).max():.3g}")


def _vectors(engine: FeatureEngine, rows: list[Row], spec: GradientSpec) -> np.ndarray:
    (values,) = engine.compute(rows, [spec])
    assert values.vectors is not None
    return values.vectors


def _by_autograd(engine: FeatureEngine, row: Row) -> np.ndarray:
    """Return one row's gradient, parameters in the order of the projection `identity`."""
    gradient = single_gradient(engine, row)
    ordered = sorted(engine.parameters, key=lambda p: p.key)
    return torch.cat([gradient[p.name].double().reshape(-1) for p in ordered]).cpu().numpy()


def _model(
    shape: dict[str, int], precision: str, device: torch.device
) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """Return a model in one of `PRECISIONS`, and the context of its forward pass."""
    torch.manual_seed(0)
    config: dict[str, Any] = {**shape, "num_attention_heads": 8, "num_key_value_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    if precision == FOUR_BITS:
        model = quantised(model.to(device), torch.float32)
    if precision != "float32, every weight trained":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide mistakes in A
            nn.init.normal_(weight, std=0.02)
        if precision == "bfloat16" or (precision == "bfloat16 by autocast" and not weight.requires_grad):
            weight.data = weight.data.bfloat16()
    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    return model.to(device).eval(), autocast if precision == "bfloat16 by autocast" else nullcontext


def quantised(model: Any, compute_dtype: torch.dtype) -> Any:
    """Put the linear layers of a model's decoder into 4 bits (NF4), as `quantization_bit: 4` does; the head stays."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for path, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            weight, sizes = module.weight, (module.in_features, module.out_features)
            new = Linear4bit(*sizes, bias=False, compute_dtype=compute_dtype, quant_type="nf4")
            new.weight = Params4bit(weight.data.cpu(), requires_grad=False, quant_type="nf4")
            new.support_avx512bf16_for_cpu = False  # on a CPU: no bfloat16 in evaluation mode
            owner, _, name = path.rpartition(".")
            setattr(model.model.get_submodule(owner), name, new.to(weight.device))  # the move is what quantises
    model.is_loaded_in_4bit = True  # PEFT asks the model, not its layers
    return model


def _dequantised(model: Any) -> Any:
    """Put what 4 bits stand for in their place, in float32."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit" and path.endswith(".base_layer"):
            import bitsandbytes

            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            new = nn.Linear(module.in_features, module.out_features, bias=False, device=weight.device)
            new.weight = nn.Parameter(weight.float(), requires_grad=False)
            model.get_submodule(path.rpartition(".")[0]).base_layer = new
    return model


def _rows(longest: int, vocabulary: int) -> list[Row]:
    """Return eight rows of several lengths, so that a batch is padded; the second half of each is supervised."""
    random, rows = np.random.default_rng(0), []
    for length in random.integers(4, longest + 1, 8).tolist():
        tokens = random.integers(0, vocabulary, length).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * (length // 2) + tokens[length // 2 :]})
    return rows


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let torch add in one order; what cannot (cuBLAS without a workspace of its own) goes on as it does."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
