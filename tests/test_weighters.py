"""Weighters against executed vectors, plain loops and linear programs; rows that may not count; caps; resumption."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dataflex.errors import ConfigError, DataflexError, MismatchError
from dataflex.features.spec import BASE, EmbeddingSpec, LossSpec
from dataflex.rows import Rows, Status
from dataflex.weighters.adapt import Adapt, pool, unit
from dataflex.weighters.base import Examples, Group
from dataflex.weighters.feature import ByFeature
from dataflex.weighters.loss import ByLoss
from dataflex.weighters.relative import effective_size
from tests.held import Held
from tests.held import pool as rows_of

NAN, INF = math.nan, math.inf
LOSSES = [1, 1.5, 2, 2.5, 3, 4]
SATURATED = [0.2174940055] * 3


def group(losses: Sequence[float], signal: Sequence[float] | None = None, since: int = 0, **more: Any) -> Group:
    found = torch.tensor(losses, dtype=torch.float64)
    near = torch.full_like(found, NAN) if signal is None else torch.tensor(signal, dtype=torch.float64)
    rows = torch.tensor(more.get("rows", range(len(losses))), dtype=torch.int64)
    return Group(rows, found, near, since, since, 100)


def by_loss(losses: Sequence[float], since: int = 0, **params: Any) -> Tensor:
    return ByLoss(ByLoss.Params(**params)).weights(group(losses, since=since))


# ---- loss


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.0800115732, 0.1116651457, 0.1558412648, *SATURATED]),
        ({"temperature": 0.4}, [0.0221518542, 0.0509708825, 0.1172827719, *[0.2698648305] * 3]),
        (
            {"strategy": "quadratic"},
            [0.0882920992, 0.1538850941, 0.2147639494, 0.2400028087, 0.2147639494, 0.0882920992],
        ),
        (
            {"strategy": "extremes"},
            [0.2432353223, 0.1742857242, 0.1248811784, 0.0894812744, 0.1248811784, 0.2432353223],
        ),
    ],
)
def test_loss_equals_the_vectors(params, expected):
    found = by_loss(LOSSES, **params)
    np.testing.assert_allclose(found / 6, expected, atol=1e-9)
    assert found.dtype == torch.float64


def test_weighted_losses_and_effective_size_equal_the_vectors():
    losses = torch.tensor(LOSSES, dtype=torch.float64)
    assert float((by_loss(LOSSES) * losses).mean()) == pytest.approx(2.6253848731, abs=1e-9)
    assert float((by_loss(LOSSES, temperature=100) * losses).mean()) == pytest.approx(2.3366632613, abs=1e-9)
    assert float(effective_size(by_loss(LOSSES))) == pytest.approx(5.403, abs=1e-3)
    assert float(effective_size(torch.zeros(3))) == 0


def test_exponential_is_no_baseline_and_uniform_is():
    np.testing.assert_allclose(
        by_loss([1, 2, 3, 4], strategy="exponential") / 4, [0.071, 0.138, 0.268, 0.523], atol=5e-4
    )
    assert by_loss([1, NAN, 3, 4], strategy="uniform").tolist() == [1, 0, 1, 1]


def plain(losses: Sequence[float], strategy: str, delta: float, r: float) -> list[float]:
    good = [x for x in losses if math.isfinite(x)]
    low, high = min(good), max(good)
    raised = []
    for loss in losses:
        h = delta * (2 * loss - low - high) / max(high - low, 1e-6)
        f = {"linupper": min(h + delta, delta), "quadratic": 1 - h * h / delta**2, "extremes": abs(h), "exponential": h}
        raised.append(math.exp(f[strategy] / r) if math.isfinite(loss) else 0.0)
    return [len(good) * x / sum(raised) for x in raised]


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes", "exponential"])
def test_loss_equals_loops_and_leaves_out_what_has_no_loss(strategy):
    losses = np.random.default_rng(4).gamma(2, 1, 40).tolist()
    losses[3], losses[17], losses[30] = NAN, INF, -INF
    found = by_loss(losses, strategy=strategy, delta=0.7, temperature=0.3)
    np.testing.assert_allclose(found, plain(losses, strategy, 0.7, 0.3), rtol=1e-10)
    assert found[[3, 17, 30]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes", "exponential", "uniform"])
@pytest.mark.parametrize("losses", [[2.5], [0.1] * 49, [3.3] * 7, [0.0, 0.0]])
def test_equal_losses_weigh_exactly_one(strategy, losses):
    assert by_loss(losses, strategy=strategy).tolist() == [1] * len(losses)


def test_traps_of_the_range():
    close = by_loss([2.0, 2.0 + 1e-9], strategy="exponential")
    np.testing.assert_allclose(close, [1, 1], atol=1e-3)
    assert close[0] < close[1]
    assert by_loss([NAN, NAN]).tolist() == [0, 0]
    assert by_loss([NAN, 3.0]).tolist() == [0, 1]
    assert by_loss([]).tolist() == []
    small, large = by_loss([1.0, 2.0]).tolist()
    assert small / large == pytest.approx(math.exp(-1), abs=1e-12)


def test_loss_invariants():
    losses = torch.tensor(LOSSES, dtype=torch.float64)
    found = by_loss(LOSSES)
    np.testing.assert_allclose(by_loss((losses * 3 + 7).tolist()), found, rtol=1e-12)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    np.testing.assert_allclose(by_loss(losses[order].tolist()), found[order], rtol=1e-12)


def test_an_outlier_is_kept_out_of_the_range():
    losses = [*np.linspace(1, 3, 19).tolist(), 500.0]
    assert by_loss(losses)[:19].max() / by_loss(losses)[0] < 1.02
    found = by_loss(losses, range_quantiles=(0.0, 0.9))
    end = np.quantile(losses, 0.9)
    np.testing.assert_allclose(found, plain([min(x, end) for x in losses], "linupper", 1, 1), rtol=1e-10)
    assert by_loss([*losses, NAN], range_quantiles=(0.0, 0.9))[:20].tolist() == found.tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [2.0, 2.0, 2.0, 2.0]),
        ({"schedule": "linear", "anneal_steps": 10}, [100.0, 51.0, 2.0, 2.0]),
        ({"schedule": "linear", "anneal_steps": 10, "initial_temperature": 12}, [12.0, 7.0, 2.0, 2.0]),
        ({"schedule": "inverse", "anneal_steps": 10}, [INF, 4.0, 2.0, 2.0]),
    ],
)
def test_temperature_falls_as_described(params, expected):
    weighter = ByLoss(ByLoss.Params(temperature=2, **params))
    assert [weighter.temperature(since) for since in (0, 5, 10, 99)] == expected
    for since, r in zip((0, 5, 10, 99), expected, strict=True):
        plainly = [1.0] * 6 if r == INF else plain(LOSSES, "linupper", 1, r)
        np.testing.assert_allclose(weighter.weights(group(LOSSES, since=since)), plainly, rtol=1e-10)


def water_filled(weights: Sequence[float], cap: float) -> list[float]:
    """Cap, spread the rest in proportion, again, until nothing is above the cap."""
    found, fixed = list(weights), set()
    while True:
        fixed |= {i for i, w in enumerate(found) if w > cap * (1 + 1e-13)}
        rest = sum(w for i, w in enumerate(weights) if i not in fixed)
        left = len(weights) - cap * len(fixed)
        new = [cap if i in fixed else w * left / rest for i, w in enumerate(weights)]
        if new == found:
            return found
        found = new


@pytest.mark.parametrize("cap", [1.05, 1.3, 2.0, 4.0, 50.0])
@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
def test_cap_equals_iterated_filling(cap, temperature):
    losses = np.random.default_rng(9).gamma(1, 1, 33).tolist()
    found = by_loss(losses, strategy="exponential", temperature=temperature, weight_cap=cap)
    free = plain(losses, "exponential", 1, temperature)
    np.testing.assert_allclose(found, water_filled(free, cap), rtol=1e-8)
    assert float(found.mean()) == pytest.approx(1, abs=1e-13)
    assert float(found.max()) <= cap
    assert (found[np.argsort(losses)].diff() >= 0).all()


def test_cap_holds_where_the_others_are_zero_in_floating_point():
    found = by_loss([1.0, 1.0, 1.0, 9.0, NAN], strategy="exponential", temperature=1e-4, weight_cap=2.0)
    np.testing.assert_allclose(found, [2 / 3, 2 / 3, 2 / 3, 2, 0], rtol=1e-11)
    found = by_loss([1.0, 2.0, 9.0], strategy="exponential", temperature=1e-4, weight_cap=1.5)
    np.testing.assert_allclose(found, [0, 1.5, 1.5], atol=1e-12)
    for count, cap in ((11, 1.1), (9, 1.8), (3, 1.5), (30, 1.2)):  # the highest use up everything, to the last bit
        found = by_loss(np.arange(1.0, count + 1).tolist(), strategy="exponential", temperature=1e-4, weight_cap=cap)
        top = round(count / cap)
        np.testing.assert_allclose(found, [0] * (count - top) + [cap] * top, atol=1e-9)
    assert by_loss([1.0, 2.0], weight_cap=2.0).tolist() == by_loss([1.0, 2.0]).tolist()
    assert by_loss([0.1] * 49, weight_cap=1.5).tolist() == [1] * 49
    assert by_loss([5.0], weight_cap=1.5).tolist() == [1]
    assert by_loss([NAN], weight_cap=1.5).tolist() == [0]


@pytest.mark.parametrize("count", [5, 64])
def test_one_outlier_exceeds_the_bound_of_the_theory_without_a_cap(count):
    losses = [1.0] * (count - 1) + [5.0]
    assert by_loss(losses)[-1] > 2
    assert by_loss(losses, weight_cap=2.0)[-1] == 2.0


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"strategy": "uniform", "temperature": 2}, "temperature left out"),
        ({"anneal_steps": 3}, "anneal_steps"),
        ({"schedule": "linear"}, "anneal_steps"),
        ({"initial_temperature": 3}, "initial_temperature left out"),
        ({"range_quantiles": (0.5, 0.5)}, "ascend"),
        ({"weight_cap": 1}, "greater than 1"),
        ({"temperature": INF}, "finite"),
        ({"strat": "linupper"}, "Extra inputs"),
    ],
)
def test_loss_parameters_that_cannot_act_are_refused(params, match):
    with pytest.raises(ValidationError, match=match):
        ByLoss.Params(**params)


@pytest.mark.parametrize(
    "kind", ["linupper", "quadratic", "extremes", "exponential", "uniform", "adapt", "exp", "rank"]
)
def test_weights_wait_for_no_number(kind):
    """A tensor of the device `meta` has no numbers: whatever asks for one raises."""
    weighter: Any
    if kind == "adapt":
        weighter = adapt(form="relative", clip=0.9)
    elif kind in ("exp", "rank"):
        weighter = by_feature(function=kind)
    else:
        cap = {} if kind == "uniform" else {"weight_cap": 2.0, "range_quantiles": (0.1, 0.9)}
        weighter = ByLoss(ByLoss.Params(strategy=kind, **cap))
    empty = torch.empty(5, dtype=torch.float64, device="meta")
    found = weighter.weights(Group(empty.long(), empty, empty, 3, 3, 100))
    assert found.shape == (5,)
    assert found.dtype == torch.float64
    with pytest.raises(RuntimeError):
        bool(found.sum() > 0)


# ---- adapt


def adapt(**params: Any) -> Adapt:
    return Adapt(Adapt.Params(**params))


def examples(states: Tensor, mask: Tensor | None = None) -> Examples:
    count = len(states)
    full = torch.ones(states.shape[:2], dtype=torch.bool)
    return Examples(torch.arange(count), torch.ones(count), torch.ones(count), states, full if mask is None else mask)


def test_pooling_equals_the_vector_and_does_not_see_padding():
    states = torch.tensor([[1.0, 0], [0, 1], [2, 2]], dtype=torch.float64)
    found = pool(states[None], torch.ones(1, 3, dtype=torch.bool))
    np.testing.assert_allclose(found[0], [1.1666667, 1.3333333], atol=1e-7)
    np.testing.assert_allclose(unit(found)[0], [0.6585046079, 0.7525766947], atol=1e-10)
    junk = torch.full((2, 2), NAN, dtype=torch.float64)
    both = torch.stack([torch.cat([junk, states]), torch.cat([states, junk])])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert pool(both, mask).tolist() == [found[0].tolist()] * 2
    assert pool(states[None].bfloat16(), torch.ones(1, 3)).dtype == torch.float64


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
    weighter.set_anchors(unit(pool(torch.tensor(anchors), every)).mean(dim=0), 0)
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


# ---- feature

STORED = np.array([3.0, 1.0, 2.0, NAN, 0.0])


def stored(values: np.ndarray = STORED) -> Held:
    status = np.where(np.isnan(values), Status.NONFINITE, Status.OK).astype(np.uint8)
    tokens = np.full(len(values), 4, np.int32)
    return Held(status=status, scalars={"loss_sum": np.nan_to_num(values) * tokens, "tokens": tokens})


def by_feature(values: np.ndarray = STORED, **params: Any) -> ByFeature:
    weighter = ByFeature(ByFeature.Params(feature=LossSpec(), **params))
    (need,) = weighter.needs()
    weighter.prepare({need: stored(values)}, rows=rows_of(len(values)))
    return weighter


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        ({}, [3, 1, 2, 0, 0]),
        ({"function": "exp", "temperature": 0.5}, [math.exp(6), math.exp(2), math.exp(4), 0, 1]),
        ({"function": "exp", "favour": "low"}, [math.exp(-3), math.exp(-1), math.exp(-2), 0, 1]),
        ({"function": "rank"}, [4, 2, 3, 0, 1]),
        ({"function": "rank", "favour": "low"}, [1, 3, 2, 0, 4]),
        ({"function": "threshold", "threshold": 2}, [1, 0, 1, 0, 0]),
        ({"function": "threshold", "threshold": 2, "favour": "low"}, [0, 1, 1, 0, 1]),
    ],
)
def test_feature_functions(params, shape):
    expected = np.array(shape) * 5 / sum(shape)  # the row without a number has a loss, so the mean is over 5
    np.testing.assert_allclose(by_feature(**params).weights(group([1.0] * 5)), expected, rtol=1e-12)


def test_feature_is_read_by_row_and_examples_without_a_loss_do_not_count():
    found = by_feature().weights(group([1.0, NAN, 1.0, 1.0], rows=[2, 0, 1, 1]))
    np.testing.assert_allclose(found, [1.5, 0, 0.75, 0.75], rtol=1e-12)
    assert by_feature().weights(group([1.0, 1.0], rows=[3, 4])).tolist() == [0, 0]
    assert by_feature(function="rank").weights(group([1.0] * 5)).dtype == torch.float64


def test_ranks_of_ties_are_shared():
    found = by_feature(np.array([1.0, 1.0, 5.0, 0.0]), function="rank").weights(group([1.0] * 4))
    np.testing.assert_allclose(found, np.array([2.5, 2.5, 4, 1]) * 0.4, rtol=1e-12)


def test_excess_is_what_the_live_model_has_above_the_reference():
    found = by_feature(excess=True).weights(group([3.5, 0.5, 3.5, 9.0, NAN]))
    np.testing.assert_allclose(found, [1, 0, 3, 0, 0], rtol=1e-12)
    soft = by_feature(excess=True, function="exp").weights(group([3.5, 0.5, 3.5, 9.0, NAN]))
    expected = np.array([math.exp(0.5), math.exp(-0.5), math.exp(1.5), 0, 0])
    np.testing.assert_allclose(soft, expected * 4 / expected.sum(), rtol=1e-12)


def test_rows_without_a_number_are_counted_once(caplog):
    with caplog.at_level(logging.WARNING):
        by_feature()
    assert [r.getMessage() for r in caplog.records] == [
        "weighter feature: 1 of 5 rows have no number and weigh 0 (feature loss)"
    ]


def test_needs_name_the_state(tmp_path):
    assert by_feature().needs()[0].state == BASE
    assert by_feature(state="saves/reference").needs()[0].state == "saves/reference"
    path = write(tmp_path, index=[0], score=[1.0])
    assert list(ByFeature(ByFeature.Params(path=path)).needs()) == []


def test_the_number_beside_a_vector():
    weighter = ByFeature(ByFeature.Params(feature=EmbeddingSpec()))
    weighter.prepare({weighter.needs()[0]: Held(scalars={"norm": np.array([1, 3], np.float32)})}, rows=rows_of(2))
    assert weighter.weights(group([1.0, 1.0])).tolist() == [0.5, 1.5]


def write(folder: Path, **columns: Any) -> str:
    kinds = {"row_key": pa.binary(16)}
    path = folder / "scores.parquet"
    pq.write_table(pa.table({name: pa.array(v, kinds.get(name)) for name, v in columns.items()}), path)
    return str(path)


def from_file(path: str, rows: Rows, **params: Any) -> list[float]:
    weighter = ByFeature(ByFeature.Params(path=path, **params))
    weighter.prepare({}, rows=rows)
    return weighter.weights(group([1.0] * len(rows))).tolist()


def test_file_by_position_or_by_key(tmp_path):
    rows = rows_of(3)
    keys = [rows.keys[i].tobytes() for i in (2, 0)]
    assert from_file(write(tmp_path, index=[2, 0], score=[4, 2]), rows) == [1, 0, 2]
    assert from_file(write(tmp_path, index=[0, 1], row_key=keys, quality=[4.0, 2.0]), rows, column="quality") == [
        1,
        0,
        2,
    ]
    twins = rows.take(np.array([0, 0, 2]))
    assert from_file(write(tmp_path, row_key=keys, score=[4.0, 1.0]), twins) == [0.5, 0.5, 2]
    more = [*keys, bytes(16)]
    assert from_file(write(tmp_path, row_key=more, score=[4.0, None, 1.0]), rows) == [0, 0, 3]


@pytest.mark.parametrize(
    ("columns", "error", "match"),
    [
        ({"index": [0], "quality": [1.0]}, ConfigError, "parameter `column`"),
        ({"score": [1.0]}, ConfigError, "row_key or index"),
        ({"index": [5], "score": [1.0]}, MismatchError, "rows 0 to 2"),
        ({"index": [0, 0], "score": [1.0, 2.0]}, ConfigError, "1 and 2 for the row 0"),
        ({"row_key": [bytes(16)], "score": [1.0]}, MismatchError, "none of the 3"),
        ({"index": [0], "score": [-1.0]}, ConfigError, "0 or more"),
        ({"index": [0], "score": [None]}, MismatchError, "none of the 3"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, columns, error, match):
    path = write(tmp_path, **columns)
    with pytest.raises(error, match=match):
        from_file(path, rows_of(3))


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "scores.parquet").write_text("index,score\n0,1\n")
    with pytest.raises(ConfigError, match="no Parquet"):
        from_file(str(tmp_path / "scores.parquet"), rows_of(3))


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({}, "one of feature and path"),
        ({"path": "none.parquet"}, "a file that exists"),
        ({"feature": {"kind": "embedding"}, "excess": True}, "with excess"),
        ({"feature": {"kind": "loss", "given": "nothing"}, "excess": True}, "with excess"),
        ({"feature": {"kind": "loss"}, "column": "tokens"}, "column left out"),
        ({"feature": {"kind": "loss"}, "temperature": 2}, "temperature left out"),
        ({"feature": {"kind": "loss"}, "function": "threshold"}, "threshold with function"),
        ({"feature": {"kind": "loss"}, "threshold": 1}, "threshold with function"),
        ({"feature": {"kind": "loss"}, "favour": "low"}, "favour left out"),
    ],
)
def test_feature_parameters_that_cannot_act_are_refused(params, match):
    with pytest.raises(ValidationError, match=match):
        ByFeature.Params(**params)
