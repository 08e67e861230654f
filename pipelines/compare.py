"""`dataflex compare`: train several methods alike, measure them on rows that none has seen, and say what came out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.config import load
from dataflex.errors import ConfigError, DataflexError, UnavailableError
from dataflex.pipelines.comparing.arms import arms_of
from dataflex.pipelines.comparing.keeping import Keeping
from dataflex.pipelines.comparing.kept import Kept
from dataflex.pipelines.comparing.once import Once
from dataflex.pipelines.comparing.outlook import Outlook
from dataflex.pipelines.comparing.plans import Plan, plans_of, tasks_of
from dataflex.pipelines.comparing.records import SCHEMA, records, several_devices
from dataflex.pipelines.comparing.running import Outcome, alone, processes, run_all, shares
from dataflex.pipelines.comparing.table import Line, lines, plain, shown
from dataflex.pipelines.comparing.trials import Trial, trials_of
from dataflex.pipelines.comparing.walls import Walls
from dataflex.pipelines.report import Compared, report
from dataflex.pipelines.reporting.between import Held
from dataflex.whole import replacing

log = logging.getLogger(__name__)


def compare(
    run: Path,
    given: Sequence[str],
    methods: Sequence[str],
    seeds: int = 3,
    targets: Sequence[str] = (),
    target_seeds: int = 1,
    jobs: int = 1,
    once: int | None = None,
    keep: Path | None = None,
) -> list[Line]:
    """Train and measure every method under every seed, and write what came out under the run's `output_dir`.

    Every run is an ordinary one, in a folder of its own under `compare/`. One that was finished under the same identity
    is kept, one that was interrupted goes on. What several methods ask for at the first update is computed once.

    Args:
        run: the run file that all of them vary.
        given: `key=value` in place of the run file's values.
        methods: what is compared, see `dataflex.pipelines.comparing.arms`.
        seeds: trainings of each, from the run file's `seed` on.
        targets: target sets that methods are shown one at a time; none: those of the run file, together.
        target_seeds: draws of `dataflex.target_rows` for each method that is shown targets.
        jobs: runs at a time.
        once: rows that each method chooses once, for a fresh model to be trained on; None: it chooses as it trains.
        keep: a table of finished runs, which grows as they finish; what it has is not run again.

    Returns:
        The table, which is written as `compare.md` and `compare.json`; all runs stand in `compare.parquet`, and
        `report.html` is the page about them.

    Raises:
        ConfigError: a name, a number or a run file that follows is wrong; nothing was run then.
        MismatchError: a folder holds another run, or a finished one without the choice that it was trained on.
        CorruptionError: a line of the table that is kept is damaged.
        ConflictError: another comparison is at work in the folder.
        DataflexError: a run failed, or one that has finished could not be added to the table that is kept; the others
            were run, and the table tells of the missing ones.
        Interrupted: a signal asked for it.
    """
    base = load(run, given)
    if not base.dataflex.test_dataset:
        raise ConfigError(
            f"{run}: dataflex.test_dataset: found none; expected registered datasets, of rows that are neither trained "
            "on nor shown to a method, to measure each model on"
        )
    arms = arms_of(methods, base)
    out, devices = Path(base.llamafactory["output_dir"]), shares(jobs)
    count = processes(devices[0])
    chosen_once = None if once is None else Once.of(once, base, count)
    kept = None if keep is None else Kept(keep)
    trials = trials_of(run, given, arms, seeds, targets, target_seeds, base, chosen_once)
    plans = plans_of(trials, run, given, count, kept is not None)
    with alone(out / "compare") as held:
        parts = [part for plan in plans.values() for part in plan.parts]
        finished = {part.trial.name: part.trial.check(part.identity) for part in parts}  # all, before the first begins
        keeping = None if kept is None else Keeping(kept)
        known = {} if keeping is None else keeping.known(plans.values(), finished)
        todo = [plan for name, plan in plans.items() if name not in known and not finished[name]]
        for plan in todo:
            plan.trial.require_choice()
        ready = [trial for trial in trials if trial.name in known or finished[trial.name]]
        log.info("%d runs, %d of them finished before", len(trials), len(ready))
        outlook = Outlook([plan.trial for plan in todo], records(ready, known), jobs)
        walls = Walls(parts)

        def done(plan: Plan, seconds: float) -> None:
            walls.ended(plan, seconds)
            if plan.trial.name not in plans:  # a choice
                return
            whole = walls.whole(plan)
            if keeping is not None:
                keeping.add(plan, whole)
            outlook.finished(plan.trial, walls.seen(plan), whole is not None)

        outcome = run_all(tasks_of(todo, plans, finished, run, given, done), devices, held)
        found = records(trials, known)
        table = lines(trials, found)
        _write(out, found, table)
        _write_page(out, trials, table)
        if text := several_devices(found):
            log.warning("%s", text)
    _judge([trial for trial in trials if trial.name not in known], len(trials), outcome, out)
    if keeping is not None:
        keeping.judge()
    return table


def _write(out: Path, found: Sequence[Mapping[str, Any]], table: Sequence[Line]) -> None:
    """Write what came out: every run, and the table."""
    columns = {name: [record.get(name) for record in found] for name in SCHEMA.names}
    with replacing(out / "compare.parquet") as temporary:
        pq.write_table(pa.table(columns, schema=SCHEMA), temporary)
    with replacing(out / "compare.json") as temporary:
        temporary.write_text(json.dumps([plain(line) for line in table], indent=1) + "\n", "utf-8")
    with replacing(out / "compare.md") as temporary:
        temporary.write_text("\n".join(shown(table)) + "\n", "utf-8")


def _write_page(out: Path, trials: Sequence[Trial], table: Sequence[Line]) -> None:
    """Write the page about all runs that were trained to their end: those of the first seeds in detail."""
    done = [trial for trial in trials if trial.arm.is_trained and trial.summary is not None]
    if not done:
        return
    first: dict[tuple[str, str | None], Trial] = {}
    for trial in done:
        first.setdefault((trial.arm.name, trial.target), trial)
    folders = list(dict.fromkeys(trial.folder for trial in [*first.values(), *done]))
    held = [
        Held(line.arm, line.test, line.loss, line.gain, line.reward, line.seconds, line.loss.count if line.loss else 0)
        for line in table
    ]
    compared = Compared(held, [line.target for line in table])
    title = f"{', '.join(dict.fromkeys(line.arm for line in table))} compared"
    try:
        report(folders, out / "report.html", title, compared)
    except DataflexError as error:  # the table is there all the same
        log.warning("%s is not written: %s", out / "report.html", error)
    else:
        log.info("the page about all runs: %s", out / "report.html")


def _judge(trials: Sequence[Trial], count: int, outcome: Outcome, out: Path) -> None:
    """Raise if a run did not come to its end.

    Raises:
        UnavailableError: every one of them may be tried again as it is.
        DataflexError: another reason.
    """
    failed = [trial for trial in trials if trial.summary is None]
    if not failed:
        return
    codes = {outcome.codes.get(trial.name) for trial in failed}
    first = failed[0].name
    text = (
        f"compare: {len(failed)} of {count} runs did not finish; the first, {first}: "
        f"{outcome.reasons.get(first, 'it was not begun')}\n  the table in {out / 'compare.md'} is of the others; the "
        "same command runs what is missing"
    )
    raise UnavailableError(text) if codes == {75} else DataflexError(text)
