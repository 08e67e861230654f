"""What a model is worth on rows that it has not seen: the run's test sets, which no choice looks at."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex import distributed
from dataflex.access.fragments import Tally
from dataflex.features.spec import LossSpec
from dataflex.pipelines.run import Run
from dataflex.results.names import TEST, name_of
from dataflex.rows import Rows, Status
from dataflex.whole import replacing

log = logging.getLogger(__name__)


def measure(run: Run, folder: Path, verb: str = "train") -> dict[str, Any]:
    """Measure the live model on every test set and write each row's figures. Collective.

    The file has `dataset`, `record`, `row_key`, `tokens`, `loss_sum` in nats, and `reward` where one judges.
    The reward is null in the rows of a set whose prompts are not responded to.
    Losses stand in the stores under the model's own content, so a model is measured once however often it is asked for.
    A row without a supervised token has no loss and enters nothing; one whose loss is not finite makes its set's so.

    Args:
        run: the run.
        folder: takes the file: `test.parquet` of a training, `test_evaluate.parquet` of `evaluate`.
        verb: which measures.

    Returns:
        Test set -> rows, supervised tokens, `loss` (nats per supervised token of the whole set; None if it is not
        finite, by `nonfinite` rows) and, where the run file names a reward, its mean over the rows that it could score
        (`reward`, `scored`).
    """
    access = run.access
    kept, access.tally = access.tally, Tally()  # what measuring costs is no cost of the method
    try:
        tables = {name: _measured(run, name, rows) for name, rows in run.tests.items()}
    finally:
        access.tally = kept
    if tables and distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / name_of(TEST, verb)) as temporary:
            pq.write_table(pa.concat_tables(tables.values()), temporary, write_page_checksum=True)
    responded = run.settings.dataflex.responded_tests
    found = {name: _summary(table, name in responded) for name, table in tables.items()}
    for name, about in found.items():
        more = f", reward {about['reward']:.4g} of {about['scored']} responses" if about.get("scored") else ""
        loss = f"{about['loss']:.4f}" if about["loss"] is not None else f"not finite ({about['nonfinite']} rows)"
        log.info("test set %s: loss %s per token of %d rows%s", name, loss, about["rows"], more)
    return found


def _measured(run: Run, name: str, rows: Rows) -> pa.Table:
    """Return the figures of each row of a set. Collective."""
    spec = LossSpec()
    (store,) = run.access.ensure([spec], rows, nonfinite_limit=1.0)  # of a lost model the loss is NaN, and said so
    view = run.access.view(spec, rows, store, is_target=True)
    losses = np.where(view.status == Status.NONFINITE, np.nan, view.scalar("loss_sum").astype(np.float64))
    columns = {
        "dataset": pa.array([name] * len(rows), pa.string()),
        "record": rows.index,
        "row_key": pa.array([key.tobytes() for key in rows.keys], pa.binary(16)),
        "tokens": rows.supervised.astype(np.int64),
        "loss_sum": np.where(rows.supervised > 0, losses, 0.0),
    }
    responses, responded = run.settings.dataflex.test_responses, run.settings.dataflex.responded_tests
    if responses is not None:
        is_responded = name in responded
        rewards = run.access.rewards(responses, rows) if is_responded else np.full(len(rows), np.nan)
        columns["reward"] = pa.array(rewards, pa.float64(), mask=np.isnan(rewards))
    return pa.table(columns)


def _summary(table: pa.Table, is_responded: bool) -> dict[str, Any]:
    tokens, losses = table["tokens"].to_numpy(), table["loss_sum"].to_numpy()
    mean, lost = float(losses.sum() / tokens.sum()), int((~np.isfinite(losses)).sum())
    about: dict[str, Any] = {"rows": table.num_rows, "tokens": int(tokens.sum()), "loss": None if lost else mean}
    if lost:
        about["nonfinite"] = lost
    if is_responded:
        rewards = table["reward"].drop_null().to_numpy()
        about |= {"reward": float(rewards.mean()) if len(rewards) else None, "scored": len(rewards)}
    return about
