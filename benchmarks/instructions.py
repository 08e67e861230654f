"""Instruction rows of about one length, a dataset for each source, for `benchmarks.trainer_overhead`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.lora_run import LORA
from benchmarks.pretrained import example
from dataflex.errors import ConfigError


def training(
    file: Path, model: Path, folder: Path, template: str, batch: int, accumulation: int, cutoff: int
) -> tuple[dict[str, Any], str]:
    """Write the rows, and return the keys of a LoRA run over them, and what the rows are.

    A row has more than 7/8 of `cutoff` tokens and at most all of it, so that it hardly matters to a step's cost which
    rows a mixer draws. A source with fewer rows than a step takes is left out.

    Args:
        file: alpaca JSON, each row with its `source`.
        model: a model folder with its tokenizer, which has a chat template.
        folder: takes what is written.
        template: the model's in LLaMA-Factory.
        batch: rows of a micro-batch.
        accumulation: micro-batches of a step.
        cutoff: tokens of a row.

    Raises:
        ConfigError: fewer than two sources have enough such rows.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    sources: dict[str, list[dict[str, str]]] = defaultdict(list)
    tokens: dict[str, int] = defaultdict(int)
    responses: dict[str, int] = defaultdict(int)
    for record in json.loads(file.read_text("utf-8")):
        row = example(record, tokenizer)
        if 7 * cutoff < 8 * len(row["input_ids"]) <= 8 * cutoff:
            sources[record["source"]].append(record)
            tokens[record["source"]] += len(row["input_ids"])
            responses[record["source"]] += sum(label >= 0 for label in row["labels"])
    names = sorted(name for name, rows in sources.items() if len(rows) >= batch * accumulation)
    if len(names) < 2:
        raise ConfigError(
            f"{file}: found {len(names)} sources with {batch * accumulation} rows of {7 * cutoff // 8 + 1} to {cutoff} "
            "tokens; expected two or more. Choose another --cutoff, or a smaller --batch"
        )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / "data" / f"{name}.json").write_text(json.dumps(sources[name]), "utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in names}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    count, total = sum(len(sources[name]) for name in names), sum(tokens[name] for name in names)
    share = sum(responses[name] for name in names) / total
    told = f"{count} rows of {total / count:.0f} tokens, {share:.0%} of them supervised, of {', '.join(names)}"
    return {
        **LORA,
        "model_name_or_path": str(model),
        "template": template,
        "cache_dir": str(folder / "cache"),
        "dataset_dir": str(folder / "data"),
        "dataset": ",".join(names),
        "cutoff_len": cutoff,
        "disable_gradient_checkpointing": True,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
    }, told
