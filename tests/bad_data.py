"""Datasets that are wrong in some way, loaded as a run loads them, and the text with which they are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import DataflexError

FOLDER = Path(__file__).parent / "nasty"


def loader(model: Path, output_dir: Path) -> Callable[..., Any]:
    """Return a function that loads one dataset as a run would; arguments and tokenizer are read once."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from dataflex.llamafactory.row_sets import load_rows

    def prepared(**keys: Any) -> tuple[Any, ...]:
        arguments = {
            "model_name_or_path": str(model),
            "do_train": True,
            "dataset": "any",
            "output_dir": str(output_dir),
            "use_cpu": True,
            "report_to": "none",
            **keys,
        }
        model_args, data_args, training_args, _, _ = get_train_args(arguments)
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        return template, model_args, data_args, training_args, module

    known = {
        "sft": prepared(stage="sft", template="qwen3_nothink", cutoff_len=256),
        "pt": prepared(stage="pt", template="default", cutoff_len=16),
    }

    def load(folder: Path, name: str, stage: str = "sft", **data: Any) -> Any:
        template, model_args, data_args, training_args, module = known[stage]
        data_args = copy.copy(data_args)
        for key, value in ({"dataset": [name], "dataset_dir": str(folder)} | data).items():
            setattr(data_args, key, value)
        return load_rows(template, model_args, data_args, training_args, stage, **module)

    return load


def refusal(load: Callable[..., Any], folder: Path, name: str, **data: Any) -> str:
    """Return the text with which a dataset is refused: three lines at most, that name what is wrong with what."""
    with pytest.raises(DataflexError) as raised:
        load(folder, name, **data)
    text = str(raised.value)
    assert text.count("\n") < 3
    assert f"dataset {name} (" in text
    assert "Traceback" not in text
    return text


def short(text: str, name: str) -> str:
    """Return the problem that a refusal tells, in two lines."""
    head, problem = text.split("\n")
    assert head == "1 problem in the configuration:"
    assert name in problem
    return problem


GOOD = {"instruction": "a", "input": "", "output": "b"}


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


ASKED = turns(("human", "q"), ("gpt", "a"))


SHAREGPT = {"formatting": "sharegpt"}
