"""Policy gradients have the right weights and values: against closed forms of a bandit and plain autograd."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dataflex.features.engine import FeatureEngine
from dataflex.features.policy import policy_gradients, response_weights
from dataflex.features.spec import GradientSpec, Projection
from dataflex.rows import Status

THETA = np.array([0.3, -1.2, 0.9, 0.1, -0.4])


REWARD = np.array([1.0, 0.2, -0.7, 0.4, 2.5])


PI = np.exp(THETA) / np.exp(THETA).sum()


GRADIENT = PI * (REWARD - PI @ REWARD)
"""Of the expected reward of a softmax policy over five actions."""


ACTIONS = range(5)


IDENTITY = Projection(type="identity")


def nll_gradient(action: int) -> np.ndarray:
    """Return the gradient of -log pi(action) at THETA."""
    return PI - np.eye(5)[action]


def expectation(estimator: Any, count: int, reward: np.ndarray = REWARD) -> tuple[np.ndarray, float]:
    """Enumerate all groups of responses; return the mean of g / C and the trace of its covariance."""
    mean, square = np.zeros(5), 0.0
    for actions in itertools.product(ACTIONS, repeat=count):
        weights = response_weights(estimator, reward[list(actions)])
        g = sum(w * nll_gradient(a) for w, a in zip(weights, actions, strict=True)) / count
        chance = math.prod(PI[a] for a in actions)
        mean += chance * g
        square += chance * float(g @ g)
    return mean, square - float(mean @ mean)


@pytest.mark.parametrize(
    ("estimator", "count"), [("vanilla", 1), ("vanilla", 3), ("loo_baseline", 2), ("loo_baseline", 4)]
)
def test_bandit_has_the_exact_gradient(estimator: str, count: int) -> None:
    """Both are unbiased, whatever constant is added to the reward; the sign is that of a loss."""
    for shift in (0.0, 10.0):
        mean, _ = expectation(estimator, count, REWARD + shift)
        np.testing.assert_allclose(mean, -GRADIENT, rtol=0, atol=1e-12)


def test_baseline_has_less_variance_under_an_offset() -> None:
    assert expectation("loo_baseline", 3, REWARD + 10)[1] < 0.1 * expectation("vanilla", 3, REWARD + 10)[1]
    np.testing.assert_allclose(
        expectation("loo_baseline", 3, REWARD + 10)[1], expectation("loo_baseline", 3)[1], rtol=1e-9
    )


def test_baseline_takes_no_notice_of_an_offset() -> None:
    rewards = np.array([0.1, 0.9, 0.4, 0.4])
    loo, vanilla = response_weights("loo_baseline", rewards), response_weights("vanilla", rewards)
    np.testing.assert_allclose(response_weights("loo_baseline", rewards + 1e3), loo, atol=1e-9)
    np.testing.assert_array_equal(response_weights("vanilla", rewards + 1e3), vanilla + 1e3)
    for c, r in enumerate(rewards):
        assert loo[c] == pytest.approx(r - np.delete(rewards, c).mean(), abs=1e-15)
    assert not response_weights("loo_baseline", np.full(5, 0.1)).any()  # nor rounding of equal rewards
    assert response_weights("vanilla", np.full(5, 0.1)).all()


@pytest.mark.parametrize(
    ("estimator", "reference", "k", "expected"),
    [
        ("rejection", np.nan, 10, [1 / 3, 0, 0, 0.5 / 3, 1 / 3]),
        ("hard_rejection", 1.0, 10, [1 / 2, 0, 0, 0, 1 / 2]),
        ("hard_rejection", 2.0, 10, [0, 0, 0, 0, 0]),
        ("hard_rejection", -1.0, 10, [1 / 5, -1 / 5, 0, 0.5 / 5, 1 / 5]),
        ("hard_rejection", np.nan, 10, [0, 0, 0, 0, 0]),
        ("topk", np.nan, 1, [1, 0, 0, 0, 0]),
        ("topk", np.nan, 3, [1 / 3, 0, 0, 0.5 / 3, 1 / 3]),
        ("topk", np.nan, 10, [1 / 3, 0, 0, 0.5 / 3, 1 / 3]),
    ],
)
def test_rejection(estimator: Any, reference: float, k: int, expected: list[float]) -> None:
    found = response_weights(estimator, np.array([1.0, -1.0, 0.0, 0.5, 1.0]), reference, k)
    np.testing.assert_allclose(found, expected, atol=1e-15)


@pytest.mark.parametrize("estimator", ["vanilla", "loo_baseline", "rejection", "hard_rejection", "topk"])
def test_what_was_not_scored_is_left_out(estimator: Any) -> None:
    rewards = np.array([1.0, np.nan, 0.5, np.nan, 2.0])
    found, some = response_weights(estimator, rewards, 0.5), response_weights(estimator, rewards[[0, 2, 4]], 0.5)
    np.testing.assert_array_equal(found, [some[0], 0, some[1], 0, some[2]])
    assert not response_weights(estimator, np.full(3, np.nan), 0.5).any()
    assert not response_weights("loo_baseline", np.array([1.0, np.nan])).any()  # nothing to compare with


class Bandit(nn.Module):
    """Gives every next token the probabilities PI."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Linear(1, 5, bias=False)
        self.theta.weight.data = torch.tensor(THETA, dtype=torch.float32)[:, None]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool, return_dict: bool) -> Any:
        return SimpleNamespace(logits=self.theta(torch.ones(*input_ids.shape, 1)))


def gradients(
    responses: list[list[list[int]]], weights: list[list[float]], **keys: Any
) -> tuple[np.ndarray, np.ndarray]:
    prompts = [np.array([1, 2, 3][: 1 + row % 3]) for row in range(len(responses))]
    texts = [[np.array(ids, np.int64) for ids in row] for row in responses]
    engine = FeatureEngine(Bandit(), pad_token_id=0)
    return policy_gradients(engine, prompts, texts, [np.array(w) for w in weights], IDENTITY, **keys)


def test_the_engine_gives_the_bandits_gradient() -> None:
    """Each action once, weighted by its probability, is the expectation."""
    vectors, status = gradients([[[a] for a in ACTIONS]], [list(PI * REWARD)])
    np.testing.assert_allclose(vectors[0], -GRADIENT, atol=1e-6)
    assert status.tolist() == [Status.OK]


def test_a_step_towards_the_best_token_scores_positive() -> None:
    vectors, _ = gradients([[[a] for a in ACTIONS]], [response_weights("loo_baseline", REWARD).tolist()])
    best = int(np.argmax(REWARD))
    assert vectors[0] @ nll_gradient(best) > 0
    assert vectors[0] @ -nll_gradient(best) < 0


def test_a_response_twice_as_long_counts_twice_unless_the_mean_is_taken() -> None:
    responses: list[list[list[int]]] = [[[4]], [[4, 4]]]
    weights = [[1.5], [1.5]]
    for normalisation, factor in (("sum", 2), ("mean", 1)):
        vectors, _ = gradients(responses, weights, normalisation=normalisation)
        np.testing.assert_allclose(vectors[0], 1.5 * nll_gradient(4), atol=1e-6)
        np.testing.assert_allclose(vectors[1], factor * vectors[0], atol=1e-6)


def test_prompts_without_a_signal_are_said_to_have_none() -> None:
    responses: list[list[list[int]]] = [[[1], [2]], [[], []], [[1], []], [[3], [3]], [[1], [2]]]
    vectors, status = gradients(responses, [[0, 0], [1, 1], [1, 1], [1, -1], [1, 1]])
    assert status.tolist() == [Status.NO_LABELS, Status.NO_LABELS, Status.OK, Status.NO_LABELS, Status.OK]
    assert np.isfinite(vectors).all()
    assert not vectors[status != Status.OK].any()
    np.testing.assert_allclose(vectors[2], nll_gradient(1), atol=1e-6)
    none, status = gradients([], [])
    assert (none.shape, status.shape) == ((0, 5), (0,))


def test_equal_responses_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[int] = []
    compute = FeatureEngine.compute

    def counting(self: FeatureEngine, examples: Any, *args: Any) -> Any:
        run.append(len(examples))
        return compute(self, examples, *args)

    monkeypatch.setattr(FeatureEngine, "compute", counting)
    once, _ = gradients([[[1, 2], [3]]], [[3.0, 1.0]])
    twice, _ = gradients([[[1, 2], [3], [1, 2]]], [[1.0, 1.0, 2.0]])
    assert run == [2, 2]
    np.testing.assert_allclose(twice, once, rtol=1e-6)


def test_nonfinite_gradients_are_marked() -> None:
    model = Bandit()
    model.theta.weight.data[1] = math.nan
    engine = FeatureEngine(model, pad_token_id=0)
    prompts = [np.array([1])]
    vectors, status = policy_gradients(engine, prompts, [[np.array([1])]], [np.ones(1)], IDENTITY)
    assert status.tolist() == [Status.NONFINITE]
    assert not vectors.any()


def test_a_gradient_of_a_response_is_that_of_a_row() -> None:
    """The generated row is an ordinary row to the engine: labels on the response alone."""
    engine = FeatureEngine(Bandit(), pad_token_id=0)
    example = {"input_ids": [1, 2, 4, 0], "labels": [-100, -100, 4, 0]}
    (found,) = engine.compute([example], [GradientSpec(projection=IDENTITY)])
    vectors, _ = policy_gradients(engine, [np.array([1, 2])], [[np.array([4, 0])]], [np.ones(1)], IDENTITY)
    assert found.vectors is not None
    np.testing.assert_allclose(vectors, 2 * found.vectors, rtol=1e-6)
