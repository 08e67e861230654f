"""Featurize with Ray: python examples/cluster/featurize_ray.py RUN.yaml [KEY=VALUE ...] --workers 8.

Wants the extra: pip install '.[ray]' -c constraints.txt

Each worker is an actor in which `dataflex featurize` runs. They need nothing of each other: they share the store and
take the rows that nobody else is at. Ray places them, starts one again that is lost, and asks its autoscaler for
machines. The first worker trains the warm-up where features depend on its end; the others wait for the state that it
keeps, and give their places back from time to time, as it may want one. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from dataflex import Run
from dataflex.config import load
from dataflex.environment import QUIET
from dataflex.errors import ConfigError, CoverageError, DataflexError, Interrupted, UnavailableError

LOOKS = 30
"""Looks for the end of the warm-up, before a worker gives its place back."""


class Worker:
    """One launch of featurize, with one device at most."""

    def featurize(self, folder: str, run: str, overrides: list[str], is_first: bool, wait: float) -> bool:
        """Compute into the stores, together with the other launches, until all is there.

        Args:
            folder: the driver's working folder, which relative paths of the run file begin at.
            run: the run file.
            overrides: `KEY=VALUE`.
            is_first: whether the warm-up is this one's.
            wait: seconds between two looks for the end of another's.

        Returns:
            Whether all is there; else the state behind another's warm-up is not.

        Raises:
            UnavailableError: it was asked to stop, or a server does not answer; Ray tries again.
            ConfigError: this machine has no such folder.
        """
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("dataflex").setLevel(logging.INFO)
        if not Path(folder).is_dir():
            raise ConfigError(
                f"{socket.gethostname()}: found no folder {folder}; expected the driver's working folder on every "
                "machine: on a common disk, or by `ray job submit --working-dir`"
            )
        os.chdir(folder)
        for _ in range(LOOKS):
            try:
                Run(load(run, overrides)).featurize(worker=not is_first)
                return True
            except CoverageError as error:
                if is_first:
                    raise
                logging.getLogger("dataflex").info("waiting %.0f s for another: %s", wait, error)
                time.sleep(wait)
            except Interrupted as error:  # which is no Exception, and would end the actor for good
                raise UnavailableError(str(error)) from error
        return False


def main() -> None:
    """Start the workers, and wait until one has found all rows there.

    Raises:
        ConfigError: the run file is wrong.
        RayTaskError: its cause is what a worker raised that no other try would mend, or that was tried too often.
        RayActorError: a worker was lost too often.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--workers", type=int, default=2, help="actors; those that find no place wait for one")
    parser.add_argument("--gpus", type=float, default=1, help="of each worker: 1, or 0 for the CPU")
    parser.add_argument("--cpus", type=float, default=1, help="of each worker")
    parser.add_argument("--retries", type=int, default=10, help="how often Ray starts a worker again; -1: always")
    parser.add_argument("--wait", type=float, default=60, help="seconds between looks for the end of the warm-up")
    parser.add_argument("--ending", type=float, default=60, help="seconds the others have, when one has found all")
    asked = parser.parse_intermixed_args()
    if asked.workers < 1:
        parser.error(f"--workers: found {asked.workers}; expected at least 1")
    load(asked.run, asked.overrides)  # what is wrong with the run file is said before anything is started

    quiet = {name: os.environ.get(name, value) for name, value in QUIET.items()}
    ray.init(runtime_env={"env_vars": quiet})  # of the workers: libraries draw their bars into the log otherwise
    actor: Any = ray.remote(
        num_gpus=asked.gpus, num_cpus=asked.cpus, max_restarts=asked.retries, max_task_retries=asked.retries
    )(Worker)
    if asked.gpus > ray.cluster_resources().get("GPU", 0):
        print("found no GPU yet: workers wait for one that Ray fetches; on CPUs say --gpus 0", file=sys.stderr)
    at_work: dict[Any, tuple[int, Any]] = {}
    due = dict.fromkeys(range(asked.workers), 0.0)  # workers that are to be started, and when
    while True:
        for number in [number for number, when in due.items() if when <= time.monotonic()]:
            del due[number]
            worker = actor.remote()
            task = worker.featurize.options(retry_exceptions=[UnavailableError])
            at_work[task.remote(os.getcwd(), asked.run, asked.overrides, number == 0, asked.wait)] = number, worker
        if not at_work:
            time.sleep(0.1)
            continue
        for task in ray.wait(list(at_work), timeout=1)[0]:
            number, worker = at_work.pop(task)
            if ray.get(task):  # raises what the worker did
                leave(list(at_work), asked.ending)
                return
            ray.kill(worker)  # its place may be what the first waits for
            due[number] = time.monotonic() + asked.wait


def leave(tasks: list[Any], seconds: float) -> None:
    """Give workers the time to end by themselves; as all rows are there, what they fail of is only said."""
    ended = ray.wait(tasks, num_returns=len(tasks), timeout=seconds)[0] if tasks else []
    for task in ended:
        try:
            ray.get(task)
        except (RayActorError, RayTaskError) as error:
            print(f"a worker ended behind the last row: {' '.join(str(error).split())[:300]}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except RayTaskError as error:
        if not isinstance(error.cause, DataflexError):
            raise
        print(f"dataflex: {error.cause}", file=sys.stderr)
        sys.exit(error.cause.exit_code)
    except RayActorError as error:
        said = " ".join(str(error).split())[:300]
        print(
            f"dataflex: a worker was lost more often than --retries: {said}\n  the same command goes on",
            file=sys.stderr,
        )
        sys.exit(UnavailableError.exit_code)
    except DataflexError as error:
        print(f"dataflex: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
