"""DoReMi's proxy and target runs are the method: alphas, losses and gradients of every step against plain loops."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from tests.doremi import (
    DOMAINS,
    Seen,
    alphas,
    assert_close,
    gradient,
    history,
    outcome,
    proxy,
    token_losses,
    write,
)
from tests.processes import TWO, dataflex
from tests.workspace import assert_equal_weights, cut_back, in_force


@pytest.mark.parametrize(("batch", "accumulation"), [pytest.param(4, 1, marks=pytest.mark.slow), (2, 2)])
def test_a_proxy_run_is_the_method_in_plain_loops(proxies: Any, seen: Seen, batch: int, accumulation: int) -> None:
    """Alpha, its mean, and the gradient of every step; the losses are read, and none is computed in training."""
    name = f"proxy-{batch}x{accumulation}"
    keys = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    summary = proxies.run("train", proxy(proxies, name, keys))
    assert (summary["computed"], summary["reused"], summary["tokens"]) == (0, 24, 0)
    expected = alphas(seen, token_losses(proxies.folder / "out" / "reference"), accumulation)
    np.testing.assert_allclose(history(proxies, name), expected, rtol=1e-5)
    np.testing.assert_allclose(outcome(proxies, name), np.mean(expected[1:], axis=0), rtol=1e-5)
    assert np.ptp(expected[-1]) > 0.02
    assert {tuple(line["proportions"].values()) for line in in_force(proxies, name)} == {(1 / 3,) * 3}
    for step in range(4):  # alpha of the steps before weighs a step's loss
        assert_close(seen.grads[step], gradient(proxies, seen, step, "paper", expected[step]), 2e-5)


def test_the_weights_act(proxies: Any, seen: Seen) -> None:
    """On the same rows an unweighted run ends elsewhere, and both its gradient and that of equal weights are plain."""
    proxies.run("train", write(proxies, "plain", component_name="uniform"))
    proxies.run("train", proxy(proxies, "weighted"))
    rows = seen.trained
    assert rows[:4] == rows[4:]
    plain, weighted = proxies.weights("plain"), proxies.weights("weighted")
    assert max(float((plain[k] - weighted[k]).abs().max()) for k in plain) > 1e-4
    for step in range(4):
        assert_close(seen.grads[step], gradient(proxies, seen, step, "official", [1 / 3] * 3), 2e-5)
    later = gradient(proxies, seen, 7, "official", [1 / 3] * 3)
    with pytest.raises(AssertionError):
        assert_close(seen.grads[7], later, 1e-2)


def test_in_stage_sft_the_loss_is_the_papers_exactly(proxies: Any, seen: Seen) -> None:
    """All that Transformers counts is a target: the gradient is that of sum_i alpha_i x mean loss, without a factor."""
    tiny = proxies.tiny
    keys = {
        "stage": "sft",
        "template": "qwen3_nothink",
        "dataset_dir": str(tiny.dataset_dir),
        "dataset": ",".join(tiny.targets),
        "cutoff_len": 128,
        "packing": None,
        "train_step": 1,
        "per_device_train_batch_size": 3,
    }
    proxies.run("train", proxy(proxies, "sft", keys, reference_model_path=str(tiny.model), reference="live"))
    labels = [label for _, _, labels in seen.step(0) for label in labels]
    assert labels.count(-100) > len(labels) / 3
    assert all(labels[0] == -100 for _, _, labels in seen.step(0))
    assert sorted(domain for domain, _, _ in seen.step(0)) == [0, 1, 2]
    assert_close(seen.grads[0], gradient(proxies, seen, 0, "paper", [1 / 3] * 3), 2e-5)


@pytest.mark.slow
def test_the_official_loss_divides_by_what_is_drawn(proxies: Any, seen: Seen) -> None:
    drawn = [0.5, 0.25, 0.25]
    proxies.run(
        "train",
        proxy(proxies, "official", {"init_mixture_proportions": drawn}, loss="official", average="official"),
    )
    expected = alphas(seen, token_losses(proxies.folder / "out" / "reference"), 1)
    np.testing.assert_allclose(history(proxies, "official"), expected, rtol=1e-5)
    np.testing.assert_allclose(outcome(proxies, "official"), np.mean(expected, axis=0), rtol=1e-5)
    for step in (0, 3):
        weights = [a / p for a, p in zip(expected[step], drawn, strict=True)]
        assert_close(seen.grads[step], gradient(proxies, seen, step, "official", weights), 2e-5)
    assert [d for step in seen.trained for d, _, _ in step].count(0) == 8


def test_exact_weighs_a_step_by_its_own_losses(proxies: Any, seen: Seen) -> None:
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    proxies.run("train", proxy(proxies, "exact", keys, exact=True))
    assert seen.calls == len(seen.trained)  # seen once, ahead
    expected = alphas(seen, token_losses(proxies.folder / "out" / "reference"), 2)
    np.testing.assert_allclose(history(proxies, "exact"), expected, rtol=1e-5)
    np.testing.assert_allclose(outcome(proxies, "exact"), np.mean(expected[1:], axis=0), rtol=1e-5)
    for step in (0, 3):
        assert_close(seen.grads[step], gradient(proxies, seen, step, "paper", expected[step + 1]), 2e-5)


@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_of_domains_and_of_examples_multiply(proxies: Any, seen: Seen, exact: bool) -> None:
    """Alpha goes by plain losses, and both factors are in the gradient."""
    name, weighter = f"both-{exact}", {"name": "loss", "params": {"normalisation": "batch", "temperature": 0.3}}
    path = proxy(proxies, name, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, exact=exact)
    proxies.run("train", path, f"dataflex.weighter={json.dumps(weighter)}")
    expected = alphas(seen, token_losses(proxies.folder / "out" / "reference"), 2)
    np.testing.assert_allclose(history(proxies, name), expected, rtol=1e-5)
    for step in (1, 3):
        alpha = expected[step + exact]
        assert_close(seen.grads[step], gradient(proxies, seen, step, "paper", alpha, 0.3), 2e-5)
        with pytest.raises(AssertionError):
            assert_close(seen.grads[step], gradient(proxies, seen, step, "paper", alpha), 1e-2)


def test_the_target_run_takes_what_came_out(proxies: Any, seen: Seen) -> None:
    proxies.run("train", proxy(proxies, "steep", reweight_eta=20.0))
    file = proxies.folder / "out" / "steep" / "mixture_proportions.json"
    keys = {"component_name": "static", "params": {"proportions": str(file)}, "train_step": 8}
    proxies.run("train", write(proxies, "target", **keys))
    wanted = outcome(proxies, "steep")
    assert np.ptp(wanted) > 0.05
    drawn = np.bincount([d for step in seen.trained[4:] for d, _, _ in step], minlength=3)
    assert np.abs(drawn - 32 * wanted).max() < 1  # exact to one row
    np.testing.assert_allclose([in_force(proxies, "target")[0]["proportions"][d] for d in DOMAINS], wanted, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("reference", "exact"), [("stored", False), ("live", True)])
def test_two_processes_come_to_the_weights_of_one(proxies: Any, reference: str, exact: bool) -> None:
    """They compute the reference's losses as well, into a store of their own."""
    name = f"{reference}-{exact}"
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    proxies.run("train", proxy(proxies, f"one-{name}", keys, reference=reference, exact=exact))
    keys = keys | {"gradient_accumulation_steps": 1}
    store = f"dataflex.store={proxies.folder / f'store-{name}'}"
    dataflex("train", proxy(proxies, f"two-{name}", keys, reference=reference, exact=exact), store, **TWO)
    np.testing.assert_allclose(history(proxies, f"two-{name}"), history(proxies, f"one-{name}"), rtol=1e-5)
    np.testing.assert_allclose(outcome(proxies, f"two-{name}"), outcome(proxies, f"one-{name}"), rtol=1e-5)
    one, two = proxies.weights(f"one-{name}"), proxies.weights(f"two-{name}")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("interval", "step", "exact"), [pytest.param(1, 2, False, marks=pytest.mark.slow), (2, 3, True)]
)
def test_resumed_it_ends_as_the_uninterrupted_run(
    proxies: Any, seen: Seen, interval: int, step: int, exact: bool
) -> None:
    """Between updates and inside a round: the same rows, weights equal to the bit, the same alphas."""
    name = f"whole-{interval}-{exact}"
    saving = {
        "train_step": 5,
        "save_strategy": "steps",
        "save_steps": step,
        "update_step": interval,
        "update_times": -1,
    }
    proxies.run("train", proxy(proxies, name, saving, exact=exact))
    out = proxies.folder / "out"
    again = cut_back(shutil.copytree(out / name, out / f"{name}-again"), step)
    (again / "mixture_proportions.json").unlink()
    proxies.run("train", proxy(proxies, f"{name}-again", saving, exact=exact))
    assert seen.trained[5:] == seen.trained[step:5]
    assert_equal_weights(proxies.weights(f"{name}-again"), proxies.weights(name))
    assert outcome(proxies, f"{name}-again").tolist() == outcome(proxies, name).tolist()
    alpha = {line["step"]: line["alpha"] for line in in_force(proxies, name)}
    assert {line["step"]: line["alpha"] for line in in_force(proxies, f"{name}-again")} == alpha
