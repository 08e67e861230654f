"""Responses and rewards that a store keeps come back as they were, and what cannot be kept is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.access.responses import ResponseStore, RewardStore
from dataflex.errors import DataflexError
from dataflex.features.generation import Job
from dataflex.rewards import Reward
from dataflex.stores.root import StoreRoot


class Scripted(Reward):
    """A reward whose scores are given."""

    def __init__(self, *scores: float | None):
        super().__init__(None)
        self.scores = list(scores)

    def score(self, prompts: Any, responses: Any, references: Any) -> list[float | None]:
        return [self.scores.pop(0) for _ in responses]

    def identity(self) -> dict[str, Any]:
        return {"type": "scripted"}


def test_rewards_are_kept_once_and_for_all(tmp_path: Path) -> None:
    kept = RewardStore(StoreRoot(tmp_path), {}, Scripted(1.0, None, 3.0))
    columns = ["p", "p", "p"], ["a", "b", "a"], ["r", "r", "r"]
    first = kept.get(*columns)
    assert sorted(first[:2].tolist(), key=str) == [1.0, pytest.approx(np.nan, nan_ok=True)]
    np.testing.assert_array_equal(kept.get(*columns), first)
    np.testing.assert_array_equal(kept.get(["p"], ["a"], ["another reference"]), [3.0])
    assert kept.get([], [], []).shape == (0,)


@pytest.mark.parametrize("scores", [[math.nan, 1.0], [1.0, math.inf]])
def test_rewards_that_are_no_numbers_are_refused(tmp_path: Path, scores: list[float]) -> None:
    kept = RewardStore(StoreRoot(tmp_path), {}, Scripted(*scores))
    with pytest.raises(DataflexError, match=r"reward scripted: .* 1 of them not finite"):
        kept.get(["", ""], ["a", "b"], ["", ""])


def test_responses_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    kept = ResponseStore(StoreRoot(tmp_path), {}, 4)
    jobs = [Job(np.array([1]), "", b"k", c) for c in range(3)]
    written = [np.array([(1 << 24) - 1, 0, 7]), np.array([], np.int64), np.array([1, 2, 3, 4])]

    def generate(missing: Any) -> Any:
        yield [(i, written[job.sample]) for i, job in enumerate(missing)][::-1]

    for asked in (jobs[:2], jobs, jobs[::-1] + jobs):
        found = kept.get(asked, generate)
        assert [ids.tolist() for ids in found] == [written[job.sample].tolist() for job in asked]
    assert kept.get([], generate) == []
    written[0] = np.array([1 << 24])
    with pytest.raises(DataflexError, match="below 2\\^24"):
        kept.get([Job(np.array([1]), "", b"other", 0)], generate)
