"""Per-example LoRA gradients by dattri-llm, or a plain training pass: one process of `benchmarks.others`.

It runs in the environment of dattri-llm, which has no `dataflex`.

python others_child.py ADAPTER_DIR ROWS_JSONL OUT_DIR TOKEN_BUDGET {plain,raw,adam,less}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

Batch = dict[str, torch.Tensor]
WIDTH = 8192


def main(adapter: str, file: str, out: str, budget: int, case: str) -> None:
    torch.set_num_threads(1)
    path = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    rows = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
    rows.sort(key=lambda row: -len(row["input_ids"]))  # as the other tools do
    size = max(1, budget // len(rows[0]["input_ids"]))
    if case == "plain":
        for start in range(0, len(rows), size):
            model.zero_grad()
            model(**collate(rows[start : start + size]), use_cache=False).loss.backward()
        return
    stream(model, rows, size, out, case)


def stream(model: Any, rows: list[Any], size: int, out: str, case: str) -> None:
    """Write the gradient of every row's mean loss, or the direction of Adam from it, into dattri-llm's store."""
    from dattri_llm import AttributionArguments, GradientStorageManager, HookManagerConfig
    from dattri_llm.attribution.utils import collect_gradients
    from dattri_llm.gradient.streaming import GradientStreamer

    layers = [name for name, _ in model.named_modules() if name.endswith((".lora_A.default", ".lora_B.default"))]
    config: dict[str, Any] = {"hook_types": dict.fromkeys(layers, "linear_io"), "capture_style": "materialized"}
    if case == "less":  # it projects layer by layer: the numbers of all layers together are as many as ours
        one = {"style": "dense", "proj_dim": WIDTH // len(layers), "proj_max_batch_size": 16, "proj_type": "rademacher"}
        config["projection_kwargs"] = {"__default__": one}
    streamer = GradientStreamer(
        model,
        rows,
        AttributionArguments(output_dir=out, use_cpu=True, dataloader_pin_memory=False),
        batch_size=size,
        loss_fn=loss,
        collate_fn=collate,
        config=HookManagerConfig(**config),
        optimizer=None if case == "raw" else moments(model, rows[-4:]),
        precondition=case != "raw",
    )
    collect_gradients(streamer, GradientStorageManager(out))


def moments(model: Any, rows: list[Any]) -> torch.optim.Optimizer:
    """Return an optimizer with moments, the model as it was."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    loss(model, collate(rows)).backward()
    optimizer.step()
    optimizer.zero_grad()
    for parameter, value in zip(parameters, before, strict=True):
        parameter.data.copy_(value)
    return optimizer


def loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the sum over rows of each one's mean cross-entropy, so that a row's gradient is its own."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) / (labels >= 0).sum(1)).sum()


def collate(rows: list[Any]) -> Batch:
    """Pad rows to the longest."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, by: int) -> torch.Tensor:
        return torch.tensor([row[name] + [by] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", -100)}


if __name__ == "__main__":
    adapter, file, out = sys.argv[1:4]
    main(adapter, file, out, int(sys.argv[4]), sys.argv[5])
