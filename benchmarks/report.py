"""What the page about a large run costs: seconds and bytes, beside those of a run of a thousand rows.

    python -m benchmarks.report [--rows 1000000] [--updates 10] [--chosen 100000]

The run's folder is written by the writers of a training, without a model.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from dataflex.pipelines import showing
from dataflex.pipelines.report import report
from dataflex.results import row_map
from dataflex.results.folder import RunFolder
from tests.run_folders import make_run, rows_of


def main() -> None:
    """Make the runs, and say what they cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--chosen", type=int, default=100_000)
    given = parser.parse_args()
    for rows, chosen in ((1000, 100), (given.rows, given.chosen)):
        with tempfile.TemporaryDirectory() as folder:
            _measure(Path(folder), rows, given.updates, chosen)


def _measure(folder: Path, rows: int, updates: int, chosen: int) -> None:
    made = rows_of(rows)
    begun = time.monotonic()
    row_map.write(folder / "map.parquet", row_map.table(made, {}, {}))
    spent, size = time.monotonic() - begun, (folder / "map.parquet").stat().st_size
    print(f"{rows:,} rows: the map of rows {spent:.2f} s, {size / 1e6:.1f} MB")
    run = make_run(folder / "run", made, updates, chosen)
    begun = time.monotonic()
    report([run], folder / "report.html")
    spent, size = time.monotonic() - begun, (folder / "report.html").stat().st_size
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"  {updates} updates of {chosen:,} rows: the page {spent:.1f} s, {size / 1e6:.2f} MB, {memory:,.0f} MB held")
    begun = time.monotonic()
    found = RunFolder(run)
    showing.with_texts(found, showing.table(found, showing.rounds_of(found, None), top=20))
    print(f"  the best 20 rows of the last update {time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    main()
