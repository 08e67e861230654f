"""Rows have LLaMA-Factory's own keys and order, and the origin of each is known."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.errors import DataflexError
from dataflex.fingerprint import row_key, text_key


@pytest.fixture
def mine(tiny: Any, tmp_path: Path) -> Any:
    """Return the tiny datasets in a folder that a test may add to."""
    return dataclasses.replace(tiny, dataset_dir=shutil.copytree(tiny.dataset_dir, tmp_path / "data"))


@pytest.fixture
def load(mine: Any, tmp_path: Path) -> Any:
    """Return a function that loads rows as LLaMA-Factory does and as we do."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from dataflex.llamafactory.row_sets import load_rows

    def both(only_ours: bool = False, **keys: Any) -> tuple[Any, Any]:
        arguments = {
            "model_name_or_path": str(mine.model),
            "stage": "sft",
            "do_train": True,
            "dataset": mine.pool,
            "dataset_dir": str(mine.dataset_dir),
            "template": "qwen3_nothink",
            "cutoff_len": 64,
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "report_to": "none",
            **keys,
        }
        model_args, data_args, training_args, tuning_args, _ = get_train_args(arguments)
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        call = (template, model_args, data_args, training_args, tuning_args.stage)
        np.random.seed(7)  # LLaMA-Factory samples with NumPy's global generator
        theirs = None if only_ours else get_dataset(*call, **module)
        np.random.seed(7)
        return theirs, load_rows(*call, **module)

    return both


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"max_samples": 20},
        {"val_size": 0.2},
        {"dataset": "pool,target_words", "eval_dataset": "target_arithmetic,target_records"},
        {"dataset": "pool,target_words", "mix_strategy": "interleave_over", "interleave_probs": "0.5,0.5"},
        {"eval_dataset": "target_arithmetic,target_records", "eval_on_each_dataset": True},
        {"dataset": "sampled"},
        {"train_on_prompt": True, "mask_history": False, "preprocessing_batch_size": 7},
        {"stage": "pt", "dataset": "text", "template": "default"},
        {"stage": "pt", "dataset": "text", "template": "default", "packing": False},
    ],
    ids=[
        "plain",
        "max_samples",
        "val_size",
        "two",
        "interleaved",
        "each",
        "num_samples",
        "options",
        "pt",
        "pt unpacked",
    ],
)
def test_rows_are_llamafactorys_and_know_their_records(load: Any, mine: Any, keys: dict[str, Any]) -> None:
    info = Path(mine.dataset_dir) / "dataset_info.json"
    known = json.loads(info.read_text())
    known["sampled"] = {**known["pool"], "num_samples": 90}  # more than there are: some records come twice
    info.write_text(json.dumps(known))
    theirs, ours = load(**keys)
    assert theirs.keys() == ours.module.keys()
    assert theirs["train_dataset"].column_names == ours.module["train_dataset"].column_names
    for column in ("input_ids", "labels", "attention_mask"):
        if column in theirs["train_dataset"].column_names:
            assert theirs["train_dataset"][column][:] == ours.module["train_dataset"][column][:]
    rows = ours.train
    assert len(rows) == len(theirs["train_dataset"])
    for i in range(len(rows)):
        example = rows.examples[i]
        assert rows.keys[i].tobytes() == row_key(example["input_ids"], example["labels"], example["attention_mask"])
        assert rows.length[i] == len(example["input_ids"])
        assert rows.supervised[i] == sum(label != -100 for label in example["labels"][1:])
    if "stage" in keys:
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(mine.model)
    for i in range(len(rows)):
        record = ours.raw[rows.names[rows.dataset[i]]][int(rows.index[i])]
        assert str(tokenizer.decode(rows.examples[i]["input_ids"])).startswith(
            f"<|im_start|>user\n{record['instruction']}"[:60]
        )


def test_targets_are_the_datasets_named(load: Any) -> None:
    _, merged = load(eval_dataset="target_arithmetic,target_records")
    _, apart = load(eval_dataset="target_arithmetic,target_records", eval_on_each_dataset=True)
    assert {name: len(rows) for name, rows in merged.targets.items()} == {"target_arithmetic": 8, "target_records": 8}
    for name in merged.targets:
        assert merged.targets[name].keys.tolist() == apart.targets[name].keys.tolist()
    _, split = load(val_size=5)
    assert {name: len(rows) for name, rows in split.targets.items()} == {"validation": 5}
    assert not np.isin(split.train.keys, split.targets["validation"].keys[1:]).all()


def test_dropped_truncated_and_identical_rows_are_known(load: Any) -> None:
    _, ours = load()
    rows = ours.train
    assert rows.dropped == [(0, 61)]  # the record without an output
    assert ours.raw["pool"][61]["id"] == "no output"
    assert rows.keys[60] == rows.keys[0]  # the duplicate shares its key and keeps its place
    assert rows.index[60] == 60
    _, free = load(cutoff_len=1000)
    longer = free.train.length > rows.length
    assert rows.truncated.tolist() == longer.tolist()
    assert 0 < rows.truncated.sum() < len(rows)


def test_a_packed_block_stays_within_its_dataset(load: Any) -> None:
    _, both = load(stage="pt", dataset="text,text_target", template="default", cutoff_len=16)
    alone = [load(stage="pt", dataset=name, template="default", cutoff_len=16)[1] for name in ("text", "text_target")]
    assert both.train.keys.tolist() == alone[0].train.keys.tolist() + alone[1].train.keys.tolist()
    assert both.train.index.tolist() == [*range(len(alone[0].train)), *range(len(alone[1].train))]
    with pytest.raises(DataflexError, match="mix_strategy"):
        load(stage="pt", dataset="text,text_target", template="default", mix_strategy="interleave_over")


def test_rows_with_images_are_refused_by_name(load: Any, mine: Any) -> None:
    folder = Path(mine.dataset_dir)
    known = json.loads((folder / "dataset_info.json").read_text())
    row = {"instruction": "a <image>", "input": "", "output": "b", "pictures": ["x.png"]}
    (folder / "seen.json").write_text(json.dumps([row]))
    known["seen"] = {
        "file_name": "seen.json",
        "columns": {"prompt": "instruction", "response": "output", "images": "pictures"},
    }
    (folder / "dataset_info.json").write_text(json.dumps(known))
    with pytest.raises(DataflexError, match="images"):
        load(only_ours=True, dataset="seen")


def test_keys_depend_on_what_the_model_is_fed_and_on_nothing_else() -> None:
    base = row_key([1, 2, 3], [-100, 2, 3], [1, 1, 1])
    assert base == row_key([1, 2, 3], [-100, 2, 3]) == row_key(np.array([1, 2, 3], np.int32), [-100, 2, 3], None)
    assert base.hex() == row_key([1, 2, 3], [-100, 2, 3]).hex() == GOLDEN
    others = [
        row_key([1, 2, 4], [-100, 2, 3]),
        row_key([1, 2, 3], [1, 2, 3]),
        row_key([1, 2, 3], [-100, 2, 3], [0, 1, 1]),
    ]
    others += [row_key([1, 2], [3, -100]), row_key([], []), text_key("1", "2"), text_key("12", ""), text_key("", "12")]
    assert len({base, *others}) == 9


GOLDEN = "c7e907985ff1211ec287b577cd583d62"
