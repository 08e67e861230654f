"""The state at the end of a warm-up is found by whoever has the same global batch, however it is divided."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from dataflex.stores.root import StoreRoot


def test_another_division_of_the_global_batch_takes_the_state(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dataflex")
    four = workspace.write("four", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert workspace.run("featurize", four)["computed"] == 69
    caplog.clear()
    two = workspace.write("two", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert workspace.run("featurize", two)["computed"] == 0
    assert "made by 1 process of 4 rows × 1: 3 steps of warm-up are done" in caplog.text
    one = workspace.write("one", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trained = workspace.run("train", one)
    assert trained["started_from"] is not None
    assert len(StoreRoot(workspace.folder / "store").states.infos()) == 1
    # One row more in a step is another state; and so is the same one for who asks for its own division.
    other = workspace.write("other", per_device_train_batch_size=5, gradient_accumulation_steps=1)
    assert workspace.run("featurize", other)["computed"] == 69
    caplog.clear()
    workspace.run("featurize", two, "dataflex.warmup_split=exact")
    assert "no kept state fits" in caplog.text
    assert len(StoreRoot(workspace.folder / "store").states.infos()) == 3


@pytest.mark.slow
def test_a_state_that_is_named_with_the_division_serves_who_divides_alike(
    workspace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As all were named once, and as `warmup_split: exact` still names them."""
    caplog.set_level(logging.INFO, "dataflex")
    path = workspace.write("run")
    assert workspace.run("featurize", path, "dataflex.warmup_split=exact")["computed"] == 69
    root = StoreRoot(workspace.folder / "store")
    (kept,) = [name for name in root.files.names("states") if root.states.find(name) is not None]
    again = workspace.run("featurize", path)
    assert again["computed"] == 0
    assert workspace.run("train", path)["started_from"] == kept
    assert f"starting from the kept state {kept[:8]}, made by 1 process of 2 rows × 2" in caplog.text
    assert "warming up anew" not in caplog.text
    other = workspace.write("other", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    workspace.run("featurize", other)
    assert "warming up anew; the nearest differs in batch" in caplog.text
