"""The table of a comparison: means and intervals by hand, differences seed by seed, what is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.pipelines.comparing.arms import Arm
from dataflex.pipelines.comparing.estimate import Estimate
from dataflex.pipelines.comparing.records import records
from dataflex.pipelines.comparing.table import lines, shown
from dataflex.pipelines.comparing.trials import Trial

T_975 = {1: 12.706204736, 2: 4.302652730, 4: 2.776445105}
"""Student's t by degrees of freedom, from a printed table."""


def trial(folder: Path, arm: str, seed: int | None, loss: float | None, *shown: Any, reward: Any = None) -> Trial:
    """Return a run; without a loss it did not come to its end."""
    target, draw = (*shown, None, None)[:2]
    verb = "train" if seed is not None else "evaluate"
    place = folder / f"{arm}-{target}-{draw}-{seed}"
    place.mkdir()
    measured: dict[str, Any] = {"rows": 10, "tokens": 100, "loss": loss}
    measured |= {"reward": reward, "scored": 10} if reward is not None else {}
    about: dict[str, Any] = {
        "seconds": 3.0,
        "feature_seconds": 1.0,
        "computed": 5,
        "reused": 0,
        "gradients": 50,
        "steps": 8,
    }
    about |= {"gradients_per_chosen_row": 5.0, "test": {"new": measured}}
    (place / f"dataflex_{'summary' if seed is not None else 'evaluate'}.json").write_text(json.dumps(about))
    state = {"state": "interrupted" if loss is None else "finished"}
    (place / ("status.json" if seed is not None else "status_evaluate.json")).write_text(json.dumps(state))
    settings: Any = None
    return Trial(Arm(arm), verb, folder, place, {}, seed, target, draw, settings)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.7, 0.2], [5.0, 5.5, 4.0, 6.0, 5.25]])
def test_an_interval_is_that_of_students_t(values: list[float]) -> None:
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    found = Estimate.of(values)
    assert found is not None
    assert found.mean == pytest.approx(mean)
    assert found.half == pytest.approx(T_975[n - 1] * deviation / math.sqrt(n))


def test_no_interval_is_made_of_one_value_and_no_mean_of_nothing() -> None:
    assert Estimate.of([]) is None
    lost = Estimate.of([1.0, math.nan])
    assert lost is not None
    assert (math.isnan(lost.mean), lost.half, lost.count, str(lost)) == (True, None, 2, "nan")
    one = Estimate.of([1.5])
    assert one is not None
    assert (one.mean, one.half, str(one)) == (1.5, None, "1.5000")


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).standard_normal((2000, 4))
    found = [Estimate.of(row.tolist()) for row in draws]
    covered = np.mean([abs(e.mean) <= e.half for e in found if e is not None and e.half is not None])
    assert 0.93 < covered < 0.97


def test_differences_from_random_rows_are_taken_seed_by_seed(tmp_path: Path) -> None:
    """What a seed does to both cancels: the interval of the difference is narrower than that of either loss."""
    random = {1: 2.0, 2: 3.0, 3: 4.0}
    less = {1: 1.5, 2: 2.4, 3: 3.6}
    trials = [trial(tmp_path, "random", seed, loss, reward=0.5) for seed, loss in random.items()]
    trials += [trial(tmp_path, "less", seed, loss, "words", reward=0.5 + seed / 10) for seed, loss in less.items()]
    trials += [trial(tmp_path, "base", None, 6.0)]
    table = {line.arm: line for line in lines(trials, records(trials))}
    assert table["random"].gain is None
    gain = table["less"].gain
    assert gain is not None
    assert gain.half is not None
    expected = Estimate.of([-0.5, -0.6, -0.4])
    assert expected is not None
    assert expected.half is not None
    np.testing.assert_allclose([gain.mean, gain.half], [expected.mean, expected.half])
    loss = table["less"].loss
    assert loss is not None
    assert loss.half is not None
    assert gain.half < loss.half / 5
    base = table["base"]
    assert base.loss == Estimate(6.0, None, 1)
    assert base.gain is not None
    assert base.gain.mean == pytest.approx(3.0)
    reward = table["less"].reward_gain
    assert reward is not None
    assert reward.mean == pytest.approx(0.2)
    text = shown(list(table.values()))
    assert "| less " in text[3]
    assert "-0.5000 ± 0.2484" in text[3]
    assert "words" in text[3]


def test_seeds_of_training_and_of_targets_are_kept_apart(tmp_path: Path) -> None:
    losses = {(1, 0): 1.0, (1, 1): 3.0, (2, 0): 2.0, (2, 1): 4.0}
    trials = [trial(tmp_path, "less", seed, loss, "words", draw) for (seed, draw), loss in losses.items()]
    (line,) = lines(trials, records(trials))
    assert line.loss == Estimate.of([2.0, 3.0])
    assert line.by_draw == Estimate.of([1.5, 3.5])
    assert line.gain is None
    assert line.loss is not None
    assert line.loss.count == 2


def test_what_did_not_finish_is_counted_and_enters_nothing(tmp_path: Path) -> None:
    trials = [trial(tmp_path, "less", 1, 1.0), trial(tmp_path, "less", 2, None), trial(tmp_path, "random", 2, 2.0)]
    found = records(trials)
    assert len(found) == 2
    less, random = lines(trials, found)
    assert (less.missing, random.missing) == (1, 0)
    assert less.loss == Estimate(1.0, None, 1)
    assert less.gain is None  # no seed that both have
    assert "not finished" in shown([less, random])[0]
