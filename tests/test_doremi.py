"""DoReMi's update rule is that of executed vectors and a plain loop, with absent domains and after resumption."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dataflex.errors import ConfigError, DataflexError
from dataflex.mixers.base import Domains, MixContext, Statistics
from dataflex.mixers.doremi import Doremi
from dataflex.trainers.micro_batch import MicroBatch
from dataflex.trainers.observer import Observer

PROXY = ([2.0, 1.0, 3.0], [4.0, 2.0], [1.0, 1.0, 1.0, 5.0])
REFERENCE = ([1.5, 1.5, 2.0], [4.5, 1.0], [1.0, 2.0, 0.5, 3.0])
FIRST = [0.319181934, 0.319181934, 0.361636132]
SECOND = [0.3045477675, 0.3045477675, 0.390904465]


@pytest.fixture
def doremi(tmp_path: Path) -> Any:
    return lambda **params: Doremi(Doremi.Params(reference_model_path=str(tmp_path), **params))


def statistics(
    proxy: Sequence[Sequence[float]] = PROXY, reference: Sequence[Sequence[float]] = REFERENCE, steps: int = 1
) -> Statistics:
    """Return what an observer makes of token losses, one row of each domain."""
    count, width = len(proxy), max(map(len, proxy))
    ours, theirs = (torch.zeros(count, width, dtype=torch.float64) for _ in range(2))
    targets = torch.full((count, width), -100)
    for domain, (p, r) in enumerate(zip(proxy, reference, strict=True)):
        ours[domain, : len(p)], theirs[domain, : len(r)] = torch.tensor(p), torch.tensor(r)
        targets[domain, : len(p)] = 1
    observer = Observer(np.arange(count), count, torch.device("cpu"), lambda _: theirs)
    observer.observe(MicroBatch(torch.arange(count), ours, targets, None, {}, torch.tensor(1.0), 1, 1))
    return observer.collect(steps)


def context(found: Statistics | None, count: int = 3, initial: Sequence[float] | None = None) -> MixContext:
    sizes = np.arange(1, count + 1)
    domains = Domains([f"d{i}" for i in range(count)], sizes, sizes * 10)
    start = domains.natural if initial is None else np.array(initial)
    return MixContext(domains, start, start, found or Statistics.zeros(count), 0, 0, 0, {})


def weights(mixer: Doremi) -> np.ndarray:
    found = mixer.loss_weights()
    assert found is not None
    return found


def plain(scores: Sequence[Sequence[float]], eta: float = 1.0, eps: float = 1e-3) -> list[list[float]]:
    """Return alpha after each update, by loops and without logarithms."""
    count = len(scores[0])
    alpha, history = [1 / count] * count, []
    for score in scores:
        raised = [a * math.exp(eta * s) for a, s in zip(alpha, score, strict=True)]
        alpha = [(1 - eps) * r / sum(raised) + eps / count for r in raised]
        history.append(alpha)
    return history


def test_excess_is_clipped_per_token_before_the_mean():
    found = statistics().mean_excess
    assert found.tolist() == [0.5, 0.5, 0.625]
    of_means = [max(np.mean(p) - np.mean(r), 0.0) for p, r in zip(PROXY, REFERENCE, strict=True)]
    assert of_means == pytest.approx([0.3333, 0.25, 0.375], abs=1e-4)


def test_a_token_without_a_finite_loss_has_no_excess():
    found = statistics([[math.nan, math.inf, 2.0, 1.0, 5.0]], [[1.0, 1.0, math.nan, 3.0, 4.5]])
    assert (found.tokens.tolist(), found.nonfinite.tolist(), found.mean_excess.tolist()) == ([2], [3], [0.25])


def test_a_step_without_a_comparable_loss_moves_nothing_and_none_at_all_is_an_error(doremi):
    nothing = statistics([[math.nan, 1.0]] * 3, [[1.0, math.nan]] * 3)
    with pytest.raises(DataflexError, match="no token with a finite loss under both the model and the reference"):
        doremi().mix(None, 0, context=context(nothing))
    mixer, other = doremi(), doremi()
    for one in (mixer, other):
        one.mix(None, 0, context=context(None))
        one.mix(None, 1, context=context(statistics()))
    mixer.mix(None, 2, context=context(nothing))
    assert mixer.state() == other.state()
    assert mixer.outcome().tolist() == other.outcome().tolist()
    with pytest.raises(DataflexError, match="no loss of any domain"):
        mixer.mix(None, 3, context=context(replace(Statistics.zeros(3), steps=1)))


def test_updates_and_averages_equal_the_vectors(doremi):
    paper, official = doremi(), doremi(average="official")
    for mixer in (paper, official):
        assert mixer.mix(None, 0, context=context(None)).tolist() == [1 / 3] * 3
        assert weights(mixer).tolist() == pytest.approx([1 / 3] * 3, abs=1e-15)
        assert mixer.outcome() is None
        for expected in (FIRST, SECOND):
            mixer.mix(None, 1, context=context(statistics()))
            np.testing.assert_allclose(weights(mixer), expected, atol=1e-9)
    np.testing.assert_allclose(paper.outcome(), [0.3118648508, 0.3118648508, 0.3762702985], atol=1e-9)
    np.testing.assert_allclose(official.outcome(), [0.3190210116, 0.3190210116, 0.3619579768], atol=1e-9)


@pytest.mark.parametrize(
    ("loss", "initial", "expected"),
    [
        ("paper", None, 2.319181934),
        ("paper", (0.5, 0.3, 0.2), 2.319181934),
        ("official", None, 2.209818727),
        ("official", (0.5, 0.3, 0.2), 2.188713847),
    ],
)
def test_loss_weights_give_the_proxy_losses(doremi, loss, initial, expected):
    mixer = doremi(loss=loss)
    drawn = mixer.mix(None, 1, context=context(statistics(), initial=initial), has_initial=initial is not None)
    assert drawn.tolist() == pytest.approx(initial or [1 / 3] * 3, abs=1e-15)
    found = weights(mixer)
    if mixer.loss_form == "domain_mean":
        value = sum(w * np.mean(p) for w, p in zip(found, PROXY, strict=True))
    else:
        above = sum(w * sum(p) for w, p in zip(found, PROXY, strict=True))
        value = above / sum(w * len(p) for w, p in zip(found, PROXY, strict=True))
    assert value == pytest.approx(expected, abs=1e-8)
    assert found.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        ("hold", [0.3836014128, 0.3836014128, 0.2327971744]),
        ("zero", [0.3836014128, 0.3836014128, 0.2327971744]),
        ("official", [0.000366, 0.000366, 0.999268]),
    ],
)
def test_a_domain_not_seen_yet(doremi, absent, expected):
    mixer = doremi(absent=absent)
    mixer.mix(None, 1, context=context(statistics((*PROXY[:2], []), (*REFERENCE[:2], []))), vocabulary=50_277)
    np.testing.assert_allclose(weights(mixer), expected, atol=1e-6 if absent == "official" else 1e-9)


@pytest.mark.parametrize(("absent", "held"), [("hold", 0.625), ("zero", 0.0), ("official", 0.625)])
def test_a_domain_seen_before_and_now_absent(doremi, absent, held):
    mixer = doremi(absent=absent)
    mixer.mix(None, 1, context=context(statistics()), vocabulary=50_277)
    mixer.mix(None, 2, context=context(statistics((*PROXY[:2], [math.nan]), (*REFERENCE[:2], [1.0]))))
    np.testing.assert_allclose(weights(mixer), plain([[0.5, 0.5, 0.625], [0.5, 0.5, held]])[-1], atol=1e-12)
    assert mixer.record()["excess"] == pytest.approx([0.5, 0.5, held], abs=1e-15)


def test_an_absent_domain_is_not_given_the_mean_of_the_others(doremi):
    """Centred scores with 0 for what is absent would leave alpha uniform here."""
    mixer = doremi()
    mixer.mix(None, 1, context=context(statistics(([2.0], [2.0], []), ([1.0], [1.0], []))))
    assert weights(mixer)[2] < 0.3


def test_many_updates_equal_a_plain_loop_and_keep_the_floor(doremi):
    rng = np.random.default_rng(3)
    scores = rng.gamma(1.0, 1.0, (60, 5)) * [4, 1, 1, 1, 0]
    mixer = doremi(reweight_eta=0.7, reweight_eps=0.01)
    total = np.zeros(5)
    for score, expected in zip(scores, plain(scores.tolist(), 0.7, 0.01), strict=True):
        mixer.mix(None, 1, context=context(statistics([[s] for s in score], [[0.0]] * 5), count=5))
        np.testing.assert_allclose(weights(mixer), expected, rtol=1e-10)
        assert weights(mixer).sum() == pytest.approx(1, abs=1e-13)
        assert weights(mixer).min() >= 0.01 / 5 * (1 - 1e-12)
        total += expected
    np.testing.assert_allclose(mixer.outcome(), total / 60, rtol=1e-10)


def test_without_smoothing_alpha_survives_underflow(doremi):
    mixer = doremi(reweight_eps=0.0)
    for score in [(2000.0, 0.0)] * 2 + [(0.0, 4000.0)]:
        mixer.mix(None, 1, context=context(statistics([[s] for s in score], [[0.0]] * 2), count=2))
    assert weights(mixer).tolist() == pytest.approx([0.5, 0.5], abs=1e-9)


def test_invariants(doremi):
    score = np.array([0.3, 1.1, 0.0, 2.0])

    def after(values: np.ndarray) -> np.ndarray:
        mixer = doremi()
        mixer.mix(None, 1, context=context(statistics([[v] for v in values], [[0.0]] * 4), count=4))
        return weights(mixer)

    np.testing.assert_allclose(after(score + 5), after(score), rtol=1e-13)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(after(score[order]), after(score)[order], rtol=1e-13)


def test_the_split_over_ranks_and_micro_batches_does_not_matter(doremi):
    """Sums are what is reduced; a mean of the parts' means would differ, as D3 lies unevenly over them."""
    parts = [
        statistics((p1, p2, p3), (r1, r2, r3))
        for p1, p2, p3, r1, r2, r3 in (
            (PROXY[0], PROXY[1][:1], PROXY[2][:3], REFERENCE[0], REFERENCE[1][:1], REFERENCE[2][:3]),
            ([], PROXY[1][1:], PROXY[2][3:], [], REFERENCE[1][1:], REFERENCE[2][3:]),
        )
    ]
    tokens, excess = np.sum([p.tokens for p in parts], axis=0), np.sum([p.excess for p in parts], axis=0)
    mixer = doremi()
    zeros = np.zeros(3)
    mixer.mix(None, 1, context=context(Statistics(1, tokens, zeros, zeros, zeros, excess, zeros)))
    np.testing.assert_allclose(weights(mixer), FIRST, atol=1e-9)


def test_one_domain(doremi):
    mixer = doremi()
    assert mixer.mix(None, 1, context=context(statistics([[3.0]], [[1.0]]), count=1)).tolist() == [1.0]
    assert weights(mixer).tolist() == pytest.approx([1.0], abs=1e-15)
    assert mixer.record()["effective_sample_share"] == pytest.approx(1, abs=1e-12)


def test_no_step_moves_nothing(doremi):
    mixer = doremi()
    mixer.mix(None, 1, context=context(statistics()))
    before = mixer.state()
    mixer.mix(None, 1, context=context(None))
    assert mixer.state() == before


@pytest.mark.parametrize("absent", ["hold", "zero", "official"])
def test_resumed_equals_uninterrupted_to_the_bit(doremi, absent):
    rng = np.random.default_rng(1)
    batches = [statistics(rng.gamma(2, 1, (3, 4)).tolist(), np.ones((3, 4)).tolist()) for _ in range(7)]
    batches[4] = statistics((*PROXY[:2], []), (*REFERENCE[:2], []))

    def go_on(mixer: Doremi, found: Sequence[Statistics]) -> Doremi:
        for one in found:
            mixer.mix(None, 1, context=context(one, initial=(0.2, 0.3, 0.5)), has_initial=True, vocabulary=9)
        return mixer

    whole = go_on(doremi(absent=absent), batches)
    first, second = go_on(doremi(absent=absent), batches[:3]), doremi(absent=absent)
    second.restore(json.loads(json.dumps(first.state())))
    go_on(second, batches[3:])
    assert second.state() == whole.state()
    assert second.record() == whole.record()
    np.testing.assert_array_equal(second.outcome(), whole.outcome())


def test_the_reference_must_be_there(tmp_path):
    with pytest.raises(ValidationError, match="reference_model_path"):
        Doremi.Params.model_validate({})
    with pytest.raises(ValidationError, match="a folder that exists"):
        Doremi.Params(reference_model_path=str(tmp_path / "none"))


def test_a_domain_that_is_never_drawn_is_refused(doremi):
    with pytest.raises(ConfigError, match="d1"):
        doremi().mix(None, 0, context=context(None, initial=(0.5, 0.0, 0.5)), has_initial=True)


def test_official_start_needs_the_vocabulary(doremi):
    with pytest.raises(ConfigError, match="vocabulary"):
        doremi(absent="official").mix(None, 0, context=context(None))
