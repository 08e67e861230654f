"""Pictures of runs, each an SVG element of the page. Colours are told apart by the colour-blind too (Okabe and Ito)."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
import pyarrow.compute as pc
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from dataflex.pipelines.reporting.arrays import Arrays
from dataflex.pipelines.reporting.svg import INK, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#7F7F7F", "#B8A000")
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "dataflex", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9,
    "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.7, "lines.linewidth": 1.4, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.prop_cycle": cycler(color=_COLOURS), "axes.unicode_minus": False,
}  # fmt: skip
_POINTS = 700
"""Rows that a scatter shows, drawn evenly; its line is of all."""
_LONGEST_NAME = 28
_BINS = 16
_STEPS = 400
_SHADES = 20
_ROW = 40
"""Letters that the names under a picture may have together, upright."""


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw as the page does; a letter that the measuring font lacks is no news, the reader's font has it."""
    quiet = logging.getLogger("matplotlib")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with mpl.rc_context(_STYLE), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            yield
    finally:
        quiet.setLevel(level)


def losses(runs: Mapping[str, Arrays], name: str) -> str | None:
    """Draw the training and evaluation losses of runs over steps; None where none was logged."""
    figure, axes = _axes()
    is_any = False
    for colour, (label, arrays) in zip(_cycle(len(runs)), runs.items(), strict=True):
        table = arrays.run.losses()
        steps = table["step"].to_numpy()
        for column, line, said in (("loss", "-", label), ("eval_loss", "--", None)):
            values = _floats(table[column])
            has = np.isfinite(values)
            if has.any():
                mark = "o" if has.sum() < 30 else ""
                axes.plot(
                    steps[has],
                    values[has],
                    line,
                    color=colour,
                    label=said and _short(said),
                    marker=mark,
                    markersize=2.5,
                )
                is_any = True
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    if len(runs) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1.02))
    return inline(figure, name, "Training loss (solid) and evaluation loss (dashed) over steps") if is_any else None


def sources(arrays: Arrays, name: str) -> str | None:
    """Draw the rows of each round by source, the pool's shares first; None without rounds or with one source."""
    labels, found = arrays.by_source
    names, codes = arrays.sources
    if not len(labels) or len(names) < 2:
        return None
    pool = np.bincount(codes[codes >= 0], minlength=len(names))
    rows = np.vstack([pool, found]).astype(float)
    shares = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1)
    figure, axes = _axes()
    places = np.arange(len(shares), dtype=float)
    places[0] -= 0.5
    below = np.zeros(len(shares))
    for number, (source, colour) in enumerate(zip(names, _cycle(len(names)), strict=True)):
        axes.bar(places, shares[:, number], 0.85, bottom=below, color=colour, label=_short(source))
        below += shares[:, number]
    _ticks(axes, places, ["pool", *(each.replace("update ", "") for each in labels)])
    axes.set(xlabel="update", ylabel="share of rows", ylim=(0, 1))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1.02))
    return inline(figure, name, "Rows by source in the pool and in every round")


def spread(arrays: Arrays, name: str) -> str | None:
    """Draw how scores spread at each update, in the pool and among the rows chosen; None without scores."""
    if arrays.last is None:
        return None
    labels, pool, chosen = arrays.spread()
    if not labels:
        return None
    figure, axes = _axes()
    at = np.arange(len(labels))
    for values, colour, said, shift in ((pool, _COLOURS[7], "pool", -0.12), (chosen, _COLOURS[0], "chosen", 0.12)):
        axes.vlines(at + shift, values[:, 0], values[:, 4], color=colour, linewidth=1)
        axes.vlines(at + shift, values[:, 1], values[:, 3], color=colour, linewidth=4, label=said)
        axes.plot(at + shift, values[:, 2], "o", color=INK, markersize=2.5)
    _ticks(axes, at, labels)
    axes.set(xlabel="update", ylabel="score")
    axes.legend()
    return inline(figure, name, "Scores of pool and chosen rows at each update: median, middle half, 5 to 95 percent")


def spread_by_source(arrays: Arrays, name: str) -> str | None:
    """Draw how scores spread in each source at the last update; None without scores, or with one source."""
    if arrays.last is None or len(arrays.sources[0]) < 2:
        return None
    labels, values = arrays.spread_by_source()
    figure, axes = _axes()
    at = np.arange(len(labels))[::-1]
    axes.hlines(at, values[:, 0], values[:, 4], color=_COLOURS[0], linewidth=1)
    axes.hlines(at, values[:, 1], values[:, 3], color=_COLOURS[0], linewidth=4)
    axes.plot(values[:, 2], at, "o", color=INK, markersize=3)
    axes.set_yticks(at, [_short(label) for label in labels])
    axes.set(xlabel="score at the last update")
    return inline(figure, name, "Scores by source at the last update: median, middle half, 5 to 95 percent")


def overlap(arrays: Arrays, name: str) -> str | None:
    """Draw how much any two updates chose alike; None of fewer than two updates."""
    labels, values = arrays.overlap
    return None if len(labels) < 2 else matrix(labels, values, name, "update", "Overlap of the rows two updates chose")


def matrix(labels: Sequence[str], values: np.ndarray, name: str, what: str, said: str) -> str:
    """Draw shares between 0 and 1 of pairs as a matrix, with figures where there is room."""
    size = len(labels)
    figure, axes = _axes(width=4.4, height=2.7)
    edges = np.arange(size + 1) - 0.5
    colours = mpl.colormaps["cividis"].resampled(_SHADES)
    mesh = axes.pcolormesh(edges, edges, values, cmap=colours, vmin=0, vmax=1)
    if size <= 8:
        for row in range(size):
            for column in range(size):
                share = values[row, column]
                if np.isfinite(share):
                    dark = "#ffffff" if share < 0.55 else "#101010"
                    axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=dark, fontsize=8)
    else:
        bar = figure.colorbar(mesh, ax=axes, label="share in both", fraction=0.046)
        assert bar.solids is not None
        bar.solids.set_rasterized(False)  # a picture in a picture, which the page's policy forbids
    _ticks(axes, np.arange(size), labels)
    axes.set_yticks(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()])
    axes.set(xlabel=what, aspect="equal")
    axes.invert_yaxis()
    return inline(figure, name, said)


def times(arrays: Arrays, name: str) -> str | None:
    """Draw how many rows were chosen how often; None of fewer than two updates."""
    count = len(arrays.updates)
    if count < 2:
        return None
    found = np.bincount(arrays.times, minlength=count + 1)
    figure, axes = _axes()
    axes.bar(np.arange(len(found)), found, 0.8, color=_COLOURS[0])
    for at in (0, len(found) - 1):
        axes.text(at, found[at], f"{found[at]:,}", ha="center", va="bottom", fontsize=8)
    axes.set(xlabel=f"updates that chose a row (of {count})", ylabel="rows")
    if _is_wide(found):
        _logarithmic(axes, "y")
    _ticks(axes, np.arange(len(found)), [str(i) for i in range(len(found))])
    return inline(figure, name, "Rows by the number of updates that chose them: never on the left, always on the right")


def against(arrays: Arrays, what: str, name: str) -> str | None:
    """Draw scores of the last update against `tokens` or the gradient's `norm`; None where one is not known."""
    last = arrays.last
    if last is None:
        return None
    values = arrays.tokens if what == "tokens" else last.norm
    has = np.flatnonzero(np.isfinite(values) & np.isfinite(last.pool))
    if len(has) < 3 or np.ptp(values[has]) == 0:
        return None
    figure, axes = _axes()
    shown = has[np.linspace(0, len(has) - 1, min(len(has), _POINTS)).astype(int)]
    chosen = has[last.chosen[has] > 0]
    some = (
        chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), _POINTS // 2)).astype(int)] if len(chosen) else chosen
    )
    axes.plot(values[shown], last.pool[shown], ".", color=_COLOURS[7], markersize=2, alpha=0.5, label="pool")
    axes.plot(values[some], last.pool[some], ".", color=_COLOURS[1], markersize=4, label="chosen")
    middles, medians = _medians(values[has], last.pool[has])
    axes.plot(middles, medians, "-", color=_COLOURS[0], label="median of all rows")
    said = "tokens of the row" if what == "tokens" else "norm of the row's gradient"
    axes.set(xlabel=said, ylabel="score")
    if (values[has] > 0).all() and np.quantile(values[has], 0.99) > 20 * np.quantile(values[has], 0.05):
        _logarithmic(axes, "x")
    axes.legend()
    return inline(figure, name, f"Score against {said}, at the last update")


def shares(arrays: Arrays, name: str) -> str | None:
    """Draw the shares of domains over steps; None where no mixer set any."""
    steps, domains, found = _series(arrays, "proportions")
    if not len(steps):
        return None
    figure, axes = _axes()
    # The last shares hold to the end of the training.
    end = max(int(arrays.run.summary.get("steps", 0)), *(line["step"] for line in arrays.run.log), int(steps[-1]) + 1)
    steps, found = np.append(steps, end), np.vstack([found, found[-1:]])
    axes.stackplot(
        steps, np.nan_to_num(found).T, labels=[_short(d) for d in domains], colors=_cycle(len(domains)), step="post"
    )
    axes.set(xlabel="optimizer step", ylabel="share", ylim=(0, 1), xlim=(steps[0], steps[-1]))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1.02))
    return inline(figure, name, "Shares of domains over steps")


def signals(arrays: Arrays, name: str) -> list[tuple[str, str]]:
    """Draw what else a mixer recorded by domain, such as losses and rewards: (what, picture) each."""
    table = arrays.run.shares()
    known = pc.unique(table["name"]).to_pylist()
    found = []
    for number, what in enumerate(
        each for each in known if each not in ("proportions", "rows_before", "tokens", "nonfinite_tokens")
    ):
        steps, domains, values = _series(arrays, what)
        figure, axes = _axes()
        for at, (domain, colour) in enumerate(zip(domains, _cycle(len(domains)), strict=True)):
            axes.plot(steps, values[:, at], color=colour, label=_short(domain))
        axes.set(xlabel="optimizer step", ylabel=_short(what))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1.02))
        found.append((what, inline(figure, f"{name}-{number}", f"{what} by domain over steps")))
    return found


def weights(arrays: Arrays, name: str) -> str | None:
    """Draw how the factors of losses spread over steps; None where no weighter set any."""
    lines = [line for line in arrays.run.log if "dataflex/weight_max" in line]
    if not lines:
        return None
    figure, axes = _axes()
    steps = [line["step"] for line in lines]
    for key, said in (("max", "largest factor"), ("mean", "mean factor"), ("ess", "effective share of the batch")):
        if any(f"dataflex/weight_{key}" in line for line in lines):
            axes.plot(steps, [float(line.get(f"dataflex/weight_{key}", np.nan)) for line in lines], label=said)
    axes.set(xlabel="optimizer step", ylabel="factor")
    axes.legend()
    return inline(figure, name, "Spread of the factors of losses over steps")


def _series(arrays: Arrays, what: str) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return steps, domains, and (steps, domains) values of what a mixer recorded; of many steps some, evenly."""
    table = arrays.run.shares()
    some = table.filter(pc.equal(table["name"], what))
    has = set(pc.unique(some["domain"]).to_pylist())
    domains = [name for name in pc.unique(table["domain"]).to_pylist() if name in has]  # in one order throughout
    steps, at = np.unique(some["step"].to_numpy(), return_inverse=True)
    place = {name: number for number, name in enumerate(domains)}
    found = np.full((len(steps), len(domains)), np.nan)
    found[at, [place[name] for name in some["domain"].to_pylist()]] = some["value"].to_numpy()
    shown = np.unique(np.linspace(0, max(len(steps) - 1, 0), min(len(steps), _STEPS)).round().astype(int))
    return steps[shown], domains, found[shown]


def _axes(width: float = 5.2, height: float = 2.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color=INK, alpha=0.13, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _ticks(axes: Axes, places: np.ndarray, labels: Sequence[str]) -> None:
    """Name places, but no more than fit."""
    every = max(1, -(-len(labels) // 16))
    named = [_short(label) for label in labels[::every]]
    axes.set_xticks(places[::every], named)
    if sum(map(len, named)) > _ROW:
        for label in axes.get_xticklabels():
            label.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Scale an axis by logarithms, its numbers written out: the usual powers would need mathematical type."""
    axes.set_xscale("log") if which == "x" else axes.set_yscale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())


def _medians(values: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle of bins with equally many rows, and the median score in each."""
    order = np.argsort(values, kind="stable")
    bins = [part for part in np.array_split(order, min(_BINS, len(order))) if len(part)]
    return np.array([np.median(values[part]) for part in bins]), np.array([np.median(scores[part]) for part in bins])


def _is_wide(counts: np.ndarray) -> bool:
    some = counts[counts > 0]
    return bool(len(some) > 1 and some.max() > 50 * some.min())


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _short(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(text)).strip()
    # What begins with an underscore, matplotlib leaves out of a legend.
    text = "\u200b" + text if text.startswith("_") else text
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def _floats(column: Any) -> np.ndarray:
    found: np.ndarray = column.to_numpy()
    return found.astype(np.float64)
