"""Run as a script: set limits of resources on this process for good, then become the command that follows them.

usage: confine.py CPU_SECONDS MEMORY_BYTES FILE_BYTES PROCESSES COMMAND...; -1 leaves a limit as it is

A script of its own, because setting limits between fork and exec is not safe in a process that has threads.
"""

from __future__ import annotations

import os
import resource
import sys


def main() -> None:
    """Apply the limits and replace this process."""
    limits = (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC)
    for limit, text in zip(limits, sys.argv[1:5], strict=True):
        if int(text) < 0:
            continue
        hard = resource.getrlimit(limit)[1]
        value = int(text) if hard == resource.RLIM_INFINITY else min(int(text), hard)
        resource.setrlimit(limit, (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.execv(sys.argv[5], sys.argv[5:])


if __name__ == "__main__":
    main()
