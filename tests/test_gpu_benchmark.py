"""The benchmark for GPUs says what is true, and runs where little is installed: its parts, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import gpu, gpu_gradients, gpu_throughput

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ABSENT = ("pydantic", "omegaconf", "llamafactory", "faiss", "deepspeed", "bitsandbytes", "datasets", "scipy", "sklearn")


def test_equality_is_found_and_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, longest = gpu.SMALL.checked, gpu.SMALL.longest
    right = gpu_gradients.equality(shape, longest, "float32", CPU)
    assert right["right"]
    assert right["engine to float64"] < 2e-6
    vectors = gpu_gradients._vectors
    monkeypatch.setattr(gpu_gradients, "_vectors", lambda *given: vectors(*given) * np.float32(1.0001))
    wrong = gpu_gradients.equality(shape, longest, "float32", CPU)
    assert not wrong["right"]
    assert wrong["engine to float64"] == pytest.approx(1e-4, rel=0.05)


def test_equality_holds_over_4_bits() -> None:
    pytest.importorskip("bitsandbytes")
    found = gpu_gradients.equality(gpu.SMALL.checked, gpu.SMALL.longest, gpu_gradients.FOUR_BITS, CPU)
    assert found["right"]
    assert found["engine to float64"] < 2e-6


def test_flops_are_those_that_torch_counts() -> None:
    """Torch counts whole attention matrices; that the first layer's input needs no gradient is neglected."""
    config: Any = LlamaConfig(**{**gpu.SMALL.timed, "num_hidden_layers": 8, "attn_implementation": "eager"})
    base: Any = LlamaForCausalLM(config)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = torch.arange(40)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    heads = config.num_attention_heads * config.head_dim
    other_half = 3 * config.num_hidden_layers * 2 * 40**2 * heads
    expected = gpu_throughput.flops(config, 40, trained) + other_half
    assert 0.95 * expected < counter.get_total_flops() <= expected


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA device; `--small`" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_with_no_more_than_it_asks_for(tmp_path: Path) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); import benchmarks.gpu as g; sys.exit(g.main())"
    command = [sys.executable, "-c", code, "--small", "--json", str(tmp_path / "found.json"), "--minutes", "14"]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert {"pydantic", "llamafactory", "faiss"} <= set(found["machine"]["absent"])
    parts = {name.partition(",")[0] for name in found}
    assert parts == {"machine", "equality", "repetition", "matrix product", "throughput", "seconds left"}
    assert all(found[f"equality, {precision}"]["right"] for precision in gpu_gradients.PRECISIONS)
    speeds = found["throughput, LoRA r = 8"]
    assert all(speeds[case]["rows/s"] > 0 for case in ("training pass", "loss", "loss, SGD", "loss, Adam"))
    assert "bitsandbytes" in found["throughput, LoRA r = 4, 4-bit base"]["skipped"]
