"""Rounds divide a run as documented: their steps add up, each is of the documented kind, and they stay as they are."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.schedule import Round, Schedule


def documented_total(s: Schedule, rows: int, batch: int) -> int:
    if s.train_step > 0:
        return s.train_step
    if s.update_times > 0 and s.update_step > 0:
        return math.ceil(s.num_train_epochs * (s.warmup_step + s.update_step * s.update_times))
    return math.ceil(s.num_train_epochs * math.ceil(rows / batch))


def kind_at(s: Schedule, step: int, epoch_steps: int) -> tuple[str, bool]:
    """Whether a step is warm-up, and whether a decision falls on it, by the documented rule on `step % epoch`."""
    within = step % epoch_steps
    if within < s.warmup_step:
        return "warmup", within == 0
    since = within - s.warmup_step
    return "update", since == 0 or (s.update_step > 0 and since % s.update_step == 0)


schedules = st.builds(
    Schedule,
    warmup_step=st.integers(0, 12),
    update_step=st.integers(0, 9),
    update_times=st.integers(-2, 5),
    train_step=st.integers(0, 50),
    num_train_epochs=st.sampled_from([0.3, 0.5, 1.0, 1.1, 2.0, 2.75]),
)


@given(schedules, st.integers(1, 200), st.integers(1, 16))
def test_total_is_the_documented_formula(schedule, rows, batch):
    assert schedule.total(rows=rows, batch=batch) == documented_total(schedule, rows, batch)


@given(schedules, st.integers(1, 200), st.integers(1, 16))
def test_rounds_partition_the_run(schedule, rows, batch):
    rounds = schedule.rounds(rows=rows, batch=batch)
    assert [r.number for r in rounds] == list(range(len(rounds)))
    assert all(r.steps >= 1 for r in rounds)
    steps = [step for r in rounds for step in range(r.first_step, r.first_step + r.steps)]
    assert steps == list(range(schedule.total(rows=rows, batch=batch)))


@given(schedules, st.integers(1, 200), st.integers(1, 16))
def test_every_step_is_of_the_documented_kind(schedule, rows, batch):
    epoch_steps = schedule.flex_steps(rows=rows, batch=batch)
    starts = {r.first_step: r for r in schedule.rounds(rows=rows, batch=batch)}
    current: Round | None = None
    for step in range(schedule.total(rows=rows, batch=batch)):
        kind, decides = kind_at(schedule, step, epoch_steps)
        assert (step in starts) == decides
        current = starts.get(step, current)
        assert current is not None
        assert (current.kind, current.epoch) == (kind, step // epoch_steps)
        assert (current.update == 0) == (kind == "warmup")


def test_golden_rounds():
    rounds = Schedule(warmup_step=10, update_step=10, update_times=2, num_train_epochs=1.5).rounds()
    assert [(r.kind, r.first_step, r.steps, r.epoch, r.update) for r in rounds] == [
        ("warmup", 0, 10, 0, 0),
        ("update", 10, 10, 0, 1),
        ("update", 20, 10, 0, 2),
        ("warmup", 30, 10, 1, 0),
        ("update", 40, 5, 1, 1),
    ]


@pytest.mark.parametrize(
    ("schedule", "rows", "batch", "text"),
    [
        (Schedule(10, 10, 2), None, None, "30 optimizer steps = 1 epoch x (10 warm-up + 2 updates x 10)"),
        (Schedule(0, 5, 1, 0, 2.0), None, None, "10 optimizer steps = 2 epochs x (1 update x 5)"),
        (Schedule(3, 4, -1), 100, 10, "10 optimizer steps = 1 epoch x (3 warm-up, then an update every 4 steps)"),
        (Schedule(3), None, None, "ceil(1 x ceil(rows / global batch)) optimizer steps = 1 epoch x "),
        (Schedule(0, 0, 1, 7), None, None, "7 optimizer steps (train_step): one selection for the rest"),
    ],
)
def test_describe(schedule, rows, batch, text):
    assert schedule.describe(rows, batch).startswith(text)


def test_dataset_sized_schedule_needs_the_dataset():
    schedule = Schedule(warmup_step=2)
    assert schedule.needs_rows
    with pytest.raises(ValueError, match="number of rows"):
        schedule.total()
