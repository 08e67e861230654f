"""States of mixers and weighters in checkpoints come back as they were."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dataflex.errors import DataflexError
from dataflex.pipelines.json_state import kept_by_json
from dataflex.pipelines.mixing.mixture_log import by_name, in_order

NAMES = ("target_words", "target_records", "target_arithmetic")
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
KEYS = st.sampled_from([*NAMES, "as it was", "x"])
STATES = st.recursive(
    VALUES | st.just(dict.fromkeys(NAMES, 1.5)) | st.just([1.0, None, 3]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(STATES, st.sampled_from([list(NAMES), ["as it was"], ["x"]]))
@example({"shares": dict.fromkeys(NAMES, 0.25)}, list(NAMES))
@example({"as it was": dict.fromkeys(NAMES, 0.25)}, list(NAMES))
@example({"as it was": [1]}, ["as it was"])
@example({"as it was": {"as it was": 1}}, ["as it was"])
def test_every_plain_state_comes_back_as_it_was(state: Any, names: list[str]) -> None:
    """Also one that a mixer itself keeps by the names of the domains."""
    found = in_order(names, json.loads(json.dumps(by_name(names, kept_by_json(state, "state")))))
    assert found == state
    assert repr(found) == repr(state)  # 1 is no True, and keys keep their order


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": (1, 2)}, r"mixer state\.a: found tuple"),
        ({"a": [{1: 2}]}, r"mixer state\.a\.0: found the key 1"),
        ({"a": np.float64(1)}, r"mixer state\.a: found float64"),
        ({"a": {2}}, r"mixer state\.a: found set"),
    ],
)
def test_what_json_would_change_is_refused(state: Any, said: str) -> None:
    with pytest.raises(DataflexError, match=said):
        kept_by_json(state, "mixer state")
