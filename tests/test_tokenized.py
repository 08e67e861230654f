"""A tokenized dataset knows what it was made from, and is refused where the run says something else."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.errors import CorruptionError, DataflexError, MismatchError


@pytest.fixture
def mine(tiny: Any, tmp_path: Path) -> Any:
    """Return the tiny model and datasets in folders that a test may change."""
    model, data = (shutil.copytree(path, tmp_path / path.name) for path in (tiny.model, tiny.dataset_dir))
    return dataclasses.replace(tiny, model=model, dataset_dir=data)


@pytest.fixture
def load(mine: Any, tmp_path: Path) -> Any:
    """Return a function that loads rows as LLaMA-Factory does, or as we do, by way of one tokenized folder."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from dataflex.llamafactory.row_sets import load_rows

    def rows(by_llamafactory: bool = False, **keys: Any) -> Any:
        arguments = {
            "model_name_or_path": str(mine.model),
            "stage": "sft",
            "do_train": True,
            "dataset": mine.pool,
            "eval_dataset": "target_arithmetic,target_words",
            "dataset_dir": str(mine.dataset_dir),
            "template": "qwen3_nothink",
            "cutoff_len": 64,
            "output_dir": str(tmp_path / "out"),
            "tokenized_path": str(tmp_path / "tokens"),
            "use_cpu": True,
            "report_to": "none",
            **keys,
        }
        model_args, data_args, training_args, tuning_args, _ = get_train_args(arguments)
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        called = get_dataset if by_llamafactory else load_rows
        return called(template, model_args, data_args, training_args, tuning_args.stage, **module)

    return rows


def known(rows: Any) -> Any:
    """Everything that is known of rows but their records."""
    arrays = [
        getattr(rows, name).tolist() for name in ("keys", "dataset", "index", "length", "supervised", "truncated")
    ]
    return *arrays, list(rows.names), [tuple(lost) for lost in rows.dropped]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"eval_on_each_dataset": True},
        {"eval_dataset": None, "val_size": 0.2},
        {"dataset": "pool,target_records", "mix_strategy": "interleave_over"},
        {"stage": "pt", "dataset": "text,text_target", "eval_dataset": None, "template": "default", "cutoff_len": 16},
    ],
    ids=["merged", "each", "split", "interleaved", "packed"],
)
def test_what_is_known_of_rows_comes_back_with_them(load: Any, tmp_path: Path, keys: dict[str, Any]) -> None:
    made, found = load(**keys), load(**keys)
    assert known(found.train) == known(made.train)
    assert found.targets.keys() == made.targets.keys()
    for name, target in made.targets.items():
        assert known(found.targets[name]) == known(target)
    assert not list(tmp_path.glob(".tokens*"))
    if not keys:
        assert 0 < found.train.truncated.sum() < len(found.train)
        assert found.train.dropped == [(0, 61)]
        assert not any(target.dropped for target in found.targets.values())
        # It travels with the folder, and LLaMA-Factory reads the folder as before.
        (tmp_path / "tokens").rename(tmp_path / "elsewhere")
        assert known(load(tokenized_path=str(tmp_path / "elsewhere")).train) == known(made.train)
        theirs = load(by_llamafactory=True, tokenized_path=str(tmp_path / "elsewhere"))
        assert theirs["train_dataset"]["input_ids"][:] == made.module["train_dataset"]["input_ids"][:]
        assert len(theirs["eval_dataset"]) == 16


def test_other_settings_are_refused_field_by_field(load: Any) -> None:
    load()
    for key, value in {"cutoff_len": 32, "eval_dataset": "target_words", "max_samples": 30}.items():
        with pytest.raises(MismatchError, match=rf"made under other settings(.|\n)* {key}: .* → ") as caught:
            load(**{key: value})
        assert caught.value.exit_code == 3
        assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(MismatchError, match=r"stage: sft → pt(.|\n)* tool_format: null → qwen\n") as caught:
        load(stage="pt", packing=False, dataset="text", eval_dataset="text_target", template="default", cutoff_len=9,
             max_samples=9, enable_thinking=False, preserve_thinking=True, tool_format="qwen")  # fmt: skip
    differing = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    every = "cutoff_len dataset enable_thinking eval_dataset max_samples preserve_thinking stage template tool_format"
    assert set(every.split()) <= set(differing)
    load(preprocessing_batch_size=7, overwrite_cache=True, seed=7, ignore_pad_token_for_loss=False)


def test_every_data_argument_is_compared_or_known_to_be_silent(tiny: Any) -> None:
    from llamafactory.hparams.data_args import DataArguments
    from transformers import AutoTokenizer

    from dataflex.llamafactory.provenance import differences, made_from

    given = {"template": "qwen3_nothink", "dataset": "pool", "eval_dataset": "target_words"}
    data_args = DataArguments(dataset_dir=str(tiny.dataset_dir), **given)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    before = made_from("sft", data_args, 42, tokenizer)
    others = {"dataset": ["text"], "eval_dataset": ["text"], "dataset_dir": "/nowhere", "interleave_probs": [0.5, 0.5]}
    silent = set()
    for field in dataclasses.fields(DataArguments):
        value = getattr(data_args, field.name)
        changed = copy.copy(data_args)
        another = not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else 0.5
        setattr(changed, field.name, others.get(field.name, another))
        if not differences(made_from("sft", changed, 42, tokenizer), before):
            silent.add(field.name)
    on_the_way = {"dataset_dir", "media_dir", "tokenized_path", "data_shared_file_system", "overwrite_cache"}
    elsewhere = {"streaming", "buffer_size", "eval_num_beams", "ignore_pad_token_for_loss"}
    assert silent == on_the_way | elsewhere | {"preprocessing_batch_size", "preprocessing_num_workers"}
    packed = copy.copy(data_args)
    packed.packing = True
    before = made_from("pt", packed, 42, tokenizer)
    packed.preprocessing_batch_size = 7
    assert differences(made_from("pt", packed, 42, tokenizer), before) == ["preprocessing_batch_size: 1000 → 7"]


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"eval_dataset": None, "val_size": 0.2}, "seed: 42 → 43"),
        ({"dataset": "sampled"}, "seed: 42 → 43"),
    ],
    ids=["split", "sampled"],
)
def test_a_seed_enters_where_rows_are_drawn(load: Any, mine: Any, keys: dict[str, Any], field: str) -> None:
    register(mine, "sampled", num_samples=20)
    load(**keys)
    with pytest.raises(MismatchError, match=field):
        load(**keys, seed=43)


def register(mine: Any, name: str, **more: Any) -> None:
    """Register the pool under another name, or otherwise."""
    info = mine.dataset_dir / "dataset_info.json"
    registered = json.loads(info.read_text())
    info.write_text(json.dumps({**registered, name: {**registered["pool"], **more}}))


def test_other_files_registrations_and_tokenizers_are_refused(load: Any, mine: Any) -> None:
    load()
    file, config = mine.dataset_dir / "pool.json", mine.model / "tokenizer.json"
    kept = {path: path.read_text() for path in (file, config, mine.dataset_dir / "dataset_info.json")}
    file.write_text(kept[file].replace("a", "b", 1))
    with pytest.raises(MismatchError, match=r"records.pool.files.pool.json: \w{8} → \w{8}"):
        load()
    file.write_text(kept[file])
    register(mine, "pool", columns={"prompt": "output", "response": "instruction"})
    with pytest.raises(MismatchError, match=r"records.pool.registration.prompt: instruction → output"):
        load()
    (mine.dataset_dir / "dataset_info.json").write_text(kept[mine.dataset_dir / "dataset_info.json"])
    tokenizer = json.loads(kept[config])
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
    config.write_text(json.dumps(tokenizer))
    with pytest.raises(MismatchError, match=r"tokenizer: \w{8} → \w{8}"):
        load()
    config.write_text(kept[config])
    load()


def test_files_that_are_not_here_are_said(load: Any, mine: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = load()
    shutil.rmtree(mine.dataset_dir)
    with caplog.at_level(logging.WARNING):
        assert known(load().train) == known(made.train)
    assert "the files of pool, target_arithmetic, target_words are not here" in caplog.text
    with pytest.raises(MismatchError, match=r'eval_dataset: .* → \["target_words"\]'):
        load(eval_dataset="target_words")


def test_a_folder_of_llamafactorys_is_used_with_what_is_unknown(
    load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(by_llamafactory=True, eval_dataset="target_words")
    with caplog.at_level(logging.WARNING):
        found = load(eval_dataset="target_words")
    assert "unknown are the datasets and settings it was made with" in caplog.text
    assert found.train.truncated is None
    assert found.train.dropped is None
    assert found.train.take(np.arange(3)).truncated is None
    with pytest.raises(DataflexError, match="found 2 evaluation datasets"):
        load()


def test_a_damaged_or_exchanged_folder_is_refused(load: Any, tmp_path: Path) -> None:
    load()
    about = tmp_path / "tokens" / "dataflex.json"
    kept = about.read_text()
    for text in ("", "[]", "{", kept[:-20], kept.replace('"cutoff_len": 64', '"cutoff_len": 63')):
        about.write_text(text)
        with pytest.raises(CorruptionError, match=r"dataflex.json: cannot be read"):
            load()
    about.write_text(kept)
    load(tokenized_path=str(tmp_path / "other"), max_samples=20)
    shutil.rmtree(tmp_path / "tokens" / "train")
    shutil.copytree(tmp_path / "other" / "train", tmp_path / "tokens" / "train")
    with pytest.raises(CorruptionError, match=r"the rows of train in .* are not those that its dataflex.json is about"):
        load()
    (tmp_path / "tokens" / "dataset_dict.json").unlink()
    with pytest.raises(DataflexError, match="cannot be read"):
        load()


def test_what_cannot_be_written_is_said(load: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataflexError, match=r"tokenized_path: .* cannot be written"):
        load(tokenized_path=str(tmp_path / "file" / "tokens"))
    with pytest.raises(DataflexError, match="expected a local folder"):
        load(tokenized_path="s3://bucket/tokens")


def test_a_training_of_llamafactorys_own_compares_too(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    own: dict[str, Any] = {"train_type": "static", "component_name": None, "warmup_step": None, "update_step": None}
    own |= {"update_times": None, "dataflex": None, "max_steps": 1, "save_strategy": "no"}
    tokens = workspace.folder / "tokens"
    own["tokenized_path"] = str(tokens)
    selected = {"component_name": "random", "dataflex": {"store": str(workspace.folder / "store")}, "warmup_step": 0}
    selected |= {"update_times": 1, "update_step": 1, "save_strategy": "no", "tokenized_path": str(tokens)}
    workspace.run("train", workspace.write("made", **selected))
    assert (tokens / "dataflex.json").is_file()
    changed = {"cutoff_len": 32, "dataset": "pool,target_words", "eval_dataset": "target_words"}
    with pytest.raises(MismatchError, match=r"made under other settings") as caught:
        workspace.run("train", workspace.write("other", **own, **changed))
    assert all(f"\n  {name}: " in str(caught.value) for name in changed)
    caplog.clear()
    workspace.run("train", workspace.write("same", **own))
    assert "unknown are the datasets" not in caplog.text
    (tokens / "dataflex.json").unlink()
    workspace.run("train", workspace.write("unknown", **own))
    assert "unknown are the datasets and settings it was made with" in caplog.text
