"""Parameters of online data mixing that cannot act, or do not fit the domains, are refused; the defaults are plain."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dataflex.errors import ConfigError
from dataflex.mixers.odm import Odm
from tests.odm import Run


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
