"""The verbs that look at runs: what was trained on, and the page about it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dataflex.answer import Json, answer
from dataflex.errors import ConfigError

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The output_dir of a training.")]


def show(
    run: RunFolder,
    round: Annotated[str | None, typer.Option(metavar="N|all", help="Which round; default: the last.")] = None,
    top: Annotated[int | None, typer.Option(min=1, metavar="K", help="The K best by score, of each round.")] = None,
    bottom: Annotated[int | None, typer.Option(min=1, metavar="K", help="The K worst by score.")] = None,
    source: Annotated[str | None, typer.Option(metavar="DATASET", help="Rows of this dataset alone.")] = None,
    pool: Annotated[bool, typer.Option("--pool", help="Every row that was scored, chosen or not.")] = False,
    text: Annotated[bool, typer.Option("--text", help="What rows say, and the target rows nearest to them.")] = False,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a Parquet file.")] = None,
) -> None:
    """Show the rows that a run was trained on: rank, score, where they come from, what they say."""
    from dataflex.pipelines import showing
    from dataflex.results.folder import RunFolder as Folder

    if top is not None and bottom is not None:
        raise ConfigError("--top and --bottom: found both; expected one of them")
    if as_json + as_csv + (parquet is not None) > 1:
        raise ConfigError("--json, --csv and --parquet: found several; expected one of them")
    folder = Folder(run)
    rounds = showing.rounds_of(folder, round)
    rows = showing.table(folder, rounds, top, bottom, source, pool)
    whole, is_for_people = len(rows), not (as_json or as_csv or parquet)
    if is_for_people and top is None and bottom is None:
        rows = rows.slice(0, showing.SHOWN)
    if text or is_for_people:
        rows = showing.with_texts(folder, rows)
    if as_csv:
        import pyarrow.csv as csv

        csv.write_csv(showing.csv_table(rows), sys.stdout.buffer)
    elif parquet is not None:
        import pyarrow.parquet as pq

        from dataflex.config.outputs import refuse_unwritable
        from dataflex.whole import replacing

        if parquet.suffix.lower() != ".parquet":
            raise ConfigError(f"--parquet: found {parquet}; expected a name that ends in .parquet")
        refuse_unwritable("--parquet", parquet)
        with replacing(parquet) as temporary:
            pq.write_table(rows, temporary)
        print(f"wrote {len(rows)} rows to {parquet}")
    else:
        said = showing.lines(folder, rounds, rows, text, whole - len(rows)) if is_for_people else []
        answer(showing.plain(rows) if as_json else None, as_json, said)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN2 ...]", help="Output folders of trainings.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="The page.")] = Path(
        "report.html"
    ),
    title: Annotated[str | None, typer.Option(help="Of the page; default: the runs' names.")] = None,
    as_json: Json = False,
) -> None:
    """Write one page about runs: losses, which rows were chosen, why, what it cost. It needs no network."""
    from dataflex.config.outputs import refuse_unwritable
    from dataflex.pipelines.report import report

    if output.suffix.lower() not in (".html", ".htm"):  # one that was meant for something else would be lost
        raise ConfigError(f"--output: found {output}; expected a name that ends in .html")
    refuse_unwritable("--output", output)
    found = report(runs, output, title)
    said = [f"wrote {output}: {len(found)} run{'s'[: len(found) > 1]}, {output.stat().st_size / 1e6:.1f} MB"]
    answer([each.plain() for each in found], as_json, said)
