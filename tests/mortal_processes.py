"""Commands in processes that are killed, or fail, at a given moment: as by the kernel, an operator, a loss of power."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from dataflex.launch import free_port
from tests.processes import environment

KILLED = """
import os, signal, time
from pathlib import Path
from dataflex.access.fragments import Work
from dataflex.cli import main
from dataflex.trainers.trainer import DataflexTrainer

rank, where, count = os.environ.get("RANK", "0"), os.environ["WHERE"], int(os.environ["COUNT"])
begun = Path(__file__).with_suffix(".begun")
begun.mkdir(exist_ok=True)
for pid in (os.getpid(), *([os.getppid()] if "TORCHELASTIC_RUN_ID" in os.environ else [])):
    (begun / str(pid)).touch()

def kill():
    others = [int(path.name) for path in begun.iterdir()] if os.environ["WHO"] == "all" else []
    for pid in sorted(others, key=lambda pid: pid == os.getpid()):  # itself last
        os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

def counted(owner, name):
    real = getattr(owner, name)
    done = 0
    def counting(self, *args, **kwargs):
        nonlocal done
        if done == count and os.environ["WHO"] in (rank, "all"):
            if os.environ["HOW"] == "raises":
                raise RuntimeError("out of order")
            kill()
        done += 1
        time.sleep(float(os.environ["NAP"]))
        return real(self, *args, **kwargs)
    setattr(owner, name, counting)

counted(*{"cell": (Work, "compute"), "step": (DataflexTrainer, "training_step")}[where])
main()
"""


def script(folder: Path) -> str:
    """Write a script that is `dataflex`, and is killed or raises where `dying` says; return its path."""
    path = folder / "killed.py"
    path.write_text(KILLED)
    for left in path.with_suffix(".begun").glob("*"):  # numbers of processes may be given again
        left.unlink()
    return str(path)


def dying(where: str, count: int, who: str = "all", how: str = "killed", nap: float = 0.0) -> dict[str, str]:
    """Return what tells the script when: before a process does one more cell or step than `count`.

    Args:
        where: `cell` or `step`.
        count: cells or micro-batches that the process has done by then.
        who: a rank, which dies alone; or all, the launcher too, as soon as one comes so far.
        how: `killed`, or `raises`.
        nap: seconds before each.
    """
    return {"WHERE": where, "COUNT": str(count), "WHO": who, "HOW": how, "NAP": str(nap)}


def by_hand(command: list[str], **env: str) -> list[tuple[int, str]]:
    """Start a command as two ranks that nobody watches, as `srun` does; return how each ended, and what it said."""
    port = str(free_port())
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in "01":
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, *command], env=environment(**own, **env), stdout=log, stderr=log
            )
            stack.callback(process.kill)
            ranks.append((process, log))
        for process, _ in ranks:
            process.wait(200)
        for _, log in ranks:
            log.seek(0)
        return [(process.returncode, log.read()) for process, log in ranks]
