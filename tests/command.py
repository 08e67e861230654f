"""The command line, run in this process and in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataflex import stop
from dataflex.cli import main

ROOT = Path(__file__).parents[1]


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    # At the end of a process that was asked to stop, signals are ignored; this process goes on.
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    try:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths} | env, capture_output=True, text=True, check=False
    )
