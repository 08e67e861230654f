"""The verbs `dataflex mix ...`, which find proportions of domains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from dataflex.answer import Json, answer

log = logging.getLogger(__name__)

app = typer.Typer(help="Find proportions of domains.", no_args_is_help=True, rich_markup_mode=None)

RunTable = Annotated[Path, typer.Argument(metavar="RUNS.csv", help="CSV or .parquet, columns mix.* and metric.*.")]
Weights = Annotated[str | None, typer.Option(metavar="METRIC=WEIGHT,...", help="Default: all metrics equal.")]
Prior = Annotated[str | None, typer.Option(help="natural, uniform, or a JSON file; default: natural by --sizes.")]
Kl = Annotated[float, typer.Option(help="Weight of KL(x || prior), in units of the metrics per nat.")]
Sizes = Annotated[Path | None, typer.Option(metavar="JSON", help="Tokens of each domain.")]
Tokens = Annotated[float | None, typer.Option(help="Tokens of the run that the proportions are for.")]
Cap = Annotated[float | None, typer.Option(help="Most epochs over a domain; default: 4 where --tokens is given.")]
Proportions = Annotated[Path | None, typer.Option("--output", metavar="JSON", help="File of proportions to write.")]


@app.command("fit")
def fit_proportions(
    runs: RunTable,
    weights: Weights = None,
    prior: Prior = None,
    kl: Kl = 0.05,
    sizes: Sizes = None,
    tokens: Tokens = None,
    cap: Cap = None,
    output: Proportions = None,
    as_json: Json = False,
) -> None:
    """Fit how metrics follow from mixtures to finished runs, and solve for the best mixture; trains nothing."""
    from dataflex.fitting.fit import fit_mixture, lines_of, write
    from dataflex.fitting.goal import read_goal
    from dataflex.fitting.table import read_runs

    read = read_runs(runs)
    if read.unused:
        log.info("%s: columns not used: %s", runs, ", ".join(read.unused))
    found = fit_mixture(read, read_goal(read, weights, prior, kl, sizes, tokens, cap))
    for warning in found["fit"]["warnings"]:
        log.warning("%s: %s", runs, warning)
    if output is not None:
        write(found, runs, output)
    answer(found, as_json, lines_of(found))
