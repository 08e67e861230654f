"""What became of every record: a row that could be chosen, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow.compute as pc

from dataflex.pipelines.reporting.arrays import Arrays

MEANINGS = {
    "ok": "can be chosen",
    "no_labels": "no supervised token",
    "nonfinite": "features NaN or infinite at the last update",
    "dropped": "LLaMA-Factory made no row of it",
}


@dataclass(frozen=True)
class Statuses:
    """Records of the training set by what became of them.

    Attributes:
        counts: records, by status (`MEANINGS`).
        truncated: share of the rows that `cutoff_len` shortened; None where that is not known.
    """

    counts: Mapping[str, int]
    truncated: float | None

    @classmethod
    def of(cls, arrays: Arrays) -> Statuses:
        """Count the records of a run; without its map, what the summary says."""
        known = arrays.run.rows
        if known is None:
            summary = arrays.run.summary
            counts = {"no_labels": summary.get("without_labels") or 0, "dropped": summary.get("dropped") or 0}
            cut, rows = summary.get("truncated"), arrays.size
            share = cut / rows if cut is not None and rows else None
            return cls({"ok": rows - counts["no_labels"], **{k: v for k, v in counts.items() if v}}, share)
        some = known.filter(pc.equal(known["role"], "train"))
        found = {each["values"]: each["counts"] for each in pc.value_counts(some["status"]).to_pylist()}
        lost = arrays.updates[-1].info.get("nonfinite", 0) if arrays.updates else 0
        if lost:
            found["nonfinite"] = lost
            found["ok"] -= lost
        cut = pc.mean(some["truncated"].cast("int8")).as_py()
        return cls({name: found[name] for name in MEANINGS if found.get(name)}, cut)
