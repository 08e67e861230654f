"""Options of a learning-rate schedule are tried in a short run, however long the real one's warm-up is."""

from __future__ import annotations

import pytest

from dataflex.errors import ConfigError
from dataflex.llamafactory.learning_rates import check_schedule


def test_a_warm_up_of_any_length_is_tried_in_a_moment() -> None:
    check_schedule({"lr_scheduler_type": "cosine", "warmup_steps": 10**12})
    with pytest.raises(ConfigError, match="lr_scheduler_kwargs: found"):
        check_schedule({"lr_scheduler_type": "cosine", "warmup_steps": 10**12, "lr_scheduler_kwargs": {"foo": 1}})
