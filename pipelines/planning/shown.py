"""A plan as lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 3
"""Parts of the time that are named, the longest first; the rest is counted."""


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return the lines of a plan: data, schedule, what is there and what is computed, cost, notes."""
    about, schedule, totals = found["pool"], found["schedule"], found["totals"]
    method = found["method"] or "LLaMA-Factory's own order of rows"
    out = [f"{found['run']}: {found['train_type']}, {method}"]
    out.append(_line("pool", _set(about) + _lost(about)))
    out += [_line("target set", f"{name}: {_set(target)}") for name, target in found["targets"].items()]
    out += [_line("test set", f"{name}: {_set(test)}") for name, test in found["tests"].items()]
    if found["sample"] is not None:
        looked = ", ".join(
            f"{n:,} of {found['sample']['of'][name]:,}" for name, n in found["sample"]["records"].items()
        )
        out.append(_line("sampled", f"{looked} records; all numbers are scaled"))
    out.append(_line("steps", _steps(schedule)))
    if (before := found["prefilter"]) is not None:
        those = f"keeps {before['kept']:,} rows, and {before['tail']:,} of the others, drawn at each update"
        out.append(_line("prefilter", f"{before['method']}: {those}"))
    out += [_line("kept state", _state(state)) for state in found["states"]]
    out += ["", *_table(found["needs"])]
    out += ["", _line("train", _totals(totals)), *_time(found["seconds"])]
    ahead = found["featurize"]
    if ahead["computed"] or ahead["reused"]:
        out += [_line("featurize", _totals(ahead)), *_time(ahead["seconds"])]
    out.append(_line("store", found["store"]))
    return out + [_line("note", note) for note in found["notes"]]


def _line(name: str, text: str) -> str:
    return f"  {name:<11} {text}"


def _set(about: Mapping[str, Any]) -> str:
    twice = f" ({about['distinct']:,} distinct)" if about["distinct"] != about["rows"] else ""
    return f"{about['rows']:,} rows{twice}, {about['tokens']:,} tokens, {about['supervised']:,} supervised"


def _lost(about: Mapping[str, Any]) -> str:
    said = {name.replace("_", " "): about[name] for name in ("dropped", "truncated", "without_labels") if about[name]}
    return "".join(f", {count:,} {name}" for name, count in said.items())


def _steps(about: Mapping[str, Any]) -> str:
    parts = [f"{about['warmup_steps']:,} of warm-up"] if about["warmup_steps"] else []
    parts += [f"{about['updates']:,} updates"] if about["updates"] else []
    inside = f" ({', '.join(parts)})" if parts else ""
    done = f"; {about['done']:,} are done" if about["done"] else ""
    trained = f"{about['rows_trained']:,} rows trained on, about {about['tokens_trained']:,} tokens"
    return f"{about['steps']:,}{inside} of {about['global_batch']:,} rows: {trained}{done}"


def _state(about: Mapping[str, Any]) -> str:
    size = _bytes(about["bytes"])
    if about["exists"]:
        return f"{about['lineage'][:8]}: there, {about['step']:,} steps of warm-up are free"
    kept = f"will be kept, about {size}" if about["is_kept"] else "is not kept"
    return f"{about['lineage'][:8]}: not there; the end of the warm-up {kept}"


def _table(needs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each need, those that are free marked."""
    if not needs:
        return ["  no features are asked for"]
    rows = [("feature", "rows of", "model", "update", "there", "to compute", "values", "")]
    for need in needs:
        free = "free" if not need["missing"] else ""
        cells = need["feature"], need["of"], _short(need["state"]), _updates(need["update"])
        rows.append((*cells, f"{need['present']:,}", f"{need['missing']:,}", _bytes(need["bytes"]), free))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    out = []
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(row[4:7], widths[4:], strict=False)]
        out.append(f"  {'  '.join([*words, *numbers, row[7]])}".rstrip())
    return out


def _updates(numbers: Sequence[int]) -> str:
    if not numbers:
        return "-"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _totals(about: Mapping[str, Any]) -> str:
    """Say in a line how much is computed and how much is free."""
    if not about["computed"]:
        return f"nothing is computed; {about['reused']:,} values are there" if about["reused"] else "no features"
    ratio = about.get("gradients_per_chosen_row")
    trained = about.get("gradients_per_trained_row")
    each = f", {ratio:g} for each row chosen, {trained:g} for each row trained on" if ratio else ""
    passes = f"{about['forward']:,} forward and {about['gradients']:,} backward passes of rows{each}"
    size = f"{_bytes(about['bytes'])} of values in {_bytes(about['files'])} of files"
    return f"{about['computed']:,} values computed, {about['reused']:,} there; {passes}; {size}"


def _time(about: Mapping[str, Any]) -> list[str]:
    """Say how long it takes, what from, and what takes longest."""
    how = "as this machine worked before" if about["from"] == "measured" else "by arithmetic"
    if "flops_per_second" in about:
        how += f" at {about['flops_per_second']:.2g} FLOP/s, {about['share_of_product']:.0%} of a matrix product's"
    parts = sorted((part for part in about["details"] if part["seconds"]), key=lambda part: -part["seconds"])
    out = [_line("", f"about {_clock(about['estimate'])}, {how}")]
    out += [_line("", f"  {_clock(part['seconds']):>8}  {part['what']}") for part in parts[:_SHOWN]]
    left = sum(part["seconds"] for part in parts[_SHOWN:])
    return out + ([_line("", f"  {_clock(left):>8}  {len(parts) - _SHOWN} more")] if left else [])


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.1f} min" if minutes < 10 else f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _short(state: str) -> str:
    return state if len(state) <= 40 else f"…{state[-39:]}"
