"""Loss, Delta Loss and IFD choose with the exact probabilities of hand-made losses, and never what may not be drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dataflex.errors import CoverageError
from dataflex.features.spec import BASE, FeatureSpec, LossSpec
from dataflex.rows import Status
from dataflex.selectors.composed import Composed, Composition
from dataflex.selectors.loss import ByDeltaLoss, ByLoss, Ifd
from dataflex.selectors.parts.sampling import band_logits, logs, sample, window_weights
from tests.held import Held, context, pool

NAN = float("nan")


def losses(means: list[float], tokens: list[int] | None = None) -> Held:
    counts = np.array(tokens or [2] * len(means), np.int32)
    values = np.array(means, np.float64)
    status = np.where(np.isnan(values), Status.NONFINITE, Status.OK).astype(np.uint8)
    return Held(status=status, scalars={"loss_sum": np.nan_to_num(values) * counts, "tokens": counts})


def select(selector: Any, views: dict[Any, Held], k: int, **more: Any) -> list[int]:
    size = len(next(iter(views.values())).status)

    def features(spec: FeatureSpec, target: str | None, state: str | None) -> Held:
        assert target is None
        return views[spec, state]

    return selector.select(None, 0, k, context=context(pool(size), [], features, **more)).rows.tolist()


LIVE, AT_BASE = (LossSpec(), None), (LossSpec(), BASE)


@pytest.mark.parametrize(
    ("values", "focus", "expected"),
    [
        # linear quantiles of 1..5: q1 = 1 + 4 * 0.33 = 2.32, q2 = 3.64
        ([1, 2, 3, 4, 5, NAN], "medium", [1, 1, 5, 1, 1, 0]),
        ([1, 2, 3, 4, 5, NAN], "high", [1, 1, 1, 5, 5, 0]),
        ([1, 2, 3, 4, 5, np.inf], "low", [5, 5, 1, 1, 1, 0]),
        ([2, 2, 2, 2], "low", [5, 5, 5, 5]),  # all equal: all are low
        ([2, 2, 2, 2], "high", [1, 1, 1, 1]),
        ([NAN, NAN], "low", [0, 0]),
    ],
)
def test_weights_of_bands(values: list[float], focus: str, expected: list[float]) -> None:
    found = band_logits(np.array(values), (0.33, 0.66), focus, 5.0, 1.0)
    np.testing.assert_allclose(np.exp(found), expected)
    tempered = band_logits(np.array(values), (0.33, 0.66), focus, 5.0, 4.0)
    np.testing.assert_allclose(np.exp(tempered), np.power(expected, 0.25))


def test_draws_have_the_stated_frequencies() -> None:
    """Inclusion of each row in draws of 2 out of 4 without replacement, against the sum over both orders."""
    weights, keys = np.array([1.0, 2.0, 5.0, 0.0, NAN, 2.0]), pool(6).keys
    p = np.nan_to_num(weights) / np.nansum(weights)
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(6) if j != i) for i in range(6)]
    count, draws = np.zeros(6), 20_000
    rng = np.random.default_rng(0)
    for _ in range(draws):
        drawn = sample(logs(np.nan_to_num(weights)), keys, 2, rng, replacement=False)
        assert len(set(drawn.tolist())) == 2
        count[drawn] += 1
    usable = np.array(expected) > 0
    assert not count[~usable].any()
    chi = ((count / draws - expected)[usable] ** 2 / np.array(expected)[usable]).sum() * draws
    assert chi < 20  # 3 degrees of freedom: exceeded once in 6000


def test_a_draw_follows_the_keys_and_not_the_order() -> None:
    weights, keys = np.arange(1.0, 9.0), pool(8).keys
    order = np.random.default_rng(3).permutation(8)
    one = sample(logs(weights), keys, 3, np.random.default_rng(9), False)
    other = sample(logs(weights)[order], keys[order], 3, np.random.default_rng(9), False)
    assert order[other].tolist() == one.tolist()


def test_too_few_rows_are_refused() -> None:
    weights = np.array([0.0, -np.inf, NAN])
    with pytest.raises(CoverageError, match="2 rows wanted at one update, found 1 of 3"):
        sample(weights, pool(3).keys, 2, np.random.default_rng(0), False)
    assert sample(weights, pool(3).keys, 4, np.random.default_rng(0), True).tolist() == [0, 0, 0, 0]


def test_extreme_temperatures_draw_the_favoured() -> None:
    """Weights that no float64 holds are still told from each other."""
    views = {LIVE: losses([float(i) for i in range(9)])}
    cold = ByLoss(ByLoss.Params.model_validate({"focus": "high", "temperature": 1e-4}))
    draws = [select(cold, views, 3, update=u) for u in range(8)]
    assert all(set(rows) == {6, 7, 8} for rows in draws)
    assert len({tuple(rows) for rows in draws}) > 1
    parts = {"representation": {"kind": "loss"}, "rule": {"kind": "sample", "temperature": 1e-9}}
    assert select(Composed(Composition.model_validate(parts)), views, 4) == [8, 7, 6, 5]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"mode": "topk_high"}, [4, 0]),
        ({"mode": "topk_low"}, [3, 1]),
        ({"mode": "topk_high", "measure": "sum"}, [1, 0]),
        ({"mode": "topk_low", "measure": "perplexity"}, [3, 1]),
    ],
)
def test_ends_of_the_losses(params: dict[str, Any], expected: list[int]) -> None:
    views = {LIVE: losses([3, 2, NAN, 1, 4], [2, 9, 1, 2, 1])}
    assert select(ByLoss(ByLoss.Params.model_validate(params)), views, 2) == expected


def test_the_middle_band_holds_what_is_between_quantiles() -> None:
    views = {LIVE: losses([5, 1, 2, 3, 4, NAN])}
    middle = ByLoss(ByLoss.Params.model_validate({"mode": "middle_band", "quantiles": (0.25, 0.75)}))
    assert sorted(select(middle, views, 3)) == [2, 3, 4]
    with pytest.raises(CoverageError, match="4 rows wanted"):
        select(middle, views, 4)


def test_a_new_draw_at_every_update() -> None:
    views = {LIVE: losses([float(i) for i in range(40)])}
    soft = ByLoss(ByLoss.Params())
    first = select(soft, views, 5)
    assert first == select(soft, views, 5)
    assert first != select(soft, views, 5, update=1)


@pytest.mark.parametrize(
    ("update", "start", "end"), [(1, 5, 205), (2, 60, 260), (3, 400, 600), (4, 739, 939), (5, 794, 994)]
)
def test_windows_of_a_thousand_rows(update: int, start: int, end: int) -> None:
    deltas = np.linspace(2, 1, 1000)
    weights = window_weights(deltas, np.arange(1000), 0.2, (update - 1) / 4, 0.025)
    assert np.flatnonzero(weights == 1).tolist() == list(range(start, end))
    assert (weights[weights != 1] == 0.025).all()


def test_the_window_ends_at_the_first_negative_delta() -> None:
    deltas = np.array([3.0, -1.0, 2.0, -2.0, NAN])
    weights = window_weights(deltas, np.array([0, 2, 1, 3]), 1.0, 0.0, 0.5)
    assert weights.tolist() == [1, 0.5, 1, 0.5, 0]
    assert window_weights(-np.ones(4), np.arange(4), 0.5, 1.0, 0.5).tolist() == [0.5] * 4


@pytest.mark.parametrize(("score", "expected"), [("delta", 2), ("relative_delta", 1), ("excess", 3)])
def test_scores_of_learning(score: str, expected: int) -> None:
    views = {AT_BASE: losses([1.0, 0.5, 4.0, 1.0, 9.0]), LIVE: losses([0.9, 0.1, 2.5, 1.4, NAN])}
    selector = ByDeltaLoss(ByDeltaLoss.Params.model_validate({"score": score, "rule": "top_k"}))
    assert select(selector, views, 1) == [expected]
    assert {(n.spec, n.state) for n in selector.needs()} == {AT_BASE, LIVE}


def test_the_window_moves_with_the_updates_of_an_epoch() -> None:
    views = {AT_BASE: losses([5.0 - i / 10 for i in range(20)]), LIVE: losses([1.0] * 20)}
    selector = ByDeltaLoss(ByDeltaLoss.Params.model_validate({"window_size": 0.2, "outside": 0}))
    windows = [sorted(select(selector, views, 4, update=u, updates=5)) for u in range(5)]
    assert windows == [[i, i + 1, i + 2, i + 3] for i in (0, 1, 8, 14, 15)]  # int(16 sigmoid(10 (x - 1/2)))


def test_an_empty_window_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """All rows have the weight `outside` then, which is an even draw."""
    views = {AT_BASE: losses([1.0] * 20), LIVE: losses([2.0] * 19 + [0.5])}
    selector = ByDeltaLoss(ByDeltaLoss.Params())
    select(selector, views, 4, update=0, updates=5)
    assert "no row lies" not in caplog.text
    select(selector, views, 4, update=4, updates=5)
    assert "no row lies in the window, so all are drawn alike: it is 4.0 rows wide, and 1 of 20 rows" in caplog.text


def test_what_a_rule_prefers_is_what_rotation_computes_first() -> None:
    """Larger is better in the record of the pool, also where the lowest losses are wanted."""
    views = {LIVE: losses([3, 2, NAN, 1, 4])}
    given = context(pool(5), [], lambda spec, target, state: views[LIVE])
    low = ByLoss(ByLoss.Params.model_validate({"mode": "topk_low"})).select(None, 0, 2, context=given)
    assert low.pool is not None
    assert low.scores is not None
    assert np.argsort(-low.pool).tolist()[:4] == [3, 1, 0, 4]
    assert low.scores.tolist() == [1, 2]
    medium = ByLoss(ByLoss.Params.model_validate({"focus": "medium"})).select(None, 0, 2, context=given)
    assert medium.pool is not None
    assert int(medium.pool.argmax()) == 1


def test_one_update_and_later_epochs_have_a_window() -> None:
    views = {AT_BASE: losses([5.0 - i / 10 for i in range(20)]), LIVE: losses([1.0] * 20)}
    selector = ByDeltaLoss(ByDeltaLoss.Params.model_validate({"window_size": 0.2, "outside": 0}))
    assert sorted(select(selector, views, 4, updates=1)) == [0, 1, 2, 3]  # sigmoid(-5) * 16 rows, rounded down


def test_ifd_is_the_ratio_of_perplexities() -> None:
    with_prompt, alone = [1.0, 2.0, 0.5, 3.0, NAN], [2.0, 2.2, 3.0, 2.0, 1.0]
    views = {(LossSpec(first_token="drop"), BASE): losses(with_prompt)}
    views |= {(LossSpec(given="nothing"), BASE): losses(alone), AT_BASE: losses(with_prompt)}
    ratios = [math.exp(a - b) for a, b in zip(with_prompt, alone, strict=True)]
    assert ratios[3] > 1  # the prompt misleads: left out
    ranked = sorted((i for i in range(3)), key=lambda i: -ratios[i])
    assert select(Ifd(Ifd.Params()), views, 3) == ranked
    with pytest.raises(CoverageError, match="4 rows wanted"):
        select(Ifd(Ifd.Params()), views, 4)
    del views[LossSpec(first_token="drop"), BASE]
    assert select(Ifd(Ifd.Params(first_token="keep")), views, 3) == ranked


@pytest.mark.parametrize(
    "params", [{"focus": "middle"}, {"quantiles": [0.6, 0.3]}, {"temperature": 0}, {"focu": "low"}]
)
def test_wrong_parameters_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ByLoss.Params.model_validate(params)
