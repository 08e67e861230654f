"""A model that does not fit the rows, or has nothing to train, is told before the first step."""

from __future__ import annotations

import logging

import pytest

from dataflex.errors import ConfigError

STATIC = {
    "train_type": "static", "component_name": None, "warmup_step": None, "update_step": None, "update_times": None,
    "dataflex": None, "eval_dataset": None, "max_steps": 1, "save_steps": 10,
}  # fmt: skip
RANDOM = {"component_name": "random", "dataflex": None, "warmup_step": 0, "update_step": 1, "update_times": 1}


@pytest.mark.parametrize("template", ["llama3", "gemma"])
@pytest.mark.parametrize("keys", [STATIC, RANDOM], ids=["static", "dynamic"])
def test_a_template_of_another_model(workspace, keys, template):
    path = workspace.write("run", **keys | {"template": template})
    expected = r"found 512 token embeddings in .*, and the token 51\d \('<.*>'\) in .*; expected tokens from 0 to 511"
    with pytest.raises(ConfigError, match=expected) as caught:
        workspace.run("train", path)
    assert caught.value.everywhere
    assert "resize_vocab: true" in str(caught.value)
    assert not list((workspace.folder / "out" / "run").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [STATIC, RANDOM], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "more",
    [{"template": "llama3", "resize_vocab": True}, {"add_tokens": "<a>,the"}, {"add_special_tokens": "<b>"}],
    ids=["resize_vocab", "add_tokens", "add_special_tokens"],
)
def test_new_tokens_that_have_embeddings(workspace, keys, more):
    workspace.run("train", workspace.write("run", **keys | more))
    assert workspace.weights("run")


def test_tokens_of_another_tokenizer(workspace):
    """Rows that were tokenized before bring their tokens with them, whatever the template is."""
    from datasets import Dataset, DatasetDict

    rows = {"input_ids": [[1, 2], [3, 700]], "attention_mask": [[1, 1], [1, 1]], "labels": [[1, 2], [3, 4]]}
    DatasetDict({"train": Dataset.from_dict(rows)}).save_to_disk(workspace.folder / "rows")
    path = workspace.write("run", **STATIC | {"tokenized_path": str(workspace.folder / "rows")})
    with pytest.raises(ConfigError, match="the token 700 in train_dataset; expected tokens from 0 to 511"):
        workspace.run("train", path)


@pytest.mark.parametrize("keys", [STATIC, RANDOM], ids=["static", "dynamic"])
def test_nothing_to_train(workspace, keys):
    path = workspace.write("run", **keys | {"finetuning_type": "freeze", "freeze_trainable_layers": 0})
    with pytest.raises(ConfigError, match=r"freeze \(freeze_trainable_layers: 0.*leaves no weight of .* to train"):
        workspace.run("train", path)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"lora_target": "q_proj,nope"}, "lora_target: found nope, and no such module in "),
        ({"additional_target": "nope"}, "additional_target: found nope, and no such module in "),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": 100},
            "freeze_trainable_layers: found 100, and 2 layers in ",
        ),
    ],
)
def test_modules_that_are_not_there_are_said(workspace, caplog, more, expected):
    with caplog.at_level(logging.WARNING):
        workspace.run("train", workspace.write("run", **STATIC | more))
    assert expected in caplog.text
    assert "q_proj, and no such" not in caplog.text
