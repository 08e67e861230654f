"""Online data mixing: vectors worked out by hand, a plain reference of each variant, missing signals, resumption."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dataflex.errors import ConfigError, DataflexError
from dataflex.mixers.base import Domains, MixContext, Statistics
from dataflex.mixers.odm import Odm

Losses = dict[int, float]  # domain, from 0 -> mean loss


class Run:
    """A mixer and what a run tells it: one call is one update."""

    def __init__(self, count: int, step: int = 0, initial: Any = None, **params: Any):
        rows = np.arange(1, count + 1) * 100
        self.domains = Domains(tuple(f"d{i}" for i in range(count)), rows, rows * 50)
        self.initial = np.full(count, 1 / count) if initial is None else np.array(initial, dtype=np.float64)
        self.proportions = self.initial
        self.mixer = Odm(Odm.Params(**params))
        self.step, self.update = step, 0

    def mix(self, statistics: Statistics) -> list[float]:
        given = MixContext(self.domains, self.initial, self.proportions, statistics, self.step, self.update, 0, {})
        self.proportions = self.mixer.mix(None, self.step, context=given)
        self.update += 1
        assert self.proportions.sum() == pytest.approx(1, abs=1e-14)
        assert (self.proportions >= 0).all()
        return self.proportions.tolist()

    def begin(self) -> list[float]:
        return self.mix(Statistics.zeros(len(self.initial)))

    def __call__(self, losses: Losses, steps: int = 1) -> list[float]:
        self.step += steps
        return self.mix(seen(len(self.initial), losses, steps))


def seen(count: int, losses: Losses, steps: int = 1, tokens: float = 64.0) -> Statistics:
    given = Statistics.zeros(count)
    for domain, loss in losses.items():
        given.tokens[domain], given.loss[domain] = tokens, loss * tokens
        given.groups[domain], given.group_loss[domain] = 2, 2 * loss
    return replace(given, steps=steps)


def ran(observations: Sequence[Losses], count: int = 3, step: int = 0, **given: Any) -> list[list[float]]:
    run = Run(count, step, **given)
    return [run.begin(), *(run(losses) for losses in observations)]


EVERY = {0: 2.0, 1: 3.0, 2: 2.5}
GAPS: list[Losses] = [{0: 2.0}, {1: 3.0}, {0: 1.9, 2: 2.5}, {1: 2.8}, {2: 2.4}]


def test_paper_vectors() -> None:
    found = ran([EVERY] * 5, variant="paper")
    for proportions in found[:3]:
        assert proportions == pytest.approx([1 / 3] * 3, abs=1e-15)
    assert found[3] == pytest.approx((0.3292718414, 0.3375822146, 0.333145944), abs=1e-9)
    assert found[4] == pytest.approx((0.3239928272, 0.3431317864, 0.3328753864), abs=1e-9)
    assert found[5] == pytest.approx((0.3200543255, 0.3472126852, 0.3327329893), abs=1e-9)


def test_paper_vectors_with_gaps() -> None:
    run = Run(3, variant="paper")
    found = [run.begin(), *(run(losses) for losses in GAPS)]
    assert found[3] == pytest.approx((0.3353046543, 0.3330918597, 0.331603486), abs=1e-9)
    assert found[4] == pytest.approx((0.331813764, 0.3426868262, 0.3254994098), abs=1e-9)
    assert run.mixer.record()["estimates"] == pytest.approx((1.11, 1.6506089548, 1.4123285259), abs=1e-9)


def test_official_vectors_by_global_steps() -> None:
    run = Run(3, 2000, start="zeros")
    run.begin()
    found = [run(one) for one in ({0: 2.0, 1: 3.0}, {2: 2.5}, {0: 1.9, 1: 2.8, 2: 2.4})]
    assert found[0] == pytest.approx((0.2715547296, 0.7149171315, 0.0135281389), abs=1e-9)
    assert found[1] == pytest.approx((0.1922885322, 0.4994550739, 0.3082563938), abs=1e-9)
    assert found[2] == pytest.approx((0.1967136239, 0.4877320492, 0.3155543269), abs=1e-9)


def test_exp3_vectors() -> None:
    found = ran([EVERY] * 5, variant="exp3")
    assert found[4] == pytest.approx((0.327425157, 0.3396475709, 0.3329272722), abs=1e-9)
    assert found[5] == pytest.approx((0.3199731178, 0.3476694736, 0.3323574086), abs=1e-9)


def reference(
    variant: str,
    start: str,
    observations: Sequence[Losses],
    count: int,
    step: int,
    a: float,
    scale: float,
    floor: float,
) -> list[list[float]]:
    """Plain loops; every update is one step, none before them."""
    estimate: list[float | None] = [0.0 if start == "zeros" else None] * count
    p, previous, found = [1 / count] * count, 1 / count, []
    for update, losses in enumerate(observations):
        for d, loss in losses.items():
            reward = {"official": math.exp(loss), "paper": scale * loss / p[d], "exp3": scale * loss / 10 / p[d]}[
                variant
            ]
            old = estimate[d]
            if old is None:
                estimate[d] = reward
            elif variant == "exp3":
                estimate[d] = old + reward
            else:
                estimate[d] = a * old + (1 - a) * reward
        known = [r for r in estimate if r is not None]
        filled = [sum(known) / len(known) if r is None else r for r in estimate]
        t = update + 2 if variant == "paper" else step + update + 1
        epsilon = max(floor, min(1 / count, math.sqrt(math.log(count) / (count * t))))
        top = max(filled)
        weights = filled if variant == "official" else [math.exp(previous * (r - top)) for r in filled]
        p = [(1 - count * epsilon) * w / math.fsum(weights) + epsilon for w in weights]
        p = [one / math.fsum(p) for one in p]
        previous = epsilon
        found.append(p)
    return found


observed = st.lists(st.dictionaries(st.integers(0, 3), st.floats(0.01, 12), min_size=1), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(observed, st.sampled_from([0, 40, 3000]), st.sampled_from([0.5, 0.9]), st.sampled_from([0.0, 0.05]))
@pytest.mark.parametrize(
    ("variant", "start", "scale"),
    [
        ("official", "zeros", 1.0),
        ("official", "warmup_losses", 1.0),
        ("paper", "zeros", 1.0),
        ("paper", "warmup_losses", 15.0),
        ("exp3", "zeros", 2.0),
    ],
)
def test_every_variant_is_the_plain_reference(
    variant: str, start: str, scale: float, observations: list[Losses], step: int, a: float, floor: float
) -> None:
    alpha = {} if variant == "exp3" else {"alpha": a}
    found = ran(
        observations,
        4,
        step,
        variant=variant,
        start=start,
        reward_scale=scale,
        min_exploration_rate=floor,
        **alpha,
    )
    expected = reference(variant, start, observations, 4, step, a, scale, floor)
    assert np.array(found[1:]) == pytest.approx(np.array(expected), abs=1e-9)
    t = np.arange(len(observations)) + (2 if variant == "paper" else step + 1)
    least = np.maximum(floor, np.minimum(1 / 4, np.sqrt(np.log(4) / (4 * t))))
    assert (np.array(found[1:]).min(1) >= least - 1e-12).all()


VARIANTS = ("official", "paper", "exp3")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_the_domains_does_not_matter(variant: str) -> None:
    order = [2, 0, 1]
    plain = ran(GAPS, step=100, variant=variant)
    turned = ran([{order.index(d): loss for d, loss in one.items()} for one in GAPS], step=100, variant=variant)
    assert np.array(turned) == pytest.approx(np.array(plain)[:, order], abs=1e-13)


def test_a_shift_of_all_losses_leaves_the_official_proportions() -> None:
    lower, higher = ran(GAPS, step=500), ran([{d: loss + 3 for d, loss in one.items()} for one in GAPS], step=500)
    assert np.array(lower) == pytest.approx(np.array(higher), abs=1e-13)


def test_a_nat_is_a_factor_of_e_in_official() -> None:
    p = np.array(ran([{0: 2.0, 1: 3.0}] * 300, 2, 10**7)[-1])
    epsilon = math.sqrt(math.log(2) / (2 * (10**7 + 300)))
    assert (p[1] - epsilon) / (p[0] - epsilon) == pytest.approx(math.e, rel=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_domain_has_everything(variant: str) -> None:
    assert ran([{0: 2.0}] * 3, 1, variant=variant, min_exploration_rate=0.5) == [[1.0]] * 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_begins_on_its_initial_proportions(variant: str) -> None:
    run = Run(3, initial=(0.5, 0.3, 0.2), variant=variant)
    assert run.begin() == [0.5, 0.3, 0.2]
    assert Run(3, variant=variant, initial_proportions={"d2": 2, "d0": 7, "d1": 1}).begin() == [0.7, 0.1, 0.2]
    assert Run(3, variant=variant, initial_proportions=[7, 1, 2]).begin() == [0.7, 0.1, 0.2]


# What the reference implementation of DataFlex gets wrong, each in a run where it shows.


def test_every_domain_is_paid_its_own_loss() -> None:
    run = Run(3, 2000)
    run.begin()
    run({0: 1.0, 1: 3.0, 2: 2.0})
    assert run.mixer.record()["rewards"] == pytest.approx([math.e, math.e**3, math.e**2], abs=1e-12)


@pytest.mark.parametrize("batches", ["mixed", "single"])
def test_all_micro_batches_of_all_steps_count(batches: str) -> None:
    run = Run(2, 2000, batches=batches)
    run.begin()
    run.step += 3
    # domain 0: micro-batches of 10 tokens at 1 nat and 30 at 3; domain 1: one of 5 tokens at 2
    many = replace(
        Statistics.zeros(2),
        steps=3,
        tokens=np.array([40.0, 5.0]),
        loss=np.array([100.0, 10.0]),
        groups=np.array([2.0, 1.0]),
        group_loss=np.array([4.0, 2.0]),
    )
    run.mix(many)
    mean = {"mixed": 2.5, "single": 2.0}[batches]
    assert run.mixer.record()["rewards"] == pytest.approx([math.exp(mean), math.exp(2)], abs=1e-12)
    assert run.mixer.whole_batches == (batches == "single")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batches", ["mixed", "single"])
def test_a_reward_does_not_depend_on_how_a_batch_is_split(variant: str, batches: str) -> None:
    found = []
    for split in (1, 4, 16):  # tokens and micro-batches as often, at the same loss
        run = Run(3, 50, variant=variant, batches=batches)
        run.begin()
        for one in GAPS:
            run.step += 1
            statistics = seen(3, one)
            sums = {n: getattr(statistics, n) * split for n in ("tokens", "loss", "groups", "group_loss")}
            run.mix(replace(statistics, **sums))
        found.append(run.proportions)
    assert found[1] == pytest.approx(found[0], abs=1e-14)
    assert found[2] == pytest.approx(found[0], abs=1e-14)


def test_gibbs_exponents_are_not_clipped() -> None:
    run = Run(2, variant="paper", reward_scale=400.0)
    run.begin()
    for _ in range(30):
        run({0: 1.0, 1: 8.0})
    epsilon = run.mixer.record()["epsilon"]
    rest = (run.proportions[0] - epsilon) / (1 - 2 * epsilon)
    assert rest < math.exp(-20)  # e^-5 is where the reference stops


def test_enormous_estimates_do_not_overflow() -> None:
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(ran([{0: 1.0, 1: 8.0}] * 9, 2, 50, variant="exp3", reward_scale=1e12)).all()
        assert np.isfinite(ran([{0: 1.0, 1: 5000.0}] * 9, 2, 50)).all()


def test_a_loss_beyond_guessing_counts_no_more_than_guessing() -> None:
    assert ran([{0: 2.0, 1: 5000.0}], 2, 50) == ran([{0: 2.0, 1: 16.0}], 2, 50)
    assert ran([{0: 2.0, 1: 13.2}], 2, 50) != ran([{0: 2.0, 1: 16.0}], 2, 50)


@pytest.mark.parametrize(("count", "floor"), [(2, 0.5), (34, 0.03), (22, 0.05)])
def test_a_floor_that_leaves_nothing_is_refused(count: int, floor: float) -> None:
    run = Run(count, min_exploration_rate=floor)
    expected = f"min_exploration_rate: found {floor} for {count} domains.*expected less than {1 / count:.4g}"
    with pytest.raises(ConfigError, match=expected):
        run.begin()
    assert len(run.mixer.check(run.domains.names, "rows")) == 1


def test_there_is_no_floor_by_default_and_no_scale() -> None:
    params = Odm.Params()
    assert (params.min_exploration_rate, params.reward_scale, params.alpha, params.warmup_steps) == (0, 1, 0.9, 0)
    assert Odm.draws == "random"


# Missing signals


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unseen_domain_keeps_its_estimate(variant: str) -> None:
    run = Run(3, 200, variant=variant)
    run.begin()
    run(EVERY)
    before = run.mixer.record()["estimates"]
    run({1: 2.0})
    after = run.mixer.record()
    assert [after["estimates"][d] for d in (0, 2)] == [before[d] for d in (0, 2)]
    assert after["estimates"][1] != before[1]
    assert [after["rewards"][d] for d in (0, 2)] == [None, None]


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("warmup_steps", [0, 100])
def test_no_signal_at_all_is_an_error(steps: int, warmup_steps: int) -> None:
    run = Run(3, warmup_steps=warmup_steps)
    run.begin()
    run(EVERY)
    run.step += 1
    with pytest.raises(DataflexError, match=r"no loss of any domain.*up to step 2"):
        run.mix(replace(Statistics.zeros(3), steps=steps))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("warmup_steps", [0, 100])
def test_a_step_of_losses_that_are_not_finite_changes_nothing(variant: str, warmup_steps: int) -> None:
    run = Run(3, 200, variant=variant, warmup_steps=warmup_steps)
    run.begin()
    before = run(EVERY)
    state = run.mixer.state()
    run.step += 1
    found = run.mix(replace(Statistics.zeros(3), steps=1, nonfinite=np.array([4.0, 3.0, 0.0])))
    assert found == before
    assert run.mixer.state() == state
    assert run(EVERY)


def test_a_warm_up_without_any_loss_is_an_error() -> None:
    with pytest.raises(DataflexError, match="no loss of any domain"):
        Run(3, 20).mix(replace(Statistics.zeros(3), steps=20))


def test_a_nonfinite_mean_is_not_seen() -> None:
    run = Run(2, 100)
    run.begin()
    run.step += 1
    broken = seen(2, {0: 1.0, 1: 2.0})
    broken.loss[1] = np.nan
    run.mix(broken)
    assert run.mixer.record()["rewards"] == [math.e, None]


def test_a_domain_never_seen_has_the_mean_estimate_unless_estimates_start_at_zeros() -> None:
    assert ran([{0: 2.0, 1: 2.0}], 3, 2000)[1] == pytest.approx([1 / 3] * 3, abs=1e-12)
    starved = ran([{0: 2.0, 1: 2.0}], 3, 2000, start="zeros")[1]
    assert starved[2] == pytest.approx(math.sqrt(math.log(3) / (3 * 2001)), abs=1e-12)


def test_paper_needs_a_share_to_divide_by() -> None:
    run = Run(2, 30, initial=(1.0, 0.0), variant="paper")
    run.begin()
    with pytest.raises(DataflexError, match="losses of d1 whose proportion was 0"):
        run({1: 2.0})


# The warm-up


def test_estimates_begin_at_the_losses_of_the_run_s_warm_up() -> None:
    run = Run(3, 1980, initial=(0.5, 0.3, 0.2))
    p = run({0: 1.0, 1: 3.0, 2: 2.0}, steps=20)  # the run's own warm-up: update 0 after 20 steps
    e = np.exp([1.0, 3.0, 2.0])
    epsilon = math.sqrt(math.log(3) / (3 * 2000))
    assert p == pytest.approx(((1 - 3 * epsilon) * e / e.sum() + epsilon).tolist(), abs=1e-12)
    assert run.mixer.record()["updates"] == 0
    run({0: 1.0})
    assert run.mixer.record()["estimates"] == pytest.approx(e.tolist(), abs=1e-12)


def test_estimates_at_zeros_look_away_from_the_warm_up() -> None:
    run = Run(3, 1980, initial=(0.5, 0.3, 0.2), start="zeros")
    assert run({0: 1.0, 1: 3.0, 2: 2.0}, steps=20) == [0.5, 0.3, 0.2]
    run({0: 1.0})
    assert run.mixer.record()["estimates"] == pytest.approx([0.1 * math.e, 0, 0], abs=1e-12)


def test_estimates_begin_at_the_losses_of_the_mixer_s_own_warm_up() -> None:
    run = Run(3, initial=(0.5, 0.3, 0.2), warmup_steps=3)
    assert [run.begin(), run({0: 2.0}), run({0: 4.0}), run({1: 3.0})] == [[0.5, 0.3, 0.2]] * 4
    run({1: 1.0})
    e = [math.exp(3), 0.9 * math.exp(3) + 0.1 * math.e, 0.0]
    assert run.mixer.record()["estimates"] == pytest.approx(e, abs=1e-12)
    assert run.proportions[2] == pytest.approx(1 / 3, abs=0.1)


def test_a_warm_up_is_weighed_by_tokens_and_goes_before_stored_losses() -> None:
    run = Run(3, warmup_steps=2, initial_losses={"d0": 9.0, "d1": 1.5, "d2": 2.5})
    run.begin()
    for loss, tokens in ((2.0, 10.0), (4.0, 30.0)):
        run.step += 1
        run.mix(seen(3, {0: loss}, tokens=tokens))
    run({1: 1.5, 2: 2.5})
    assert run.mixer.record()["estimates"] == pytest.approx(np.exp([3.5, 1.5, 2.5]).tolist(), abs=1e-12)


def test_in_paper_a_start_is_what_the_average_tends_to() -> None:
    run = Run(2, 10, initial=(0.8, 0.2), variant="paper", start="warmup_losses", reward_scale=3.0)
    run({0: 2.0, 1: 3.0}, steps=10)
    assert run.mixer.record()["estimates"] == pytest.approx([3 * 2 / 0.8, 3 * 3 / 0.2], abs=1e-12)


def test_stored_losses_may_name_some_domains_and_a_run_still_begins_on_its_proportions() -> None:
    run = Run(3, 2000, initial=(0.5, 0.3, 0.2), initial_losses={"d0": 2.0, "d2": 3.0})
    assert run.begin() == [0.5, 0.3, 0.2]
    run({0: 2.0})
    e = np.array([math.exp(2), (math.exp(2) + math.exp(3)) / 2, math.exp(3)])
    assert run.proportions == pytest.approx(((e / e.sum()) * (1 - 3 * EPSILON) + EPSILON).tolist(), abs=1e-12)


EPSILON = math.sqrt(math.log(3) / (3 * 2001))


# Parameters


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"variant": "official", "reward_scale": 15}, "no reward_scale"),
        ({"variant": "exp3", "alpha": 0.5}, "no alpha"),
        ({"variant": "exp3", "start": "warmup_losses"}, "no start"),
        ({"variant": "exp3", "initial_losses": {"d0": 1.0}}, "no initial_losses"),
        ({"variant": "paper", "initial_losses": {"d0": 1.0}}, "no initial_losses"),
        ({"start": "zeros", "initial_losses": {"d0": 1.0}}, "no initial_losses"),
        ({"initial_losses": {"d0": -1.0}}, "0 or more"),
        ({"reference": "live"}, "reference_model_path beside"),
        ({"reference_model_path": "nowhere"}, "a folder that exists"),
        ({"reference_model_path": ".", "batches": "single"}, "batches: mixed"),
        ({"reference_model_path": ".", "initial_losses": {"d0": 1.0}}, "no initial_losses"),
        ({"alpha": 1.0}, "less than 1"),
        ({"eval_samples": 3}, "Extra inputs"),
    ],
)
def test_parameters_that_cannot_act_are_refused(params: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Odm.Params(**params)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"initial_proportions": [1, 2]}, "initial_proportions: found 2 numbers; expected 3"),
        ({"initial_proportions": {"d0": 1, "d1": 1, "x": 1}}, "found no domain 'x'.*\n.*nothing for d2"),
        ({"initial_losses": {"d0": 1.0, "d9": 2.0}}, "initial_losses: found no domain 'd9'"),
    ],
)
def test_parameters_that_do_not_fit_the_domains_are_refused(params: dict[str, Any], expected: str) -> None:
    run = Run(3, **params)
    with pytest.raises(ConfigError, match=expected):
        run.begin()


# Resumption


@pytest.mark.parametrize("cut", range(7))
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"warmup_steps": 3},
        {"start": "zeros"},
        {"variant": "paper"},
        {"variant": "exp3", "warmup_steps": 2},
    ],
)
def test_a_restored_run_goes_on_bit_for_bit(params: dict[str, Any], cut: int) -> None:
    losses = [*GAPS, EVERY]
    whole = ran(losses, **params)
    run, found = Run(3, **params), []
    for number in range(7):
        if number == cut:
            saved = json.loads(json.dumps(run.mixer.state()))
            run.mixer = Odm(Odm.Params(**params))
            run.mixer.restore(saved)
            assert run.mixer.state() == saved
        found.append(run(losses[number - 1]) if number else run.begin())
    assert found == whole


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found a state of \['x'\]"):
        Odm(Odm.Params()).restore({"x": 1})


def test_a_record_is_plain() -> None:
    run = Run(3, 20)
    run.begin()
    run({0: 2.0})
    found = json.loads(json.dumps(run.mixer.record(), allow_nan=False))
    assert sorted(found) == ["epsilon", "estimates", "rewards", "updates"]
