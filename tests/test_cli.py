"""The command says what it does, what follows from a run file and what is wrong with its arguments, at once."""

from __future__ import annotations

import json
import sys

import pytest

from tests.command import python, run

HEAVY = "('torch', 'transformers', 'llamafactory', 'pydantic', 'omegaconf', 'numpy', 'pyarrow')"


pytestmark = pytest.mark.usefixtures("run_file")


def test_help_imports_nothing_heavy():
    """So that it is there at once."""
    code = f"import sys, dataflex.cli; print([m for m in {HEAVY} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"
    assert "featurize" in python("-m", "dataflex.cli", "--help").stdout


def test_validate_says_what_follows(capsys, monkeypatch):
    four = "gradient_accumulation_steps=4"
    code, out, _ = run(
        capsys, "validate", "run.yaml", "dataflex.params.proj_dim=64", "dataflex.store=memory://bucket/x", four
    )
    assert code == 0
    assert "30 optimizer steps = 1 epoch x (10 warm-up + 2 updates x 10)" in out
    assert "8 rows per optimizer step and process" in out
    assert "gradient (adam, sjlt to 64) of the training rows, after the warm-up of 10 steps" in out
    assert "gradient (sgd, sjlt to 64) of the targets" in out
    assert "memory://bucket/x (float16)" in out
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "x 4 processes = 32 rows per optimizer step" in run(capsys, "validate", "run.yaml", four)[1]


def test_errors_print_their_text_and_exit_code(capsys):
    code, out, err = run(capsys, "validate", "run.yaml", "stage=dpo")
    assert (code, out) == (2, "")
    assert err.startswith("dataflex: 1 problem in the configuration:\n  command line: stage: found 'dpo'")
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["train", "featurize"])
def test_wrong_run_file_stops_before_anything_heavy(verb):
    done = python("-X", "importtime", "-m", "dataflex.cli", verb, "run.yaml", "learning_rat=1")
    assert done.returncode == 2
    assert "did you mean 'learning_rate'?" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " transformers"))]


def test_unknown_verb_is_a_usage_error(capsys):
    code, _, err = run(capsys, "trian", "run.yaml")
    assert code == 2
    assert "Did you mean 'train'?" in err
    assert run(capsys, "select", "run.yaml")[0] == 2


def test_ls_shows_parameters(capsys):
    code, out, _ = run(capsys, "ls")
    assert code == 0
    assert "proj_dim: int, default 8192." in out
    found = {(method["kind"], method["name"]): method for method in json.loads(run(capsys, "ls", "--json")[1])}
    assert {"name": "path", "required": True}.items() <= found["selector", "static"]["params"][0].items()
    assert {("selector", "less"), ("mixer", "static"), ("mixer", "odm"), ("weighter", "loss")} <= found.keys()


def test_version_names_what_it_stands_on(capsys):
    _, out, _ = run(capsys, "version")
    assert "llamafactory 0.9" in out
    assert f"python {sys.version.partition(' ')[0]}" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["store", "show", ""],
        ["store", "gc", "--run", "", "--delete"],
        ["validate", ""],
        ["train", "run.yaml", ""],
        ["select", "run.yaml", "--num", "3", "--output", ""],
        ["doctor", ""],
        ["mix", "fit", "runs.csv", "--kl", "0", "--output", ""],
        ["mix", "fit", "runs.csv", "--sizes="],
        ["mix", "fit", "runs.csv", "--prior", ""],
        [""],
    ],
)
def test_an_empty_text_is_no_value(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("dataflex: command line: found an empty text (")


def test_a_key_may_be_set_to_an_empty_text(capsys):
    assert run(capsys, "validate", "run.yaml", "run_name=")[0] == 0


@pytest.mark.parametrize("verb", ["", "train", "select", "validate", "ls", "store", "store gc", "mix fit"])
def test_help_by_its_short_name(capsys, verb):
    code, out, _ = run(capsys, *verb.split(), "-h")
    assert (code, out) == (0, run(capsys, *verb.split(), "--help")[1])
    assert out.startswith("Usage: dataflex")


def test_version_as_an_option(capsys):
    assert run(capsys, "--version") == run(capsys, "version")
