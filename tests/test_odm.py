"""Online data mixing follows its rule: vectors worked out by hand, a plain reference of each variant, resumption."""

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

from dataflex.mixers.base import Statistics
from dataflex.mixers.odm import Odm
from tests.odm import EVERY, GAPS, VARIANTS, Losses, Run, ran, seen


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
