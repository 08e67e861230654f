"""What no selection can do anything with is refused before anything is computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.errors import CoverageError
from dataflex.features.spec import LossSpec
from dataflex.pipelines.director import RoundDirector
from dataflex.schedule import Schedule
from dataflex.selectors.base import Need
from tests.held import pool


def director(targets: dict[str, Any], needs: list[Need], steps: int = 1) -> RoundDirector:
    """A director whose run has ten rows that can be chosen, before its first step."""
    made = RoundDirector(SimpleNamespace(schedule=Schedule(0, steps, 1), train_type="dynamic_select"))
    rounds = [SimpleNamespace(steps=steps)]
    made.run = SimpleNamespace(  # type: ignore[assignment]
        method=SimpleNamespace(chooses_distinct=True),
        updates=rounds,
        trainer=SimpleNamespace(global_batch=4),
        needs=needs,
        targets=targets,
        eligible=np.arange(10),
    )
    return made


def test_targets_without_a_label() -> None:
    targets = {"good": pool(3), "empty": pool(2, np.zeros(2, np.int32))}
    with pytest.raises(CoverageError, match="target set empty: none of its 2 rows has a supervised token"):
        director(targets, [Need(LossSpec(), "targets")])._refuse_hopeless()
    director(targets, [Need(LossSpec(), "train")])._refuse_hopeless()  # a method that does not look at them


def test_more_rows_than_there_are() -> None:
    director({}, [Need(LossSpec(), "train")], steps=2)._refuse_hopeless()
    with pytest.raises(CoverageError, match=r"an update needs 12 rows \(3 steps of 4\), found 10"):
        director({}, [Need(LossSpec(), "train")], steps=3)._refuse_hopeless()
