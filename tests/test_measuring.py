"""What a trained model is worth on test sets: a plain loop's loss, rewards of its likeliest responses, refusals."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dataflex.errors import ConfigError
from tests.processes import TWO, dataflex
from tests.workspace import assert_equal_weights

VOWELS = """
def vowels(prompts, responses, references):
    return [float(sum(letter in "aeiou" for letter in text)) for text in responses]
"""
TEST = {"test_dataset": "target_words,target_records"}


def section(workspace: Any, **more: Any) -> dict[str, Any]:
    return {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, **TEST, **more}


def plain_loss(model: Any, rows: Any) -> tuple[float, int]:
    """Return the sum over supervised tokens of -log p, in float64, one row at a time; and how many there are."""
    total, count = 0.0, 0
    for row in range(len(rows)):
        example = rows.examples[row]
        labels = list(example["labels"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].double()
        for at, label in enumerate(labels[1:]):
            if label != -100:
                total -= float(logits[at].log_softmax(0)[label])
                count += 1
    return total, count


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs as they are measured: the model and its test sets."""
    from dataflex.pipelines import measuring

    seen: dict[str, Any] = {}
    real = measuring._measured

    def noted(run: Any, name: str, rows: Any) -> Any:
        model = run.trainer.model
        mode = model.training
        model.eval()
        seen[name] = plain_loss(model, rows)
        model.train(mode)
        return real(run, name, rows)

    monkeypatch.setattr(measuring, "_measured", noted)
    return seen


@pytest.mark.parametrize(
    ("keys", "more"),
    [
        ({}, {}),
        ({"train_type": "dynamic_mix", "component_name": "uniform", "update_step": None, "update_times": None,
          "train_step": 2, "warmup_step": None}, {"params": {}}),
        ({"train_type": "dynamic_weight", "component_name": "loss", "update_step": None, "update_times": None,
          "train_step": 2, "warmup_step": None}, {"params": {}}),
    ],
    ids=["selects", "mixes", "weighs"],
)  # fmt: skip
def test_losses_are_those_of_a_loop_over_the_trained_model(
    workspace: Any, trained: dict[str, Any], keys: dict[str, Any], more: dict[str, Any]
) -> None:
    path = workspace.write("run", dataflex=section(workspace, **more), save_strategy="no", **keys)
    summary = workspace.run("train", path)
    assert list(summary["test"]) == ["target_words", "target_records"]
    table = pq.read_table(workspace.folder / "out" / "run" / "test.parquet").to_pandas()
    for name, (total, count) in trained.items():
        about, rows = summary["test"][name], table[table.dataset == name]
        assert (about["rows"], about["tokens"]) == (8, count) == (len(rows), rows.tokens.sum())
        np.testing.assert_allclose(about["loss"], total / count, rtol=1e-5)
        np.testing.assert_allclose(rows.loss_sum.sum(), total, rtol=1e-5)
        assert rows.record.tolist() == list(range(8))


def test_whatever_becomes_of_the_measuring_the_model_is_saved(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataflex.errors import UnavailableError
    from dataflex.pipelines import measuring

    def gone(*args: Any) -> None:
        raise UnavailableError("the judge does not answer")

    real = measuring._measured
    monkeypatch.setattr(measuring, "_measured", gone)
    path = workspace.write("run", dataflex=section(workspace))
    with pytest.raises(UnavailableError):
        workspace.run("train", path)
    out = workspace.folder / "out" / "run"
    assert (out / "adapter_model.safetensors").is_file()
    assert "test" not in json.loads((out / "dataflex_summary.json").read_text())
    monkeypatch.setattr(measuring, "_measured", real)
    summary = workspace.run("train", path)  # no step is done again
    assert summary["test"]["target_words"]["rows"] == 8
    assert summary["seconds"] < 60
    steps = [json.loads(line)["current_steps"] for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1


def test_a_lost_model_has_no_loss_and_ends_well(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dataflex")
    path = workspace.write(
        "run", dataflex=section(workspace, params={}), component_name="random", learning_rate=1e30, save_strategy="no"
    )
    summary = workspace.run("train", path)
    assert summary["test"]["target_words"]["loss"] is None
    assert summary["test"]["target_words"]["nonfinite"] == 8
    assert "test set target_words: loss not finite (8 rows)" in caplog.text


def test_measuring_moves_nothing_and_costs_the_method_nothing(workspace: Any) -> None:
    plain = {"store": str(workspace.folder / "plain"), "params": {"proj_dim": 256}}
    without = workspace.run("train", workspace.write("without", dataflex=plain))
    summary = workspace.run("train", workspace.write("run", dataflex=section(workspace)))
    for name in ("computed", "reused", "tokens", "bytes", "gradients_per_chosen_row"):
        assert summary[name] == without[name]
    assert workspace.rounds("run") == workspace.rounds("without")
    assert_equal_weights(workspace.weights("run"), workspace.weights("without"))


def test_the_model_before_training_is_measured_by_evaluate(
    workspace: Any, trained: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = workspace.write("run", dataflex=section(workspace))
    with caplog.at_level(logging.INFO, "dataflex"):
        summary = workspace.run("evaluate", path)
    for name, (total, count) in trained.items():
        np.testing.assert_allclose(summary["test"][name]["loss"], total / count, rtol=1e-5)
    assert "test set target_words: loss" in caplog.text
    out = workspace.folder / "out" / "run"
    assert sorted(each.name for each in out.iterdir()) == [
        "dataflex_evaluate.json", "dataflex_rows_evaluate.parquet", "dataflex_run_evaluate.json",
        "test_evaluate.parquet",
    ]  # fmt: skip
    assert (summary["computed"], summary["stage"]) == (0, "evaluate")
    # Measured once: another method's run begins with the same model.
    again = workspace.write("again", dataflex=section(workspace, params={}), component_name="random", seed=7)
    caplog.clear()
    with caplog.at_level(logging.INFO, "dataflex"):
        assert workspace.run("evaluate", again)["test"] == summary["test"]
    assert "no loss store" not in caplog.text


def test_the_likeliest_responses_are_judged(workspace: Any, tmp_path: Path) -> None:
    """By a reward that gives what a loop over greedy decoding gives."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "vowels.py").write_text(VOWELS)
    reward = {"type": "function", "function": f"{tmp_path / 'vowels.py'}:vowels"}
    path = workspace.write("run", dataflex=section(workspace, test_reward=reward, test_tokens=6))
    summary = workspace.run("evaluate", path)
    model = AutoModelForCausalLM.from_pretrained(workspace.tiny.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(workspace.tiny.model)
    table = pq.read_table(workspace.folder / "out" / "run" / "test_evaluate.parquet").to_pandas()
    assert summary["test"]["target_words"]["scored"] == 8
    np.testing.assert_allclose(summary["test"]["target_words"]["reward"], table[:8].reward.mean(), rtol=1e-6)
    records = json.loads((workspace.tiny.dataset_dir / "target_words.json").read_text())
    expected = []
    for record in records:
        said = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
        chat = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
        for _ in range(6):
            with torch.no_grad():
                token = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
            if int(token) == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(ids[0, len(tokenizer(chat, add_special_tokens=False).input_ids) :], True)
        expected.append(sum(c in "aeiou" for c in text))
    assert table[:8].reward.tolist() == expected
    # Of one set alone: the others have losses and no reward.
    more = {"test_reward": reward, "test_tokens": 6, "test_reward_dataset": "target_words"}
    some = workspace.run("evaluate", workspace.write("some", dataflex=section(workspace, **more)))
    assert some["test"]["target_words"] == summary["test"]["target_words"]
    assert "reward" not in some["test"]["target_records"]
    found = pq.read_table(workspace.folder / "out" / "some" / "test_evaluate.parquet")["reward"]
    assert (found.to_pylist()[:8], found.null_count) == (expected, 8)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_measure_what_one_does(workspace: Any) -> None:
    more = {"test_reward": {"type": "exact_match"}, "test_tokens": 6}
    one = workspace.run("evaluate", workspace.write("one", dataflex=section(workspace, **more)))
    more["store"] = str(workspace.folder / "other")
    dataflex("evaluate", workspace.write("two", dataflex=section(workspace, **more)), **TWO)
    two = json.loads((workspace.folder / "out" / "two" / "dataflex_evaluate.json").read_text())
    for name, about in one["test"].items():
        np.testing.assert_allclose(two["test"][name].pop("loss"), about.pop("loss"), rtol=1e-5)
        assert two["test"][name] == about


def test_targets_are_drawn_by_a_seed_of_their_own(workspace: Any) -> None:
    def chosen(name: str, **more: Any) -> list[list[int]]:
        keys: dict[str, Any] = {"component_name": "loss", "eval_dataset": "target_words", "save_strategy": "no"}
        keys |= {"component_name": "rds_plus", "update_times": 1, "update_step": 1}
        drawn = {"store": str(workspace.folder / "store"), "target_rows": 2, **more}
        workspace.run("train", workspace.write(name, dataflex=drawn, **keys))
        return workspace.rounds(name)

    first, second = chosen("a", target_seed=0), chosen("b", target_seed=1)
    assert first[0] == second[0]  # the training's own draws are the same
    assert first[1] != second[1]
    assert chosen("c", target_seed=0) == first


@pytest.mark.parametrize(
    ("keys", "more", "said"),
    [
        ({}, {"test_dataset": "target_arithmetic"}, r"found 8 of the 8 rows of target_arithmetic in the target set"),
        ({"eval_dataset": "target_words"}, {"test_dataset": "target_words"}, "the first of them record 0"),
        ({"dataset": "target_words,pool"}, {"test_dataset": "target_words"}, "8 of the 8 rows .* in the training set"),
        ({}, {"test_dataset": "nowhere"}, r"dataflex.test_dataset: found 'nowhere'; expected a dataset registered in"),
        ({}, {"target_rows": 9}, r"target_rows: found 9; expected at most 8, the rows of target_arithmetic"),
        (
            {},
            {"test_dataset": [], "test_reward": {"type": "exact_match"}},
            "test_reward: .* expected test_dataset",
        ),
        ({}, {"on_missing": "error"}, "on_missing: found 'error'; expected compute beside"),
        ({}, {"test_tokens": 5}, "test_tokens: found 5; expected test_reward beside it"),
        ({}, {"test_reward_dataset": "target_words"}, "test_reward_dataset: found .*; expected test_reward beside it"),
        (
            {},
            {"test_reward": {"type": "exact_match"}, "test_reward_dataset": "pool"},
            r"test_reward_dataset: found 'pool'; expected some of test_dataset \(target_words,target_records\)",
        ),
        ({}, {"target_seed": 5}, "target_seed: found 5; expected target_rows beside it"),
        ({}, {"test_reward": {"type": "exact_mach"}}, "exact_match"),
        ({"train_type": "static", "component_name": None}, {}, "test_dataset: found .*; expected none, or a dynamic"),
        ({"train_on_prompt": True}, {"test_reward": {"type": "exact_match"}}, "train_on_prompt"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    workspace: Any, keys: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    path = workspace.write("run", dataflex=section(workspace, **more), **keys)
    with pytest.raises(ConfigError, match=said):
        workspace.run("train", path)
    assert not (workspace.folder / "out" / "run" / "rounds").exists()
