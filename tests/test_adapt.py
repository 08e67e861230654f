"""The weighter `adapt` gives the weights that executed vectors and plain loops give."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dataflex.errors import DataflexError
from dataflex.features.pooling import exact_pool
from dataflex.weighters.adapt import Adapt, unit
from dataflex.weighters.base import Examples
from tests.weighed import NAN, adapt, group


def examples(states: Tensor, mask: Tensor | None = None) -> Examples:
    count = len(states)
    full = torch.ones(states.shape[:2], dtype=torch.bool)
    return Examples(torch.arange(count), torch.ones(count), torch.ones(count), states, full if mask is None else mask)


def test_pooling_equals_the_vector_and_does_not_see_padding():
    states = torch.tensor([[1.0, 0], [0, 1], [2, 2]], dtype=torch.float64)
    found = exact_pool(states[None], torch.ones(1, 3, dtype=torch.bool))
    np.testing.assert_allclose(found[0], [1.1666667, 1.3333333], atol=1e-7)
    np.testing.assert_allclose(unit(found)[0], [0.6585046079, 0.7525766947], atol=1e-10)
    junk = torch.full((2, 2), NAN, dtype=torch.float64)
    both = torch.stack([torch.cat([junk, states]), torch.cat([states, junk])])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert exact_pool(both, mask).tolist() == [found[0].tolist()] * 2
    assert exact_pool(states[None].bfloat16(), torch.ones(1, 3)).dtype == torch.float64


@pytest.mark.parametrize(
    ("tau", "expected"), [(1.0, (0.6224593312, 0.6681877722)), (0.1, (0.9933071491, 0.9990889488))]
)
def test_adapt_equals_the_vectors(tau, expected):
    weighter = adapt(tau=tau)
    weighter.set_anchors(torch.eye(2).mean(dim=0), 0)
    signal = weighter.signal(examples(torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]]], dtype=torch.float64)))
    np.testing.assert_allclose(signal, [0.5, 0.7], atol=1e-12)
    np.testing.assert_allclose(weighter.weights(group([1, 2], signal.tolist())), expected, atol=1e-10)


def test_signal_is_the_mean_cosine():
    rng = np.random.default_rng(6)
    anchors, states = rng.normal(size=(5, 4, 8)), rng.normal(size=(3, 4, 8))
    every = torch.ones(5, 4, dtype=torch.bool)
    weighter = adapt()
    weighter.set_anchors(unit(exact_pool(torch.tensor(anchors), every)).mean(dim=0), 0)
    position = np.arange(1, 5) / 10

    def vector(rows: np.ndarray) -> np.ndarray:
        return position @ rows

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    expected = [np.mean([cosine(vector(s), vector(a)) for a in anchors]) for s in states]
    np.testing.assert_allclose(weighter.signal(examples(torch.tensor(states))), expected, atol=1e-12)


def test_signal_of_zeros_is_zero_and_of_nan_is_nan():
    weighter = adapt()
    weighter.set_anchors(torch.tensor([1.0, 0.0]), 0)
    states = torch.tensor([[[0.0, 0.0]], [[NAN, 1.0]], [[2.0, 0.0]]])
    mask = torch.tensor([[True], [True], [True]])
    signal = weighter.signal(examples(states, mask)).tolist()
    assert signal[0] == 0
    assert math.isnan(signal[1])
    assert signal[2] == 1
    found = weighter.weights(group([1.0, 1.0, NAN], signal)).tolist()
    assert found == [0.5, 0, 0]
    assert math.isnan(weighter.signal(examples(states[2:], ~mask[2:])).item())


def test_forms():
    signal = [0.1, 0.9, NAN, -0.4]
    losses = [1.0, 2.0, 3.0, NAN]
    absolute = 1 / (1 + np.exp(-np.array(signal[:2]) / 0.5))
    found = adapt(tau=0.5).weights(group(losses, signal))
    np.testing.assert_allclose(found, [*absolute, 0, 0], rtol=1e-12)
    summed = adapt(tau=0.5, form="documented").weights(group(losses, signal))
    assert float((summed * torch.tensor([1.0, 2.0, 3.0, 0.0])).sum() / 3) == pytest.approx(absolute @ [1, 2], rel=1e-12)
    # Two micro-batches, each the sum of its losses: their mean is half the sum.
    halved = adapt(tau=0.5, form="documented").weights(replace(group(losses, signal), parts=2))
    np.testing.assert_allclose(2 * halved, summed, rtol=1e-12)
    assert Adapt.Params(form="documented").reduction == "example"
    with pytest.raises(ValidationError, match="reduction: example"):
        Adapt.Params(form="documented", reduction="token")
    relative = adapt(tau=0.5, form="relative").weights(group(losses, signal))
    assert float(relative.sum()) == pytest.approx(3, abs=1e-12)
    np.testing.assert_allclose(relative[:2] / relative[0], absolute / absolute[0], rtol=1e-12)
    clipped = adapt(tau=0.5, clip=0.6).weights(group(losses, signal))
    np.testing.assert_allclose(clipped, [absolute[0], 0.6, 0, 0], rtol=1e-12)
    assert adapt(form="relative").weights(group([NAN], [0.3])).tolist() == [0]


def test_absolute_weights_do_not_depend_on_the_batch():
    signal = np.linspace(-1, 1, 12)
    whole = adapt().weights(group([1.0] * 12, signal.tolist()))
    parts = [adapt().weights(group([1.0] * 3, signal[i : i + 3].tolist())) for i in range(0, 12, 3)]
    assert torch.cat(parts).tolist() == whole.tolist()


def test_anchors_are_due_once_per_interval_and_kept_by_the_state():
    weighter = adapt(refresh_interval=5)
    asked = []
    for step in range(20, 32):
        for _ in range(3):  # micro-batches
            if weighter.due(step):
                asked.append(step)
                weighter.set_anchors(torch.rand(4, dtype=torch.float64), step)
    assert asked == [20, 25, 30]
    other = adapt(refresh_interval=5)
    other.restore(json.loads(json.dumps(weighter.state())))
    assert other.state() == weighter.state()
    assert [other.due(step) for step in (31, 34, 35)] == [False, False, True]
    seen = examples(torch.rand(2, 3, 4))
    assert other.signal(seen).tolist() == weighter.signal(seen).tolist()
    assert adapt().state() == {}


def test_adapt_refuses_what_it_cannot_use():
    weighter = adapt()
    with pytest.raises(DataflexError, match="no anchors"):
        weighter.signal(examples(torch.ones(1, 1, 2)))
    with pytest.raises(DataflexError, match="not finite"):
        weighter.set_anchors(torch.zeros(0, 2).mean(dim=0), 0)
    with pytest.raises(ValidationError, match="less than 1"):
        Adapt.Params(clip=1.0)
