"""A Hub that does not answer: exit code 75, so that a scheduler tries again, whatever the library makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataflex.errors import DataflexError, UnavailableError
from dataflex.faults import is_unreachable, told

DATASET = """
from dataflex.explanation import explained
import datasets
with explained("dataset x (hf_hub nobody/nothing)"):
    datasets.load_dataset("nobody/nothing")
"""
MODEL = """
from dataflex.folders import model_folder
model_folder("nobody/nothing")
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("code", "named"), [(DATASET, "dataset x"), (MODEL, "nobody/nothing")], ids=["dataset", "model"]
)
@pytest.mark.parametrize("offline", [False, True])
def test_a_hub(code: str, named: str, offline: bool, tmp_path: Path) -> None:
    """Offline is what the user asked for, and no server's fault."""
    body = f"try:\n{code.replace(chr(10), chr(10) + '    ')}\nexcept Exception as e: print(e.exit_code, e, sep='|')"
    env = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    done = subprocess.run([sys.executable, "-c", body], env=env, capture_output=True, text=True, timeout=280)
    exit_code, _, said = done.stdout.strip().partition("|")
    assert said.startswith(named), done.stderr[-2000:]
    assert (int(exit_code) == UnavailableError.exit_code) == (not offline), said
    assert said.count("\n") < 3


def test_what_a_library_raises_in_place_of_the_refused_connection() -> None:
    def load() -> None:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError:
            raise FileNotFoundError("found nothing on the Hub") from None

    with pytest.raises(FileNotFoundError) as caught:
        load()
    assert is_unreachable(caught.value)
    assert told(caught.value) == (
        "a server does not answer: found nothing on the Hub\n  see that the server runs and that its address is right "
        "(dataflex.store, model, datasets); what was committed stays",
        75,
    )


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), FileNotFoundError(2, "No such file"), DataflexError("x")]
)
def test_what_no_server_is_to_blame_for(error: Exception) -> None:
    assert not is_unreachable(error)
