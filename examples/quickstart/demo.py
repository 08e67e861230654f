"""The demo: featurize a pool, train with LESS, train with random selection, compare.

Run it from the repository's root: `python -m examples.quickstart.demo`, or `make demo`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.quickstart import build

RUNS = {"LESS": "less", "random": "random"}
STAGES = (  # what is run, its arguments, and the summary that it leaves
    ("featurize", ("featurize", "less.yaml"), "less/dataflex_featurize.json"),
    ("train, LESS", ("train", "less.yaml"), "less/dataflex_summary.json"),
    ("train, random", ("train", "random.yaml"), "random/dataflex_summary.json"),
)
OUTPUT = Path(".demo")


SAID = re.compile(r"^\d\d:\d\d:\d\d (?:INFO|WARNING) dataflex[\w.]*: (.*)")
"""What `dataflex` itself logs; the libraries under it say far more."""


def run(arguments: Sequence[str], log: Path, name: str = "", environment: Mapping[str, str] | None = None) -> float:
    """Run one `dataflex` command, print what it says while it runs, keep all of it in a file; return its seconds.

    Args:
        arguments: of `dataflex`, the verb first.
        log: the file.
        name: printed before each line, for several that run at a time.
        environment: variables that the command has beside this process's own.
    """
    command = [sys.executable, "-m", "dataflex.cli", *arguments]
    print(f"{name}dataflex {' '.join(arguments)}  (log: {log})", flush=True)
    begun = time.monotonic()
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment or {})
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with log.open("w", encoding="utf-8") as out, subprocess.Popen(command, env=variables, **piped) as child:
        for line in child.stdout or ():  # a progress bar ends its lines with \r, which is a line's end here too
            out.write(line)
            if said := SAID.match(line):
                print(f"{name}  {time.monotonic() - begun:4.0f} s  {said[1]}", flush=True)
    if child.returncode:
        print(log.read_text("utf-8")[-4000:], file=sys.stderr)
        sys.exit(f"dataflex {arguments[0]} failed with exit code {child.returncode}; all of its output is in {log}")
    return time.monotonic() - begun


def show(title: str, *lines: list[str]) -> None:
    """Print lines of cells in columns, the first as head; the first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for first, *others in (lines[0], ["-" * width for width in widths], *lines[1:]):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def report(seconds: list[float]) -> None:
    """Print what was selected, what it did to the loss, and what was computed and reused."""
    from transformers.utils.logging import disable_progress_bar  # imported after the runs: 10 s

    from dataflex.pipelines.report import report as write_page
    from examples.quickstart import measure

    disable_progress_bar()
    pool = json.loads((build.FOLDER / "data" / "pool.json").read_text("utf-8"))
    test = json.loads((build.FOLDER / "data" / f"test_{build.TARGET}.json").read_text("utf-8"))
    share = sum(row["source"] == build.TARGET for row in pool) / len(pool)
    shares = {name: dict(measure.shares(OUTPUT / folder, pool, build.TARGET)) for name, folder in RUNS.items()}
    rounds = list(shares["LESS"])
    show(
        f"Share of the rows trained on that are of the target's source ({build.TARGET}: {share:.1%} of the pool)",
        ["selection", *rounds],
        *([name, *(f"{found[r]:.1%}" for r in rounds)] for name, found in shares.items()),
    )
    before = measure.answer_loss(build.FOLDER / "model", None, test)
    after = {name: measure.answer_loss(build.FOLDER / "model", OUTPUT / folder, test) for name, folder in RUNS.items()}
    show(
        f"Loss on {len(test)} other rows of that source (nats per answer token)",
        ["selection", "before", "after"],
        *([name, f"{before:.3f}", f"{loss:.3f}"] for name, loss in after.items()),
    )
    summaries: list[dict[str, Any]] = [json.loads((OUTPUT / file).read_text("utf-8")) for _, _, file in STAGES]
    show(
        "Work (rows whose features were computed, or read from the store)",
        ["stage", "seconds", "computed", "reused"],
        *(
            [stage, f"{spent:.0f}", str(summary["computed"]), str(summary["reused"])]
            for (stage, _, _), spent, summary in zip(STAGES, seconds, summaries, strict=True)
        ),
    )
    page = OUTPUT / "report.html"
    write_page([OUTPUT / folder for folder in RUNS.values()], page)
    print(f"\nThe page about both runs: {page}; the rows: dataflex show {OUTPUT / 'less'} --text")
    if not any(summary["computed"] for summary in summaries):
        print(f"\nNo feature was computed in this run: all of them were read from {OUTPUT / 'store'}.")


def main() -> None:
    """Build what is missing, run the three stages, report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not build.FOLDER.is_dir():
        sys.exit(f"found no {build.FOLDER} in {Path.cwd()}; run this from the root of the repository")
    OUTPUT.mkdir(exist_ok=True)
    build.build()
    seconds = []
    for number, (_, (verb, file), _) in enumerate(STAGES, start=1):
        seconds.append(run([verb, str(build.FOLDER / file)], OUTPUT / f"{number}-{verb}-{Path(file).stem}.log"))
    report(seconds)


if __name__ == "__main__":
    main()
