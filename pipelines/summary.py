"""What a run came to: rows, computed, reused, skipped by reason, bytes, seconds; for people and for machines."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from dataflex import distributed
from dataflex.access.speed import training_of
from dataflex.pipelines.run import Run

log = logging.getLogger(__name__)

TRAINED = "dataflex_summary.json"
"""In a run's folder: what its training came to."""


def write_summary(path: Path, verb: str, run: Run, about: dict[str, Any]) -> None:
    """Join the tallies of all ranks, write them on rank 0, and log one line. Collective."""
    seconds = time.monotonic() - run.since
    tallies = distributed.gather(run.access.tally)
    skipped: dict[str, int] = {}
    for tally in tallies:
        for reason, count in tally.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    counted = ("computed", "gradients", "tokens", "batches", "bytes")
    total = {name: sum(getattr(t, name) for t in tallies) for name in counted}
    chosen = sum(round.steps for round in run.updates) * run.trainer.global_batch
    speeds = [*run.access.speeds, *_of_steps(run)]
    summary = {
        "stage": verb,
        "seconds": float(f"{seconds:.2f}"),
        "feature_seconds": float(f"{tallies[0].seconds:.2f}"),
        "rows": len(run.rows),
        "target_rows": sum(len(rows) for rows in run.targets.values()),
        "dropped": None if run.rows.dropped is None else len(run.rows.dropped),
        "truncated": None if run.rows.truncated is None else int(run.rows.truncated.sum()),
        "without_labels": len(run.rows) - len(run.eligible),
        **total,
        "reused": tallies[0].reused,
        "gradients_per_chosen_row": float(f"{total['gradients'] / max(1, chosen):.3f}"),
        "skipped": skipped,
        "store": run.access.url,
        "speeds": speeds,
        **about,
    }
    if distributed.is_main():
        run.access.record.speeds = speeds
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    said = ", ".join(f"{reason} {count}" for reason, count in skipped.items()) or "none"
    log.info(
        "%s: %d rows and %d target rows; features computed %d, reused %d, unusable: %s; %d tokens, %.1f MB, %.1f s",
        verb, len(run.rows), summary["target_rows"], total["computed"], tallies[0].reused, said, total["tokens"],
        total["bytes"] / 1e6, seconds,
    )  # fmt: skip


def _of_steps(run: Run) -> list[dict[str, Any]]:
    """Return how fast the steps were taken; a row counts as the mean row of the training set."""
    pace = run.trainer.pace
    tokens = round(pace.steps * run.trainer.global_batch * float(run.rows.length.mean()) / distributed.world())
    took = {"steps": pace.steps, "tokens": tokens, "seconds": float(f"{pace.seconds:.4f}")}
    return [{"of": training_of(run.state), **took}] if pace.steps else []
