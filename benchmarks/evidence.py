"""What methods are worth on a real model: tables and pictures of docs/evidence.md, out of the runs kept beside it.

`python -m benchmarks.evidence` reads docs/evidence/NAME.jsonl, which `dataflex compare --table` has written, and puts a
table between `<!-- NAME -->` and `<!-- end -->` of docs/evidence.md and a picture into docs/evidence/NAME.svg.

Differences are from random rows, or from plain shares (`BASELINES`), under the same seed; intervals are of 95 %, by
Student's t over seeds. A method that is shown a target is measured on that target's own test set: evidence_X on
evidence_test_X.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataflex.pipelines.comparing.estimate import Estimate
from dataflex.pipelines.comparing.kept import KeptLine

PAGE = Path("docs/evidence.md")
FOLDER = Path("docs/evidence")
TARGETS = {
    "evidence_test_one": "one source",
    "evidence_test_mixed": "mixed sources",
    "evidence_test_topic": "one topic in a source",
}
"""Test set -> what kind of target it stands for."""
BASELINES = {"shares": "stratified"}
"""Table -> the arm that the others are held against, where that is not `random`."""


@dataclass(frozen=True)
class Arm:
    """What one method came to on one test set.

    Attributes:
        name: as `dataflex compare` has it.
        loss: nats per supervised token, over seeds.
        gain: that less the baseline's, seed by seed; None of the baseline.
        exact: share of responses that are exactly right; None where none is judged.
        exact_gain: the same, less the baseline's.
        train_seconds: of a training, mean; None where nothing is trained.
        choose_seconds: of the longest choice, which found the least in the stores; None where none is made.
        features: gradients, losses or embeddings of rows that a choice asked for, for each row chosen, mean, with those
            that were found in the stores.
    """

    name: str
    loss: Estimate | None
    gain: Estimate | None
    exact: Estimate | None
    exact_gain: Estimate | None
    train_seconds: float | None
    choose_seconds: float | None
    features: float


def read(path: Path) -> list[KeptLine]:
    """Read a table of runs; of several lines of one run on one test set, the first.

    Raises:
        ValueError: it has a run under two settings, which no table can hold side by side.
    """
    found: dict[object, KeptLine] = {}
    for text in path.read_text("utf-8").splitlines():
        line = KeptLine.model_validate_json(text)
        first = found.setdefault((line.run, line.test), line)
        if first.identity != line.identity:
            raise ValueError(f"{path}: found {line.run} under two settings; expected one, or a file for each")
    return list(found.values())


def arms(lines: Sequence[KeptLine], test: str, baseline: str = "random") -> list[Arm]:
    """Summarise what methods came to on a test set, in the order of the table; those shown other targets left out."""
    shown = [each for each in lines if each.test == test and each.target in (None, test.replace("_test_", "_"))]
    beside = [each for each in shown if each.arm == baseline]
    found = []
    for name in dict.fromkeys(each.arm for each in shown):
        own = [each for each in shown if each.arm == name]
        choices = [each.choice_seconds for each in lines if each.arm == name and each.choice_seconds is not None]
        found.append(
            Arm(
                name,
                Estimate.of(list(_by_seed(own, "loss").values())),
                None if name == baseline else _difference(own, beside, "loss"),
                Estimate.of(list(_by_seed(own, "reward").values())),
                None if name == baseline else _difference(own, beside, "reward"),
                float(np.mean([each.seconds for each in own])) if any(each.steps for each in own) else None,
                max(choices, default=None),
                float(np.mean([_asked(each) for each in own])),
            )
        )
    return found


def _asked(line: KeptLine) -> float:
    asked = (line.choice_computed or 0) + (line.choice_reused or 0)
    return asked / line.chosen if line.chosen else 0.0


def _by_seed(lines: Iterable[KeptLine], what: str) -> dict[int | None, float]:
    return {each.seed: getattr(each, what) for each in lines if getattr(each, what) is not None}


def _difference(own: Iterable[KeptLine], beside: Iterable[KeptLine], what: str) -> Estimate | None:
    ours, theirs = _by_seed(own, what), _by_seed(beside, what)
    if set(ours) == {None}:
        return Estimate.of([ours[None] - value for value in theirs.values()])
    return Estimate.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def table(lines: Sequence[KeptLine], baseline: str = "random") -> list[str]:
    """Return a Markdown table for each test set."""
    out: list[str] = []
    for test, kind in TARGETS.items():
        found = arms(lines, test, baseline)
        if not found:
            continue
        has_exact = any(each.exact for each in found)
        less = f"less {baseline}"
        head = ["method", "runs", "loss", less] + (["exactly right", less] if has_exact else [])
        head += ["training, s", "choosing, s", "features a row"]
        out += ["", f"**{kind.capitalize()}** (`{test}`):", "", _row(head), _row(["---"] * len(head))]
        for each in found:
            cells = [f"`{each.name}`", str(each.loss.count if each.loss else 0), _text(each.loss), _text(each.gain)]
            cells += [_percent(each.exact), _percent(each.exact_gain)] if has_exact else []
            seconds = [_seconds(each.train_seconds), _seconds(each.choose_seconds)]
            out.append(_row([*cells, *seconds, f"{each.features:.1f}"]))
    return [*out, ""]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _seconds(found: float | None) -> str:
    return "–" if found is None else f"{found:.0f}"


def _text(found: Estimate | None) -> str:
    if found is None:
        return "–"
    return f"{found.mean:.3f}" + ("" if found.half is None else f" ± {found.half:.3f}")


def _percent(found: Estimate | None) -> str:
    if found is None:
        return "–"
    return f"{found.mean:.0%}" + ("" if found.half is None else f" ± {100 * found.half:.0f}")


def filled(page: str, tables: Mapping[str, Sequence[KeptLine]]) -> str:
    """Return a page with the tables between their marks.

    Raises:
        ValueError: a table has no place in it.
    """
    for name, lines in tables.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"found no place for {name}; expected <!-- {name} --> and <!-- end -->")
        text = "\n".join(table(lines, BASELINES.get(name, "random"))) + "\n"
        page = pattern.sub(lambda match, text=text: match[1] + text + match[2], page)  # type: ignore[misc]
    return page


def draw(lines: Sequence[KeptLine], path: Path, baseline: str = "random") -> None:
    """Draw the differences from the baseline with their intervals, one panel for each test set."""
    from matplotlib.figure import Figure

    from dataflex.pipelines.reporting.figures import style

    panels = [(kind, arms(lines, test, baseline)) for test, kind in TARGETS.items()]
    panels = [(kind, [each for each in found if each.gain and each.name != "base"]) for kind, found in panels]
    panels = [(kind, found) for kind, found in panels if found]
    if not panels:
        return
    names = list(dict.fromkeys(each.name for _, found in panels for each in found))[::-1]
    with style():
        figure = Figure(figsize=(3.1 * len(panels) + 1, 0.28 * len(names) + 0.9), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for at, (kind, found) in zip(axes, panels, strict=True):
            gains = {each.name: each.gain for each in found if each.gain}
            at.axvline(0, color="#7F7F7F", linewidth=0.8)
            where = [names.index(name) for name in gains]
            halves = [each.half or 0.0 for each in gains.values()]
            at.errorbar([g.mean for g in gains.values()], where, xerr=halves, fmt="o", markersize=4, color="#0072B2")
            at.set(title=kind, xlabel=f"loss less that of {baseline} (nats per token)", yticks=range(len(names)))
            at.set_yticklabels(names)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def main() -> None:
    """Write tables and pictures."""
    tables = {path.stem: read(path) for path in sorted(FOLDER.glob("*.jsonl"))}
    PAGE.write_text(filled(PAGE.read_text("utf-8"), tables), "utf-8")
    for name, lines in tables.items():
        draw(lines, FOLDER / f"{name}.svg", BASELINES.get(name, "random"))


if __name__ == "__main__":
    main()
