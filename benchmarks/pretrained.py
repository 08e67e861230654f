"""A pretrained model with a LoRA adapter, and real rows of instruction data, for `benchmarks.featurize`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.passes import Bench, Example
from dataflex.errors import ConfigError
from dataflex.features.engine import FeatureEngine
from dataflex.fingerprint import IGNORE_INDEX


def build(
    folder: Path,
    file: Path,
    count: int,
    longest: int,
    share: float,
    supervised: Literal["responses", "all"],
    token_budget: int,
) -> Bench:
    """Open a model in float32, put LoRA (r 8) on all linears, train it for two steps, and choose rows.

    Args:
        folder: of the model and its tokenizer, which has a chat template.
        file: alpaca JSON: a list of rows with `instruction`, `input` and `output`.
        count: rows.
        longest: tokens of a row; longer ones are passed over.
        share: of the tokens that are supervised, about: while the rows taken so far have more, the next that has less
            is taken, in the order of the file, and the other way round.
        supervised: responses alone, or all tokens of the same rows.
        token_budget: tokens of a batch, padding included.

    Raises:
        ConfigError: the file has no such rows.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = _rows(json.loads(file.read_text("utf-8")), tokenizer, count, longest, share)
    if len(rows) < count:
        raise ConfigError(
            f"{file}: found {len(rows)} rows of at most {longest} tokens that come to {share:.0%} supervised; expected "
            f"{count}. Lower --count, or choose another --share or --longest"
        )
    if supervised == "all":
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(copy.deepcopy(base), adapter).eval()
    bench = Bench(base.requires_grad_(False), FeatureEngine(model, pad_token_id=0, token_budget=token_budget), rows)
    bench.warm_up(steps=2, batch=2)
    return bench


def _rows(records: list[dict[str, str]], tokenizer: Any, count: int, longest: int, share: float) -> list[Example]:
    rows: list[Example] = []
    tokens = responses = 0
    for record in records:
        row = example(record, tokenizer)
        length, mine = len(row["input_ids"]), sum(label >= 0 for label in row["labels"])
        if length > longest or (tokens and (responses / tokens > share) == (mine / length > share)):
            continue
        rows.append(row)
        tokens, responses = tokens + length, responses + mine
        if len(rows) == count:
            break
    return rows


def example(record: dict[str, str], tokenizer: Any) -> Example:
    """Return an alpaca record as tokens by the tokenizer's chat template, its response supervised.

    Raises:
        ConfigError: the prompt's tokens are not the first of the whole.
    """
    prompt = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": record["output"]}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    before, tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, whole))
    if tokens[: len(before)] != before:
        raise ConfigError(
            "the chat template does not put the prompt's own tokens first; expected a model where it does"
        )
    return {"input_ids": tokens, "labels": [IGNORE_INDEX] * len(before) + tokens[len(before) :]}
