"""A disk that is full from the beginning is refused with its name: a real one, of two pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_file import write

UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")
FULL = "No space left on device"


def on_a_disk(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script of bash in a mount namespace in which `disk` mounts one of so many KiB over a folder."""
    if shutil.which("unshare") is None:
        pytest.skip("no program `unshare`, so no disk of one's own")
    tried = [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if (found := subprocess.run(tried, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"no user and mount namespaces on this system: {found.stderr.strip()}")
    disk = f'disk() {{ mount -t tmpfs -o "size=$1k" tmpfs "{folder}"; }}\n'
    dataflex = f'dataflex() {{ "{sys.executable}" -m dataflex.cli "$@"; }}\n'
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [*UNSHARE, "bash", "-c", disk + dataflex + script]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False, timeout=600
    )


def test_a_disk_that_is_full_from_the_beginning_is_refused(run_folder: Path) -> None:
    run, out = write(), run_folder / "out"
    out.mkdir()
    for verb in ("validate", "train", "featurize"):
        fill = f"disk 8; head -c 8K /dev/zero > {out}/other"
        done = on_a_disk(out, f"{fill}; dataflex {verb} {run}; code=$?; ls -A {out}; exit $code")
        assert (done.returncode, done.stdout) == (2, "other\n"), done.stderr
        head, problem = done.stderr.splitlines()
        assert head == "dataflex: 1 problem in the configuration:"
        assert problem.endswith(f": output_dir: found 'out'; expected a folder that can be written to; {FULL}")
