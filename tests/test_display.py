"""Progress: one bar in a terminal, whatever goes on; a line from time to time in a log; batches count at once."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dataflex import display
from dataflex.access.policy_source import _shown
from dataflex.access.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[io.StringIO]:
    caplog.set_level(logging.INFO, "dataflex")
    text = io.StringIO()
    monkeypatch.setattr(display._display, "console", Console(file=text, force_terminal=True, width=100))
    yield text
    display.close()


def test_the_time_left_is_by_the_mean_speed_so_far(clock: list[float]) -> None:
    with display.showing("features", 100, done=20) as task:
        assert task.left == "-:--"
        clock[0] += 30
        task.update(50)
        assert task.left == "0:50"  # 30 in 30 s, 50 are left
        clock[0] += 30
        task.update(60)
        assert task.left == "1:00"  # 40 in 60 s, 40 are left
        clock[0] += 36_000
        assert task.left == "10:01:00"
        task.update(1000)
        assert (task.done, task.left) == (100, "0:00")


def test_rows_that_are_there_say_nothing_of_the_speed(clock: list[float]) -> None:
    progress = Progress()
    with progress.showing(100):
        task = progress._task
        assert task is not None
        progress.skip(80)
        assert (task.done, task.left) == (80, "-:--")
        clock[0] += 20
        progress.advance(10, 1000)
        assert (task.done, task.note, task.left) == (90, "0.5 rows/s, 50 tokens/s", "0:20")


def test_a_log_hears_of_it_from_time_to_time(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dataflex")
    with display.showing("features", 200) as task:
        for second in range(1, 101):
            clock[0] = 100.0 + second
            task.update(second, note="1 rows/s")
    lines = [record.getMessage() for record in caplog.records if record.name == "dataflex.display"]
    assert lines == [f"features: {n} of 200, 1 rows/s, {display._clock(200 - n)} left" for n in (30, 60, 90)]


def test_what_is_over_soon_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dataflex")
    with display.showing("features", 2) as task:
        task.update(2)
    assert not caplog.records


def test_one_bar_shows_all_that_goes_on(terminal: io.StringIO) -> None:
    with display.showing("update 2", 7, done=3):
        with display.showing("features [of the pool]", 600) as task:
            task.update(600, note="46 rows/s")
            bar = display._display._bar
            assert bar is not None
            assert [each.description for each in bar.tasks] == ["update 2", "features [of the pool]"]
            bar.refresh()
        assert [each.description for each in bar.tasks] == ["update 2"]
    assert display._display._bar is None
    assert "600/600" in terminal.getvalue()
    assert "46 rows/s" in terminal.getvalue()
    assert "[of the pool]" in terminal.getvalue()


def test_nothing_is_drawn_any_more_once_it_is_closed(terminal: io.StringIO) -> None:
    task = display.begin("training", 7)
    display.close()
    before = terminal.getvalue()
    task.update(3)
    display.end(task)
    assert terminal.getvalue() == before


def test_other_processes_show_nothing(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflex.distributed.is_main", lambda: False)
    with display.showing("features", 7) as task:
        task.update(3)
    assert terminal.getvalue() == ""


def test_who_asked_for_quiet_has_it(terminal: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "dataflex")
    with display.showing("features", 7) as task:
        task.update(7)
    assert terminal.getvalue() == ""


def test_what_is_printed_meanwhile_stays_on_standard_output(
    terminal: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    with display.showing("features", 7):
        print("a component's own words")
    assert capsys.readouterr().out == "a component's own words\n"
    assert "own words" not in terminal.getvalue()


def test_batches_count_when_they_are_done_and_once() -> None:
    progress = Progress()
    seen: list[Any] = []
    with progress.showing(100):
        assert progress._task is not None
        progress.skip(10)
        for rows in (20, 30):
            progress.batch(rows, 10 * rows)
            seen.append(progress._task.done)
        progress.advance(50, 500)  # the cell that these were
        progress.advance(40, 400)  # one whose source tells of no batches
        seen.append(progress._task.done)
        assert "tokens/s" in progress._task.note
    assert seen == [30, 60, 100]
    progress.batch(5, 5)  # outside, as where a run measures something


def test_responses_count_as_they_are_written() -> None:
    seen = []
    groups = [[(0, np.zeros(2)), (1, np.zeros(1))], [(2, np.zeros(3))]]
    for group in _shown(iter(groups), 3):
        task = display._display._open[-1]
        seen.append((task.what, task.done, task.total))
        assert group in groups
    assert seen == [("responses", 0, 3), ("responses", 2, 3)]
    assert display._display._open == []
