"""The feature `token_loss` is a plain cross-entropy per example, whatever the batch, and is read back as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dataflex.errors import ConfigError
from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import FeatureValues, LossSpec, TokenLossSpec
from dataflex.rows import Status
from dataflex.stores.root import StoreRoot

IGNORE = -100
LENGTHS = (9, 4, 17, 2, 6, 17, 12)
UNLABELLED, POISONED, POISON = 4, 6, 40


def plain(model: Any, input_ids: Any, labels: Any) -> np.ndarray:
    """Return the loss of each token after the first, (T - 1,) float64: one example, one token at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(input_ids)])).logits[0].double()
    found = [
        0.0 if label == IGNORE else float(torch.nn.functional.cross_entropy(logits[t], torch.tensor(label)))
        for t, label in enumerate(list(labels)[1:])
    ]
    return np.array(found)


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.model).eval()


@pytest.fixture
def examples() -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    rows = []
    for length in LENGTHS:
        tokens = rng.integers(POISON + 1, 300, length)
        labels = np.where(rng.random(length) < 0.3, IGNORE, tokens)
        labels[-1] = tokens[-1]
        rows.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    rows[UNLABELLED]["labels"] = [IGNORE] * LENGTHS[UNLABELLED]
    return rows


def values(model: Any, examples: Any, budget: int, **more: Any) -> list[FeatureValues]:
    engine = FeatureEngine(model, pad_token_id=0, token_budget=budget, **more)
    return engine.compute(examples, [TokenLossSpec(), LossSpec()])


@pytest.mark.parametrize("budget", [1, 40, 8192])
def test_values_are_those_of_a_loop_whatever_the_batch(model: Any, examples: Any, budget: int) -> None:
    found, sums = values(model, examples, budget)
    assert found.vectors is not None
    assert found.vectors.shape == (len(LENGTHS), max(LENGTHS))
    for row, example in enumerate(examples):
        expected = plain(model, example["input_ids"], example["labels"])
        np.testing.assert_allclose(found.vectors[row, : len(expected)], expected, rtol=2e-5, atol=2e-6)
        assert not found.vectors[row, len(expected) :].any()  # the last token predicts none, and so does padding
        assert sums.scalars["loss_sum"][row] == pytest.approx(expected.sum(), rel=1e-5)
    np.testing.assert_allclose(found.vectors.sum(axis=1, dtype=np.float64), sums.scalars["loss_sum"], rtol=1e-6)
    np.testing.assert_array_equal(found.scalars["loss_sum"], sums.scalars["loss_sum"])
    np.testing.assert_array_equal(found.scalars["tokens"], sums.scalars["tokens"])
    assert found.status[UNLABELLED] == Status.NO_LABELS
    assert (found.status == Status.OK).sum() == len(LENGTHS) - 1


def test_in_float64_they_are_those_of_a_loop_to_float32(model: Any, examples: Any) -> None:
    import copy

    exact = copy.deepcopy(model).double()
    found, _ = values(exact, examples, 8192)
    assert found.vectors is not None
    for row, example in enumerate(examples):
        expected = plain(exact, example["input_ids"], example["labels"]).astype(np.float32)
        np.testing.assert_allclose(found.vectors[row, : len(expected)], expected, rtol=1e-6)


def test_a_row_that_is_not_finite_is_marked_and_zero(model: Any, examples: Any) -> None:
    import copy

    broken = copy.deepcopy(model)
    examples[POISONED]["input_ids"][3] = POISON
    with torch.no_grad():  # tied to the output: every loss of the row is NaN, and the other rows' too if it were shared
        broken.set_input_embeddings(copy.deepcopy(broken.get_input_embeddings()))
        broken.get_input_embeddings().weight[POISON] = torch.nan
    found, _ = values(broken, examples, 8192)
    assert found.vectors is not None
    assert found.status[POISONED] == Status.NONFINITE
    assert (found.status == Status.NONFINITE).sum() == 1
    assert not found.vectors[POISONED].any()
    assert np.isfinite(found.vectors).all()


def test_stored_they_are_rounded_as_asked_and_never_to_eight_bits_or_fewer(workspace: Any, model: Any) -> None:
    """Every text of two datasets, as wide as `cutoff_len`; int1 is float16, so that it finds all there."""
    keys: dict[str, Any] = {"stage": "pt", "template": None, "train_type": "static", "dataset": "text,text_target"}
    keys["tokenized_path"] = str(workspace.folder / "tokenized")
    keys |= {name: None for name in ("eval_dataset", "component_name", "warmup_step", "update_step", "update_times")}

    def section(storage: str) -> dict[str, Any]:
        return {
            "store": str(workspace.folder / "store"),
            "features": [{"kind": "token_loss"}, {"kind": "loss"}],
            "storage": storage,
        }

    computed = {}
    for storage in ("float32", "float16", "int1"):
        run = workspace.write("run", dataflex=section(storage), **keys)
        computed[storage] = workspace.run("featurize", run)["computed"]
    # The `loss` has no vector, but its recipe names the storage as well.
    assert (computed["float16"], computed["int1"]) == (computed["float32"], computed["float32"] // 2)
    stores = {s.layout.storage: s for s in StoreRoot(workspace.folder / "store").stores() if s.kind == "token_loss"}
    assert sorted(stores) == ["float16", "float32"]
    assert {store.layout.width for store in stores.values()} == {128}
    exact, rounded = (next(stores[storage].scan()) for storage in ("float32", "float16"))
    assert exact.vectors is not None
    assert rounded.vectors is not None
    np.testing.assert_array_equal(exact.keys, rounded.keys)
    np.testing.assert_allclose(rounded.vectors, exact.vectors, rtol=2**-11)
    losses = next(
        s for s in StoreRoot(workspace.folder / "store").stores() if s.kind == "loss" and s.layout.storage == "float32"
    )
    of_rows = losses.read(exact.keys).scalars["loss_sum"]
    np.testing.assert_allclose(exact.vectors.sum(axis=1, dtype=np.float64), of_rows, rtol=1e-6)
    for vector, tokens in zip(exact.vectors, exact.scalars["tokens"], strict=True):
        assert not vector[tokens:].any()
        assert (vector[:tokens] > 0).all()
    short = workspace.write("short", cutoff_len=4, dataflex=section("float16"), **keys)
    (workspace.folder / "tokenized" / "dataflex.json").unlink()  # rows of LLaMA-Factory's may be of any width
    with pytest.raises(ConfigError, match=r"cutoff_len: found 4 and a row of \d+ tokens"):
        workspace.run("featurize", short)
