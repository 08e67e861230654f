"""What a user's code raises is told with its place, and never passes for a run that was done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataflex.config import load
from tests.command import run
from tests.run_file import refusal, write


@pytest.mark.usefixtures("run_folder")
@pytest.mark.parametrize(
    "code", ["import sys\nsys.exit(0)", "raise SystemExit", "raise GeneratorExit", "raise BaseException('x')",
             "class Own(Exception): ...\nraise Own('x')"]
)  # fmt: skip
def test_a_plugin_that_ends_or_fails_at_import(code):
    Path("ends.py").write_text(code)
    for changes in ("dataflex: {plugins: [ends.py]}", "component_name: ends.py:Mine"):
        assert ": found" in (found := refusal(changes)) or "importing" in found
        assert "importing " in found
        assert "ends.py failed: " in found


@pytest.mark.usefixtures("run_folder")
@pytest.mark.parametrize("params", ["3", "'text'", "dict", "[]"])
def test_params_that_are_no_model(params):
    Path("mine.py").write_text(f"class Mine:\n    Params = {params}\n    def select(self, *args, **kwargs): ...\n")
    found = refusal("component_name: mine.py:Mine")
    assert "component_name: found Params = " in found
    assert " in Mine; expected a subclass of Parameters" in found


@pytest.mark.usefixtures("run_folder")
@pytest.mark.parametrize("kind", ["selector", "mixer", "weighter"])
@pytest.mark.parametrize("name", ["", "(3)", "('a:b')", "('')", "('a.py')"])
def test_a_registration_under_no_name(kind, name):
    body = "\n".join(f"    def {verb}(self, *args, **kwargs): ..." for verb in ("select", "mix", "weights"))
    Path("named.py").write_text(
        f"from dataflex.{kind}s import register_{kind}\n@register_{kind}{name}\nclass Mine:\n{body}\n"
    )
    assert f'expected a name in parentheses, without a colon: @register_{kind}("mine")' in refusal(
        "dataflex: {plugins: [named.py]}"
    )


@pytest.mark.usefixtures("run_folder")
def test_an_epsilon_that_divides_by_zero():
    for value in ("0", "1.0e-300"):
        assert "adam_epsilon: found" in refusal(f"adam_epsilon: {value}")
    assert load(write("adam_epsilon: 1.0e-8"))


@pytest.mark.parametrize(
    ("answer", "code", "expected"),
    [
        (
            "return None",
            6,
            "mine.py:Mine: select returned None; expected positions of rows, a list or an array of w",
        ),
        ("return [float('nan')] * num_samples", 6, "mine.py:Mine: select returned [nan, "),
        ("return [0.5] * num_samples", 6, "mine.py:Mine: select returned [0.5, "),
        ("return ['x'] * num_samples", 6, "mine.py:Mine: select returned ['x', "),
        ("raise ValueError('my text')", 1, "mine.py, line 3, in Mine.select: ValueError: my text\n"),
        (
            "import numpy; numpy.zeros(3).reshape(2, 2)",
            1,
            "mine.py, line 3, in Mine.select: ValueError: cannot res",
        ),
        ("import sys; sys.exit(0)", 1, "train was ended by code that it ran, before it was done: "),
    ],
)
def test_a_selector_that_fails(workspace, monkeypatch, capfd, answer, code, expected):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "FORCE_TORCHRUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(workspace.folder)
    Path("mine.py").write_text(
        f"class Mine:\n    def select(self, model, step_id, num_samples, **kwargs):\n        {answer}\n"
    )
    path = workspace.write("run", component_name="mine.py:Mine", dataflex=None, warmup_step=1, logging_steps=100)
    found, _, err = run(capfd, "train", str(path))
    said = f"\n{err}"
    said = said[said.rindex("\ndataflex: ") :]  # before it is what libraries log to a stream of an earlier test
    assert found == code
    assert expected in said
    assert "Traceback" not in said
    status = json.loads((workspace.folder / "out" / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", code)
