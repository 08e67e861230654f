"""Domains that are used up, too small or empty: a mixing run goes on as asked, or is refused before its first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.errors import ConfigError, CoverageError
from dataflex.pipelines.mixing.domains import domains_of
from tests.workspace import mix


@pytest.mark.parametrize(
    ("mixture", "steps", "counts"),
    [
        ({"exhausted": "cycle"}, 6, (15, 6, 3)),
        ({"exhausted": "renormalise"}, 6, (8, 8, 8)),
        ({"exhausted": "renormalise", "passes": 1.5}, 6, (12, 8, 4)),
        ({"exhausted": "stop"}, 3, (7, 3, 2)),
    ],
)
def test_a_domain_that_is_used_up(
    workspace: Any, drawn: list[list[int]], mixture: dict[str, Any], steps: int, counts: tuple[int, ...]
) -> None:
    keys = {"component_name": "static", "init_mixture_proportions": [5, 2, 1]}
    summary = workspace.run("train", mix(workspace, "used", **keys, dataflex={"mixture": mixture}))
    assert summary["steps"] == steps
    found = np.bincount([row // 8 for rows in drawn for row in rows], minlength=3)
    assert found.sum() == 4 * steps
    assert np.abs(found - np.array(counts)).max() <= 1
    assert workspace.weights("used")


def test_what_cannot_be_filled_is_refused_before_training(workspace: Any, drawn: list[list[int]]) -> None:
    path = mix(
        workspace, "short", component_name="uniform", train_step=7, dataflex={"mixture": {"exhausted": "renormalise"}}
    )
    with pytest.raises(CoverageError, match="28 rows wanted, found 24"):
        workspace.run("train", path)
    assert not drawn


def test_constant_shares_are_held_against_the_rows_that_they_draw(workspace: Any, drawn: list[list[int]]) -> None:
    """A domain without a share has rows that never come: the run is refused at its first step, not at its last."""
    keys = {"component_name": "static", "init_mixture_proportions": [1, 1, 0], "train_step": 5}
    section = {"mixture": {"exhausted": "renormalise"}}
    with pytest.raises(CoverageError, match="20 rows wanted, found 16 within 1 passes"):
        workspace.run("train", mix(workspace, "short", **keys, dataflex=section))
    assert not drawn


def test_a_run_that_ends_early_tells_what_was_trained_on(workspace: Any, drawn: list[list[int]]) -> None:
    keys = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_steps": 1, "early_stopping_min_delta": 100.0}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_strategy": "steps"}
    path = mix(workspace, "early", component_name="uniform", save_steps=1, eval_dataset="target_words", **keys)
    summary = workspace.run("train", path)
    assert summary["steps"] == 2
    assert sum(summary["realised_rows"].values()) == 8


def test_a_domain_without_rows_is_refused() -> None:
    rows: Any = SimpleNamespace(names=("a", "b", "c"), dataset=np.array([0, 0, 1]), supervised=np.array([1, 0, 0]))
    with pytest.raises(ConfigError, match="found no row with a supervised token in b, c;"):
        domains_of(rows, ["a", "b", "c"], "rows")
    with pytest.raises(ConfigError, match="does not tell which rows are of d"):
        domains_of(rows, ["a", "d"], "rows")
    members, found = domains_of(rows, ["a"], "tokens")
    assert (members[0].tolist(), found.sizes.tolist()) == ([0], [1.0])


def test_nothing_to_train_on_is_an_error(workspace: Any) -> None:
    section = {"mixture": {"exhausted": "stop", "passes": 0.125}}
    with pytest.raises(CoverageError, match="the domains with a share are used up after 3 rows, at step 0"):
        workspace.run("train", mix(workspace, "nothing", component_name="uniform", dataflex=section))
