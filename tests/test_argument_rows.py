"""Arguments that enter values through the rows give other rows when they are changed, or are refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dataflex.config.arguments import ARGUMENTS
from dataflex.errors import MismatchError
from dataflex.fingerprint import keys_digest

TURNS = {"dataset": "turns", "template": "qwen3"}


PACKED = {"stage": "pt", "dataset": "text", "eval_dataset": "text_target", "template": "default", "cutoff_len": 16,
          "packing": True}  # fmt: skip


TWO = {"dataset": "pool,turns", "eval_dataset": "target_words,turns"}


INTERLEAVED = TWO | {"mix_strategy": "interleave_under"}


ROWS: dict[str, tuple[dict[str, Any], Any]] = {
    "template": ({}, "default"),
    "dataset": ({}, "turns"),
    "eval_dataset": ({}, "target_words"),
    "dataset_dir": ({}, "other"),
    "cutoff_len": ({}, 24),
    "train_on_prompt": ({}, True),
    "mask_history": (TURNS, True),
    "mix_strategy": (TWO, "interleave_under"),
    "interleave_probs": (INTERLEAVED, "0.2,0.8"),
    "preprocessing_batch_size": (PACKED, 5),
    "preprocessing_num_workers": (PACKED, 2),
    "max_samples": ({}, 5),
    "val_size": ({"eval_dataset": None}, 0.5),
    "eval_on_each_dataset": (INTERLEAVED, True),
    "packing": (PACKED, False),
    "tool_format": (TURNS, "llama3"),
    "default_system": ({}, "Be short."),
    "enable_thinking": (TURNS, False),
    "preserve_thinking": (TURNS | {"mask_history": True}, True),
    "tokenized_path": ({"max_samples": 5}, "tokens"),
    "use_fast_tokenizer": ({}, False),
    "split_special_tokens": ({}, True),
}
"""Each argument that enters through the rows: beside which others it acts, and another value."""


UNREAD = {"use_fast_tokenizer"}
"""Those of them that the installed Transformers does not read: the tokens are the same, and so are the names."""


def lay_out_rows(tiny: Any, folder: Path) -> None:
    """Copy the tiny datasets into `data` and `other`, with records of several turns, tools and thoughts."""
    shutil.copytree(tiny.dataset_dir, folder / "data")
    said = [("human", "Add 1 and 2."), ("gpt", "<think>\n1 and 2\n</think>\n\n3"), ("human", "And 4?"), ("gpt", "7")]
    tool = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}, "required": []}}
    turns = {"conversations": [{"from": who, "value": text} for who, text in said], "tools": json.dumps([tool])}
    (folder / "data" / "turns.json").write_text(json.dumps([turns] * 3))
    info = json.loads((folder / "data" / "dataset_info.json").read_text())
    columns = {"messages": "conversations", "tools": "tools"}
    info["turns"] = {"file_name": "turns.json", "formatting": "sharegpt", "columns": columns}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    shutil.copytree(folder / "data", folder / "other")
    pool = json.loads((folder / "data" / "pool.json").read_text())
    (folder / "other" / "pool.json").write_text(json.dumps(pool[1:]))


def rows_named(tiny: Any, folder: Path, **keys: Any) -> Any:
    """Load a run's rows as a run does; return the part of its identity that they are."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from dataflex.llamafactory.row_sets import load_rows

    given = {
        "model_name_or_path": str(tiny.model),
        "stage": "sft",
        "do_train": True,
        "dataset": "pool",
        "eval_dataset": "target_arithmetic",
        "dataset_dir": str(folder / "data"),
        "template": "qwen3_nothink",
        "cutoff_len": 400,
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "report_to": "none",
        "max_samples": 20,
        **keys,
    }
    for name in ("dataset_dir", "tokenized_path"):
        if given.get(name) in ("other", "tokens"):
            given[name] = str(folder / given[name])
    model_args, data_args, training_args, tuning_args, _ = get_train_args(given)
    module = load_tokenizer(model_args)
    with patch.dict(TEMPLATES, copy.deepcopy(TEMPLATES)):  # LLaMA-Factory writes arguments into what all runs share
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        sets = load_rows(template, model_args, data_args, training_args, tuning_args.stage, **module)
    return keys_digest(sets.train.keys), {name: keys_digest(rows.keys) for name, rows in sets.targets.items()}


@pytest.mark.timeout(300)
def test_arguments_that_enter_through_the_rows_give_other_rows_or_are_refused(tiny: Any, tmp_path: Path) -> None:
    assert ROWS.keys() == {name for name, way in ARGUMENTS.items() if way == "rows"}
    lay_out_rows(tiny, tmp_path)
    rows_named(tiny, tmp_path, tokenized_path="tokens")
    starts: dict[str, Any] = {}
    for name, (beside, value) in ROWS.items():
        if name == "tokenized_path":
            with pytest.raises(MismatchError, match=r"max_samples: 20 → 5"):
                rows_named(tiny, tmp_path, **beside, tokenized_path=value)
            continue
        start = starts.setdefault(json.dumps(beside), None) or rows_named(tiny, tmp_path, **beside)
        starts[json.dumps(beside)] = start
        assert (rows_named(tiny, tmp_path, **(beside | {name: value})) == start) == (name in UNREAD), name
    assert rows_named(tiny, tmp_path) == starts["{}"]
