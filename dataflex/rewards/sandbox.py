"""Run Python code that a model wrote, in a process of its own that can be ended with all that it started.

Limited: wall clock and CPU time, memory of each process, size of each file, standard streams (none), environment
(nothing of ours). With namespaces: no network, no process outlives the run, and at most 64 of them, which the kernel
counts for any user but root. Not isolated: the file system. The code can read and write what the user who runs it can.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dataflex.errors import ConfigError

_UNSHARE = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
_PROCESSES = 64
_FILE_BYTES = 16 << 20


@functools.cache
def namespaces() -> tuple[str, ...]:
    """Return the command that gives a process namespaces of its own.

    Raises:
        ConfigError: this system has none to give.
    """
    program = shutil.which("unshare")
    if program is not None:
        command = (program, *_UNSHARE)
        if subprocess.run([*command, sys.executable, "-I", "-c", ""], capture_output=True).returncode == 0:
            return command
    raise ConfigError(
        "found no user namespaces on this system (`unshare --user --net` fails); without them code that a model wrote "
        "can use the network and leave processes behind. Allow them, or accept that with `isolation: process`"
    )


def command(arguments: list[str], seconds: float, memory_mb: int, isolated: bool) -> list[str]:
    """Return the command that runs this Python with arguments, under limits."""
    # Outside a namespace of its own the count would hold all of the user's processes and threads, ours too.
    processes = _PROCESSES if isolated else -1
    limits = [str(int(seconds) + 1), str(memory_mb << 20), str(_FILE_BYTES), str(processes)]
    confine = str(Path(__file__).with_name("confine.py"))
    prefix = list(namespaces()) if isolated else []
    return [*prefix, sys.executable, "-I", confine, *limits, sys.executable, "-I", *arguments]


@contextlib.contextmanager
def started(
    arguments: list[str], folder: str, seconds: float, memory_mb: int, isolated: bool, pipes: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """Start this Python under limits; whatever is left of it is killed in the end.

    Args:
        arguments: of the interpreter.
        folder: where it runs.
        seconds: CPU time of each process.
        memory_mb: address space of each process, in MiB.
        isolated: whether in namespaces of its own.
        pipes: whether its standard input and output are pipes; else there are none.
    """
    end = subprocess.PIPE if pipes else subprocess.DEVNULL
    process = subprocess.Popen(
        command(arguments, seconds, memory_mb, isolated),
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HOME": folder},
        stdin=end,
        stdout=end,
        stderr=subprocess.DEVNULL,
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


def run(program: str, seconds: float, memory_mb: int, isolated: bool) -> bool:
    """Run a program; say whether it came to its end in time, with nothing raised and no early exit.

    Args:
        program: Python source.
        seconds: wall clock.
        memory_mb: address space of each process, in MiB.
        isolated: whether in namespaces of its own.
    """
    with tempfile.TemporaryDirectory(prefix="dataflex-", ignore_cleanup_errors=True) as folder:
        verdict, nonce = Path(folder) / "verdict", os.urandom(16).hex()
        last = f"\n\nimport pathlib as _p\n_p.Path({str(verdict)!r}).write_text({nonce!r})\n"
        main = Path(folder) / "program.py"
        main.write_bytes((program + last).encode("utf-8", "replace"))
        # Not as __main__, so that a response's own main block stays as it is.
        start = "import runpy; runpy.run_path('program.py', run_name='response')"
        with started(["-c", start], folder, seconds, memory_mb, isolated) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
                return verdict.is_file() and verdict.read_bytes() == nonce.encode()
        return False
