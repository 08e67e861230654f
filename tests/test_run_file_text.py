"""Run files that cannot be read, and overrides that cannot be taken, are told from each other and named."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflex.config import load
from dataflex.config.keys import DataflexKeys, FlatKeys
from dataflex.config.llamafactory_keys import known_keys
from dataflex.errors import ConfigError
from tests.run_file import refusal, write

pytestmark = pytest.mark.usefixtures("run_folder")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dataflex.refresh.policy=static2", "command line: dataflex.refresh.policy: found 'static2'; expected full, "),
        ("warmup_step", "command line: warmup_step: found 'warmup_step'; expected key=value"),
        ("--warmup_step=3", "found '--warmup_step=3'; expected key=value"),
        ("learning_rate=[", "command line: learning_rate: found text that is not YAML"),
        ("a.b=1", "a: found an unknown key"),
        ("dataflex.params.seed=!!python/name:os.system", "found the tag tag:yaml.org,2002:python/name:os.system"),
    ],
)
def test_bad_override(override, expected):
    assert expected in refusal(overrides=(override,))


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("dataflex.params.seed=x", "dataflex.params.seed"),
        ("dataflex.params={seed: x}", "dataflex.params.seed"),
        ("dataflex={params: {seed: x}}", "dataflex.params.seed"),
        ("seed=x", "seed"),
    ],
)
def test_an_override_is_not_blamed_on_the_file(override, path):
    text = refusal("seed: 3\ndataflex:\n  params:\n    seed: 3", overrides=(override,))
    assert text.startswith(f"1 problem in the configuration:\n  command line: {path}: found 'x'; expected ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [", "run.yaml:2: found text that is not YAML"),
        ("seed: 1\nseed: 2", "run.yaml:2: found text that is not YAML: found duplicate key seed"),
        ("- 1", "found [1]; expected a mapping of keys to values"),
        ("5", "run.yaml: found text that cannot be read"),
        (
            "seed: 1\na: !!python/object/apply:os.system [x]",
            "run.yaml:2: found the tag tag:yaml.org,2002:python/object",
        ),
        ("a: &x [*x]", "found an alias that contains itself"),
        ("a: '${'", "found text that cannot be read"),
        ("[" * 5000, "nested too deeply"),
        ("b\xe9".encode("latin-1"), "found bytes that are not UTF-8 at offset 1"),
        (
            "\n".join(
                ["a0: &a0 [1,1,1,1,1,1,1,1,1]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
            ),
            "found aliases that unfold to",
        ),
        ("#" * (2 << 20), "expected at most 1048576 bytes"),
    ],
)
def test_unreadable_file(text, expected):
    Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match="1 problem") as caught:
        load("run.yaml")
    assert expected in str(caught.value)


@given(
    key=st.sampled_from([*known_keys(), "dataflex", "no_such_key"])
    | st.sampled_from([*FlatKeys.model_fields, *(f"dataflex.{key}" for key in DataflexKeys.model_fields)])
    | st.sampled_from(
        [f"dataflex.{key}" for key in ("params", "params.seed", "refresh.policy", "features.projection")]
    ),
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.sampled_from(["less", "pool"]),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
        max_leaves=3,
    ),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_any_key_is_taken_or_refused(key, value):
    with contextlib.suppress(ConfigError):
        load(write(), [f"{key}={json.dumps(value)}"])


def test_missing_and_duplicate_json():
    with pytest.raises(ConfigError, match="found no readable file"):
        load("gone.yaml")
    Path("run.json").write_text('{"seed": 1,\n "seed": 2}')
    with pytest.raises(ConfigError, match="found duplicate key seed"):
        load("run.json")
    Path("run.json").write_text('{"seed": 1,\n "a"}')
    with pytest.raises(ConfigError, match=r"run\.json:2: "):
        load("run.json")
