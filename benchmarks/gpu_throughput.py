"""Rows per second of a large model's features, beside its own training pass. Run by `benchmarks.gpu`.

The limit of arithmetic is the FLOPs of a row's forward and backward pass by the rate of a large matrix product, which
is measured on the same device: nothing that runs the model can be faster than that.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_gradients import Row, again
from dataflex.features.adam import Moments
from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import FeatureSpec, GradientSpec, LossSpec
from tests.reference import gradient_error


def rate(square: int, dtype: str, device: torch.device) -> float:
    """Return the TFLOP/s of a product of square matrices of random numbers, the best of five."""
    left, right = (torch.randn(square, square, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds = min(_timed(lambda: left @ right, device) for _ in range(6))
    return round(2 * square**3 / seconds / 1e12, 4)


def frozen_model(shape: dict[str, Any], device: torch.device) -> Any:
    """Return a model of random bfloat16 weights."""
    torch.manual_seed(0)
    with device:
        model: Any = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    return model.requires_grad_(False)


def passes(base: Any, rank: int, tokens: int, budgets: Sequence[int], tera: float) -> dict[str, Any]:
    """Measure with an adapter of one rank; the base is left as it was.

    Args:
        base: a frozen model.
        rank: of LoRA on every linear layer of the decoder.
        tokens: of a row.
        budgets: tokens of a batch, of which the first that fits into memory is taken.
        tera: TFLOP/s of a matrix product.
    """
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # as LLaMA-Factory trains with `bf16: true`
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    size = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    limit = tera * 1e12 / flops(base.config, tokens, size)
    found: dict[str, Any] = {"skipped": f"out of memory with batches of {budgets[-1]} tokens"}
    for budget in budgets:
        try:
            found = _cases(model, tokens, budget, limit)
        except torch.cuda.OutOfMemoryError:
            print(f"out of memory with batches of {budget} tokens", flush=True)
        else:
            break
        finally:
            model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
    model.unload()
    vars(base).pop("peft_config", None)  # which PEFT before 0.21 leaves behind
    return {"parameters": size, "tokens": tokens, "rows/s at the limit": round(limit, 2)} | found


def _cases(model: Any, tokens: int, budget: int, limit: float) -> dict[str, Any]:
    device = next(model.parameters()).device
    random, count = np.random.default_rng(0), budget // tokens
    ids = random.integers(0, model.config.vocab_size, (2 * count, tokens)).tolist()
    rows: list[Row] = [{"input_ids": row, "labels": row} for row in ids]
    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-5)

    def train() -> None:
        for batch in (ids[:count], ids[count:]):
            given = torch.tensor(batch, device=device)
            with autocast():
                loss = model(input_ids=given, labels=given, use_cache=False).loss
            loss.backward()

    measured = {"training pass": _speed(train, len(rows), device)}
    optimizer.step()
    optimizer.zero_grad()
    moments = Moments.from_optimizer(optimizer, model.named_parameters())
    del optimizer
    engine = FeatureEngine(model, pad_token_id=0, token_budget=budget, autocast=autocast, moments=moments.to(device))
    loss, sgd, adam = LossSpec(), GradientSpec(), GradientSpec(direction="adam")
    asked: dict[str, list[FeatureSpec]] = {"loss": [loss], "loss, SGD": [loss, sgd], "loss, Adam": [loss, adam]}
    for name, specs in asked.items():
        measured[name] = _speed(partial(engine.compute, rows, specs), len(rows), device)
    table = {
        name: {
            "rows/s": round(speed, 2),
            "by training": round(speed / measured["training pass"][0], 3),
            "by limit": round(speed / limit, 3),
            "peak GB": round(peak, 2),
        }
        for name, (speed, peak) in measured.items()
    }
    return {
        "rows of a batch": count,
        **table,
        "gradient to autograd": gradient_error(engine, rows[: min(4, count)]),
        "repetition": again(engine, rows[:count], sgd),
    }


def flops(config: Any, tokens: int, adapter: int) -> float:
    """Return the FLOPs of a row's forward and backward pass, its own gradient of the adapter included.

    A frozen matrix acts once each way, 2 FLOPs for every weight and token; the adapter's give their gradient besides.
    Attention is causal: half of two products of (T, T) each, and twice that on the way back.
    """
    heads, narrow = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    layer = config.hidden_size * (2 * heads + 2 * narrow + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    attention = 3 * config.num_hidden_layers * 2 * tokens**2 * heads
    return float(4 * weights * tokens + 6 * adapter * tokens + attention)


def _speed(action: Callable[[], Any], rows: int, device: torch.device) -> tuple[float, float]:
    """Return rows per second, the best of three after one that fills tables, and peak memory in GB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = min([_timed(action, device) for _ in range(4)][1:])
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process so far: no more is known of a CPU
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else kilobytes / 1e6
    return rows / seconds, peak


def _timed(action: Callable[[], Any], device: torch.device) -> float:
    """Return the wall seconds of an action and of the kernels that it started."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    begun = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - begun
