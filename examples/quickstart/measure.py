"""What the demo reports: the loss on held-out rows, and where the selected rows came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart.pool import Row, turns


def answer_loss(model_folder: Path, adapter: Path | None, rows: Sequence[Row]) -> float:
    """Return the mean loss (nats per answer token) over rows that the model was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    total, tokens = 0.0, 0
    for row in rows:
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in turns(row))
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.inference_mode():
            loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        total += loss.item() * len(answer)
        tokens += len(answer)
    return total / tokens


def shares(run: Path, pool: Sequence[Row], source: str) -> Iterator[tuple[str, float]]:
    """Yield (name of the round, share of its rows that are of the source), from the run's journal.

    Raises:
        ValueError: the run was trained on another number of rows, so positions are no positions in `pool`.
    """
    trained = json.loads((run / "dataflex_summary.json").read_text("utf-8"))["rows"]
    if trained != len(pool):
        raise ValueError(
            f"{run} was trained on {trained} rows, the pool has {len(pool)}; remove .demo and run the demo again"
        )
    for path in sorted((run / "rounds").glob("round-*.parquet")):
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"dataflex"])["round"]
        name = "warm-up" if about["kind"] == "warmup" else f"update {about['update']}"
        chosen = table["index"].to_pylist()
        yield name, sum(pool[index]["source"] == source for index in chosen) / len(chosen)
