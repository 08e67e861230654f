"""What online data mixing does where losses are missing, and what its estimates begin at after a warm-up."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dataflex.errors import DataflexError
from dataflex.mixers.base import Statistics
from tests.odm import EVERY, VARIANTS, Run, ran, seen


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
