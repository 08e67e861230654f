"""`dataflex report`: one page about one or several runs, which needs nothing but a browser."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex import __version__
from dataflex.errors import ConfigError
from dataflex.pipelines.reporting import between, figures
from dataflex.pipelines.reporting.arrays import Arrays
from dataflex.pipelines.reporting.between import Held
from dataflex.pipelines.reporting.facts import Facts, facts, labels
from dataflex.pipelines.reporting.page import render
from dataflex.results.folder import RunFolder
from dataflex.whole import replacing

_DETAILED = 12
"""Runs that have pictures and rows of their own in a page; the others stand in its tables."""
_Draw = Callable[[Arrays, str], str | None]
_TOPICS: Sequence[tuple[str, str, Sequence[tuple[str, str, _Draw]]]] = (
    (
        "chosen",
        "Which rows were chosen",
        (
            ("sources", "Rows by source: the pool, then every round.", figures.sources),
            ("overlap", "Of the rows that two updates chose, the share that both did.", figures.overlap),
            ("times", "Rows by how many updates chose them.", figures.times),
        ),
    ),
    (
        "scores",
        "Why: their scores",
        (
            ("spread", "Scores at each update: median, middle half, 5 to 95 %.", figures.spread),
            ("by-source", "Scores by source at the last update.", figures.spread_by_source),
            (
                "length",
                "Score against length. A slope means that the method also chooses lengths.",
                lambda arrays, name: figures.against(arrays, "tokens", name),
            ),
            (
                "norm",
                "Score against the norm of the row's gradient.",
                lambda arrays, name: figures.against(arrays, "norm", name),
            ),
        ),
    ),
    ("mixture", "Shares of domains", (("shares", "Shares over steps.", figures.shares),)),
    ("weights", "Factors of losses", (("weights", "How factors spread within a batch.", figures.weights),)),
)


@dataclass(frozen=True)
class Compared:
    """What a comparison found, for its page.

    Attributes:
        held: lines of its table.
        targets: the target set that each line's runs were shown; None where they were shown none.
    """

    held: Sequence[Held]
    targets: Sequence[str | None]


def report(
    folders: Sequence[Path], output: Path, title: str | None = None, compared: Compared | None = None
) -> list[Facts]:
    """Write a page about runs, and return what it says of each.

    Args:
        folders: output folders of `dataflex train`.
        output: the HTML file.
        title: of the page; default: the names of the runs.
        compared: the table of a comparison; default: what the runs' own files say.

    Raises:
        ConfigError: a folder is not a run's, or stands twice.
        CorruptionError: a file of a run cannot be read.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"report: found {', '.join(map(str, folders))}; expected each run once")
    runs = [RunFolder(folder) for folder in folders]
    found = [facts(label, Arrays(run)) for label, run in zip(labels(folders), runs, strict=True)]
    detailed = found[:_DETAILED]
    with figures.style():
        together, topics = _together(found), _topics(detailed)
    held = between.held_out(found) if compared is None else compared.held
    targets = compared.targets if compared is not None else [None] * len(held)
    table = [{**vars(line), "target": target} for line, target in zip(held, targets, strict=True)]
    sections = [
        *([{"id": "held-out", "title": "Held out"}] if table else []),
        *([{"id": "together", "title": "Together"}] if len(found) > 1 else []),
        *({"id": topic["id"], "title": topic["title"]} for topic in topics),
        {"id": "rows", "title": "Rows"},
        {"id": "identity", "title": "Identity and cost"},
    ]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = render(
        {
            "title": title or _title(found),
            "made": f"{len(found)} {'run' if len(found) == 1 else 'runs'}; written {now} by DataFlex {__version__}",
            "sections": sections,
            "runs": found,
            "detailed": detailed,
            "looks": [(each.label, text) for each in found for text in each.looks],
            "held": table,
            "has_targets": len(set(targets)) > 1,
            "has_rewards": any(line.reward is not None for line in held),
            "together": together,
            "differences": between.differences(found) if len(found) > 1 else [],
            "not_detailed": _left_out(found),
            "topics": topics,
        }
    )
    with replacing(output) as temporary:
        temporary.write_text(page, "utf-8", errors="replace")
    return found


def _topics(found: Sequence[Facts]) -> list[dict[str, Any]]:
    """Draw every topic that a run has something for: the losses of a run alone, then each topic run by run."""
    out: list[dict[str, Any]] = []
    if len(found) == 1 and (svg := figures.losses({"": found[0].arrays}, "loss")):
        pictures = [(found[0].label, "Training loss, and evaluation loss (dashed) where there is one.", svg)]
        out.append({"id": "loss", "title": "Loss", "pictures": pictures})
    for topic, title, parts in _TOPICS:
        pictures = []
        for name, caption, draw in parts:
            for number, each in enumerate(found):
                if svg := draw(each.arrays, f"{name}-{number}"):
                    pictures.append((each.label, caption, svg))
        if topic == "mixture":
            for number, each in enumerate(found):
                for what, svg in figures.signals(each.arrays, f"signal-{number}"):
                    pictures.append((each.label, f"{what} by domain.", svg))
        if pictures:
            out.append({"id": topic, "title": title, "pictures": pictures})
    return out


def _together(found: Sequence[Facts]) -> list[tuple[str, str, str]]:
    """Draw what several runs have in common."""
    if len(found) < 2:
        return []
    out = []
    if svg := figures.losses({each.label: each.arrays for each in found[:_DETAILED]}, "losses"):
        out.append(("", "Training loss, and evaluation loss (dashed) where there is one.", svg))
    names, values = between.overlap(found[:_DETAILED])
    if len(names) > 1:
        svg = figures.matrix(names, values, "runs", "run", "Overlap of the rows that updates of two runs chose")
        out.append(("", "Of the rows that updates of two runs chose, the share that both did.", svg))
    return out


def _title(found: Sequence[Facts]) -> str:
    names = [each.label for each in found[:3]] + (["others"] if len(found) > 3 else [])
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _left_out(found: Sequence[Facts]) -> str:
    more = found[_DETAILED:]
    if not more:
        return ""
    return f"{len(more)} runs stand in the tables alone: {', '.join(each.label for each in more)}."
