"""Run files that are wrong in any way end in a ConfigError of one line for each problem, or are taken.

FUZZED_RUN_FILES=20000 pytest tests/test_run_file_fuzz.py tries more of them than the tests do every time.
"""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.config import load
from dataflex.config.keys import DataflexKeys, FlatKeys
from dataflex.config.llamafactory_keys import known_keys
from dataflex.config.overview import summary
from dataflex.errors import ConfigError
from dataflex.schedule import MOST_STEPS

COUNT = int(os.environ.get("FUZZED_RUN_FILES", "400"))
LONGEST = 1300  # characters of a line

RUN: dict[str, Any] = {
    "model_name_or_path": "model",
    "stage": "sft",
    "do_train": True,
    "dataset": "pool",
    "eval_dataset": "target",
    "template": "qwen",
    "output_dir": "out",
    "train_type": "dynamic_select",
    "component_name": "less",
    "warmup_step": 10,
    "update_step": 10,
    "update_times": 2,
}
METHODS = {
    "dynamic_select": ("less", "random", "composed", "nice", "tsds", "loss", "static", "cluster_less"),
    "dynamic_mix": ("odm", "static", "doremi", "ado", "unimax", "temperature", "dynamic_moe"),
    "dynamic_weight": ("loss", "adapt", "feature"),
    "static": (None,),
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 10**9, 10**12, 2**31, 2**63, 2**64, 10**31, -(10**31), 10**400),
    *(0.5, -0.5, 1.5, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf),
    *("", " ", ":", "::", ":x", "x:", "a.b:C", ".py", "./x.py", "/dev/null", "/dev/null/x", "~", "~nobody-here/x"),
    *("nosuch://x", "s3://", "s3://bucket/x", "://", "file://", "memory://", "http://[", "hf://x/y", "\\\\x\\y"),
    *(
        "x" * 5000,
        "a\nb\nc\nd",
        "\t",
        "é\u202e\u2028",
        "ﬁ",
        "1",
        "1e-4",
        "true",
        "no",
        "null",
        "???",
        "${x}",
        "${output_dir}",
    ),
    *([], [[]], [1, [2, [3]]], [None], [{}], ["pool", 1], ["pool", "pool"], "pool,,pool", ",", ["x"] * 300),
    *({}, {"a": 1}, {1: 2}, {True: 1}, {None: 1}, {1.5: [{}]}, {"a": {"b": {2: [None]}}}, {"": ""}, {"x" * 900: 1}),
    *({"name": "loss"}, {"name": 3}, {"kind": "loss"}, [{"kind": "gradient"}], [{"kind": 1}], {"type": "exact_match"}),
)
TEXTS = (
    *(
        "&a [*a]",
        "<<: *b",
        "<<: {a: 1}",
        "? [1, 2]\n: 3",
        "!!binary aGk=",
        "!!python/name:os.system",
        "!x y",
        "=",
        "- - - 1",
    ),
    *(
        "{",
        "}",
        "[",
        '"',
        "'",
        "|",
        ">",
        "%",
        "@x",
        "`",
        "\x00",
        "\x07",
        "\ufeff",
        "\u2028",
        "\\ud800",
        '"\\ud800"',
        '"\\0"',
    ),
    *(
        "---\n",
        "...\n",
        "\tkey: 1",
        "a: b: c",
        "seed: 1\nseed: 2",
        "2024-01-01: 1",
        "2024-01-01",
        "12:30:45",
        "0o7",
        ".5.",
    ),
    *("train_type: dynamic_mix", "dataflex: {1: 2}", "dataflex: []", "1: 2", "~: 1", "true: 1", "# comment", "  "),
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a model and two datasets, which the test runs in."""
    for name in ("ALLOW_EXTRA_ARGS", "USE_RAY", "USE_MCA", "USE_KT", "DATAFLEX_HOME", "HF_HOME", "HF_ASSETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("data").mkdir()
    for name in ("pool", "target"):
        Path(f"data/{name}.json").write_text('[{"instruction": "a", "output": "b"}]')
    info = {name: {"file_name": f"{name}.json"} for name in ("pool", "target")}
    Path("data/dataset_info.json").write_text(json.dumps(info))


def attempt(path: str, overrides: list[str]) -> None:
    """Load a run file, and hold what is said about it against the promise."""
    try:
        settings = load(path, overrides)
    except ConfigError as error:
        lines = str(error).split("\n")
        assert lines[0] in ("1 problem in the configuration:", f"{len(lines) - 1} problems in the configuration:")
        assert all(line.startswith("  ") and line.isprintable() and len(line) < LONGEST for line in lines[1:]), lines
    else:
        assert summary(settings)[0].endswith(": valid")
        assert settings.schedule.needs_rows or settings.schedule.total() <= MOST_STEPS


def mutated(rng: random.Random) -> dict[Any, Any]:
    """Return a run file with some of its keys changed, moved, renamed or left out."""
    kind = rng.choice(list(METHODS))
    values: dict[Any, Any] = {**RUN, "train_type": kind, "component_name": rng.choice(METHODS[kind])}
    params = ["proj_dim", "seed", "checkpoints", "alpha", "rule", "representation", "reward", "path", "focus_weight"]
    for _ in range(rng.randint(1, 3)):
        key: Any = rng.choice([*known_keys(), *[*FlatKeys.model_fields] * 8])
        value = rng.choice(VALUES)
        match rng.randrange(8):
            case 0:
                values.pop(rng.choice(list(values)), None)
            case 1:
                values[rng.choice([1, 1.5, True, None, "", "x" * 200, "learning_rat", "a.b", "é"])] = value
            case 2:
                values["dataflex"] = {rng.choice([*DataflexKeys.model_fields, "params", 1, None, "x"]): value}
            case 3:
                inner = {rng.choice([*params, 1, "x"]): value}
                values["dataflex"] = {"params": inner, rng.choice([*DataflexKeys.model_fields]): rng.choice(VALUES)}
            case 4:
                values[key] = {rng.choice([key, 1, "a"]): value} if rng.random() < 0.5 else [value, value]
            case _:
                values[key] = value
    return values


def test_any_run_file_is_taken_or_refused_in_words():
    rng = random.Random(7)
    for number in range(COUNT):
        values = mutated(rng)
        written = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
        overrides = []
        if number % 4 == 0:  # as text, with lines torn, doubled and strewn with what YAML makes something of
            lines = written.splitlines()
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(lines))
                lines[at] = rng.choice(
                    [rng.choice(TEXTS), lines[at] + rng.choice(TEXTS), lines[at][: rng.randint(0, 9)]]
                )
            written = "\n".join(lines)
        elif number % 4 == 1:
            key = rng.choice(
                [*known_keys(), *FlatKeys.model_fields, "dataflex", "dataflex.params", "dataflex.refresh.policy"]
            )
            text = rng.choice(TEXTS) if rng.random() < 0.3 else json.dumps(rng.choice(VALUES))
            overrides = [f"{key}={text}"]
        Path("run.yaml").write_text(written, "utf-8")
        try:
            attempt("run.yaml", overrides)
        except BaseException as error:
            error.add_note(f"number {number}, overrides {overrides}, run file:\n{written[:3000]}")
            raise


@pytest.mark.parametrize("number", range(len(FlatKeys.model_fields)))
def test_every_value_of_our_own_keys(number):
    key, is_thorough = list(FlatKeys.model_fields)[number], COUNT > 400
    for kind in METHODS if is_thorough else [list(METHODS)[number % 4]]:
        for value in VALUES[number % 4 :: 1 if is_thorough else 4]:
            values = {**RUN, "train_type": kind, "component_name": METHODS[kind][0], key: value}
            Path("run.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
            attempt("run.yaml", [])


@pytest.mark.parametrize(
    "written", [b"", b"\n\n# nothing\n", b"null", b"5", b"- 1", b"\xff\xfe\x00", b"\x00" * 100, b"[" * 9000]
)
@pytest.mark.parametrize("name", ["run.yaml", "run.json", "run"])
def test_files_that_are_no_run_files(written, name):
    Path(name).write_bytes(written)
    with pytest.raises(ConfigError):
        load(name)
    attempt(name, ["seed=1"])


def test_what_is_no_file():
    Path("folder.yaml").mkdir()
    for path in ("folder.yaml", "gone.yaml", "/dev/null", "/dev/zero", "run.yaml/x", "x" * 300, "/proc/self/mem"):
        attempt(path, [])
