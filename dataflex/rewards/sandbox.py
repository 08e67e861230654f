"""Run Python code that a model wrote, in a process of its own that can be ended with all that it started.

Limited always: wall clock and CPU time, memory of each process, size of each file, standard streams (none), environment
(nothing of ours). Refused always: Unix sockets, and system calls that look into other processes (`confine.py`).
With namespaces: no network, at most 64 processes and threads (a few more while several begin at once), none of which
outlives the run, and 64 MiB of files of its own.
Not held: what may be read. The code sees every file that the user who runs it can read, and all processes together may
use 64 times the memory of one. Without namespaces it can also write those files, and fill the disk.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO

from dataflex.errors import ConfigError, DataflexError

_UNSHARE = ("--user", "--map-root-user", "--net", "--ipc", "--mount", "--pid", "--fork", "--kill-child")
_PROCESSES = 64
_FILE_BYTES = 16 << 20
_DISK_BYTES = 64 << 20
_START_SECONDS = 60
_WAITED_SECONDS = (0, 1, 5, 15)  # before each try to start the processes of a trial


@functools.cache
def namespaces() -> tuple[str, ...]:
    """Return the command that gives a process namespaces of its own.

    Raises:
        ConfigError: this system gives no namespaces, or does not let `confine.py` set up all of them.
    """
    program = shutil.which("unshare")
    said = "no program `unshare`"
    if program is not None:
        prefix = (program, *_UNSHARE)
        with tempfile.TemporaryDirectory(prefix="dataflex-") as folder:
            tried = [*prefix, *_confined("isolated/literals.py", 60, 1024, True)]  # a script that does nothing
            found = subprocess.run(tried, cwd=folder, capture_output=True, text=True)
        if found.returncode == 0:
            return prefix
        said = found.stderr.strip().rpartition("\n")[2]
    raise ConfigError(
        f"found no user and mount namespaces on this system ({said}); without them code that a model wrote can use "
        "the network, fill the disk and leave processes behind. Allow them, or accept that with `isolation: process`"
    )


def command(script: str, seconds: float, memory_mb: int, isolated: bool) -> list[str]:
    """Return the command that runs a script of this folder, confined."""
    prefix = namespaces() if isolated else ()
    return [*prefix, *_confined(script, seconds, memory_mb, isolated)]


def _confined(script: str, seconds: float, memory_mb: int, isolated: bool) -> list[str]:
    limits = (int(isolated), int(seconds) + 1, memory_mb << 20, _FILE_BYTES, _PROCESSES, _DISK_BYTES)
    here = Path(__file__).parent
    return [sys.executable, "-I", str(here / "confine.py"), *map(str, limits), str(here / script)]


@contextlib.contextmanager
def started(
    script: str,
    folder: str,
    seconds: float,
    memory_mb: int,
    isolated: bool,
    pipes: bool = False,
    lent: Sequence[int] = (),
    errors: BinaryIO | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a script, confined; whatever is left of it is killed in the end.

    Args:
        script: its path in the folder of this file.
        folder: where it runs.
        seconds: CPU time of each process.
        memory_mb: address space of each process, in MiB.
        isolated: whether in namespaces of its own.
        pipes: whether its standard input and output are pipes; else there are none.
        lent: open files that it gets as well; `DATAFLEX_PIPES` has their numbers.
        errors: the file that says why the script did not begin; what a script itself writes as errors is thrown away.
    """
    end = subprocess.PIPE if pipes else subprocess.DEVNULL
    process = subprocess.Popen(
        command(script, seconds, memory_mb, isolated),
        cwd=folder,
        env={
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",  # sets in the same order each time, so the same verdict
            "HOME": folder,
            "TMPDIR": folder,
            "DATAFLEX_PIPES": " ".join(map(str, lent)),
        },
        pass_fds=lent,
        stdin=end,
        stdout=end,
        stderr=subprocess.DEVNULL if errors is None else errors,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def is_readable(pipe: IO[bytes], seconds: float) -> bool:
    """Wait until a pipe has something to read, or is closed at its other end; false if the time was not enough."""
    ready = select.poll()  # `select.select` takes no file of a number above 1023
    ready.register(pipe, select.POLLIN)
    return bool(ready.poll(seconds * 1000))


def trial(code: str, tests: str, seconds: float, memory_mb: int, isolated: bool) -> tuple[float | None, str]:
    """Run tests against code: each in a process of its own, the code's names called from the tests' through pipes.

    Args:
        code: Python source that is not trusted.
        tests: Python source that is.
        seconds: wall clock of both together, counted from when both have begun.
        memory_mb: address space of each process, in MiB.
        isolated: whether in namespaces of their own.

    Returns:
        The reward (1, 0, or None where the tests cannot say), and why it is not 1.

    Raises:
        DataflexError: this machine does not start the two processes, also when asked again: no fault of the code.
    """
    said = ""
    for waited in _WAITED_SECONDS:
        time.sleep(waited)
        with tempfile.TemporaryFile() as errors:
            found = _trial(code, tests, seconds, memory_mb, isolated, errors)
            if found is not None:
                return found
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().rpartition("\n")[2] or "they did not say why"
    raise DataflexError(
        f"reward unit_tests: the two processes of a trial did not begin, {len(_WAITED_SECONDS)} times ({said})\n"
        f"  expected processes and memory to be free on this machine, and {memory_mb} MiB (memory_mb) to be enough"
    )


def _trial(
    code: str, tests: str, seconds: float, memory_mb: int, isolated: bool, errors: BinaryIO
) -> tuple[float | None, str] | None:
    """Return the verdict; None if one of the two processes did not begin."""
    given = json.dumps({"code": code, "tests": tests}).encode()
    limits = (seconds, memory_mb, isolated)
    with (
        tempfile.TemporaryDirectory(prefix="dataflex-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(prefix="dataflex-", ignore_cleanup_errors=True) as other,
        started("isolated/response.py", folder, *limits, pipes=True, errors=errors) as response,
    ):
        assert response.stdin is not None
        assert response.stdout is not None
        pipes = (response.stdin.fileno(), response.stdout.fileno())
        with started("isolated/trial.py", other, *limits, pipes=True, lent=pipes, errors=errors) as process:
            # Ours are closed, so that either process sees when the other has ended.
            response.stdin.close()
            response.stdout.close()
            assert process.stdout is not None
            # Read past the buffer, which `communicate` does not see.
            if not is_readable(process.stdout, _START_SECONDS) or not os.read(process.stdout.fileno(), 1):
                return None
            try:
                found = json.loads(process.communicate(given, seconds)[0])
            except subprocess.TimeoutExpired:
                return 0.0, f"more than {seconds:g} seconds"
            except ValueError:
                return 0.0, "the tests ended their process"
    return found["reward"], found["reason"]
