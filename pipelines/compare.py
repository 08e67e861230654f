"""`dataflex compare`: train several methods alike, measure them on rows that none has seen, and say what came out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.config import load
from dataflex.config.paths import names
from dataflex.errors import ConfigError, DataflexError, UnavailableError
from dataflex.features.spec import FeatureSpec
from dataflex.fingerprint import digest
from dataflex.fingerprint import plain as as_plain
from dataflex.pipelines.comparing.arms import arms_of
from dataflex.pipelines.comparing.running import Outcome, Task, alone, processes, run_all, shares
from dataflex.pipelines.comparing.table import Line, lines, plain, records, shown
from dataflex.pipelines.comparing.trials import Trial, trials_of
from dataflex.pipelines.report import Compared, report
from dataflex.pipelines.reporting.between import Held
from dataflex.trainers.journal import Journal
from dataflex.whole import replacing

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        **dict.fromkeys(("arm", "target", "test", "folder"), pa.string()),
        **dict.fromkeys(("seed", "target_seed", "steps", "rows", "tokens", "scored"), pa.int64()),
        **dict.fromkeys(("computed", "reused", "gradients"), pa.int64()),
        **dict.fromkeys(("loss", "reward", "seconds", "feature_seconds", "gradients_per_chosen_row"), pa.float64()),
    }
)
"""Columns of `compare.parquet`: one row for each run and test set."""


def compare(
    run: Path,
    given: Sequence[str],
    methods: Sequence[str],
    seeds: int = 3,
    targets: Sequence[str] = (),
    target_seeds: int = 1,
    jobs: int = 1,
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

    Returns:
        The table, which is written as `compare.md` and `compare.json`; all runs stand in `compare.parquet`, and
        `report.html` is the page about them.

    Raises:
        ConfigError: a name, a number or a run file that follows is wrong; nothing was run then.
        MismatchError: a folder holds another run.
        ConflictError: another comparison is at work in the folder.
        DataflexError: a run failed; the others were run, and the table tells of the missing ones.
        Interrupted: a signal asked for it.
    """
    base = load(run, given)
    if not base.dataflex.test_dataset:
        raise ConfigError(
            f"{run}: dataflex.test_dataset: found none; expected registered datasets, of rows that are neither trained "
            "on nor shown to a method, to measure each model on"
        )
    arms = arms_of(methods, base)
    trials = trials_of(run, given, arms, seeds, targets, target_seeds, base)
    mirrored = {trial.name: _mirrored(trial, trials) for trial in trials}
    for trial, of in ((trial, mirrored[trial.name]) for trial in trials):
        if of is not None and of.settings.train_type != "dynamic_select":
            raise ConfigError(
                f"--methods: {trial.arm.name}: {of.arm.name} chooses no rows whose lengths could be taken"
            )
    out, devices = Path(base.llamafactory["output_dir"]), shares(jobs)
    with alone(out / "compare") as held:
        plans = [_plan(trial, mirrored[trial.name], run, given, processes(devices[0])) for trial in trials]
        finished = [plan.trial.check(plan.identity) for plan in plans]  # all of them before the first begins
        todo = [plan for plan, is_finished in zip(plans, finished, strict=True) if not is_finished]
        log.info("%d runs, %d of them finished before", len(trials), len(trials) - len(todo))
        outcome = Outcome()
        for wave in _waves(run, given, todo):
            done = run_all(wave, devices, held)
            outcome.codes |= done.codes
            outcome.reasons |= done.reasons
        found = records(trials)
        table = lines(trials, found)
        _write(out, found, table)
        _write_page(out, trials, table)
    _judge(trials, outcome, out)
    return table


@dataclass(frozen=True)
class _Plan:
    """A run that may have to be made.

    Attributes:
        trial: the run.
        of: the run whose lengths it has, or None.
        command: makes it.
        identity: what its result depends on.
    """

    trial: Trial
    of: Trial | None
    command: list[str]
    identity: dict[str, Any]

    def begin(self) -> None:
        """Write down what it is, and what it needs."""
        if self.of is not None:
            _write_lengths(self.trial, self.of)
        self.trial.note(self.identity, self.command)


def _plan(trial: Trial, of: Trial | None, run: Path, given: Sequence[str], count: int) -> _Plan:
    file = {} if of is None else {"dataflex.params": {"lengths": str(_lengths_file(trial))}}
    return _Plan(trial, of, trial.command(run, given, file), trial.identity(of, count))


def _waves(run: Path, given: Sequence[str], todo: Sequence[_Plan]) -> list[list[Task]]:
    """Return what is run together: features that several ask for and the runs, then those that mirror others."""
    first: list[Task] = []
    second: list[Task] = []
    shared = _shared(run, given, [plan.trial for plan in todo])
    for plan in todo:
        trial = plan.trial
        after = [shared[trial.name].name] if trial.name in shared else []
        task = Task(trial.name, plan.command, trial.log, trial.folder, trial.verb, after, plan.begin)
        (first if plan.of is None else second).append(task)
    ahead = list({task.name: task for task in shared.values()}.values())
    return [wave for wave in ([*ahead, *first], second) if wave]


def _shared(run: Path, given: Sequence[str], trials: Sequence[Trial]) -> dict[str, Task]:
    """Return, by the name of a run, the featurize of what it and others ask for of the same model at the first update.

    Features are found by content, so a run that was grouped with others in vain computes its own.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.settings.train_type == "dynamic_select" and _live(trial):
            arguments = {
                k: v for k, v in trial.settings.llamafactory.items() if k not in ("output_dir", "eval_dataset")
            }
            story = as_plain([arguments, trial.settings.schedule.warmup_step, trial.target_seed])
            groups.setdefault(digest(story), []).append(trial)
    tasks: dict[str, Task] = {}
    for name, group in groups.items():
        if len({trial.arm.name for trial in group}) < 2:
            continue
        head = group[0]
        specs = dict.fromkeys(spec for trial in group for spec in _live(trial))
        sets = dict.fromkeys(each for trial in group for each in names(trial.settings.llamafactory.get("eval_dataset")))
        folder = head.root / f"features-{name[:8]}"
        more: dict[str, Any] = {"dataflex.features": [spec.model_dump(mode="json") for spec in specs]}
        more |= {"eval_dataset": ",".join(sets)} if sets else {}
        command = replace(head, verb="featurize").command(run, given, {**more, "output_dir": str(folder)})
        what = f"features for {len(group)} runs, seed {head.seed} ({name[:8]})"
        task = Task(what, command, folder.with_name(f"{folder.name}.log"), folder, "featurize")
        tasks |= {trial.name: task for trial in group}
    return tasks


def _live(trial: Trial) -> list[FeatureSpec]:
    """Return the features of training rows that a run asks for of the model that it trains.

    Not what it writes and judges itself: a featurize is asked for the targets' features as well, and takes them both.
    """
    needs = trial.settings.needs
    return [need.spec for need in needs if need.state is None and need.of == "train" and not need.spec.rewards]


def _mirrored(trial: Trial, trials: Sequence[Trial]) -> Trial | None:
    """Return the run whose lengths a run has: of the same seed, and of the first target and draw."""
    if trial.arm.mirrors is None:
        return None
    return next(each for each in trials if (each.arm.name, each.seed) == (trial.arm.mirrors, trial.seed))


def _lengths_file(trial: Trial) -> Path:
    return trial.folder.with_name(f"{trial.folder.name}-lengths.parquet")


def _write_lengths(trial: Trial, of: Trial) -> None:
    """Write the lengths that another run chose, update by update, where there are any."""
    journal = Journal(of.folder / "rounds")
    parts: list[pa.Table] = []
    for number in journal.numbers():
        table = pq.read_table(journal.path(number))
        about = json.loads(table.schema.metadata[b"dataflex"])["round"]
        if about["kind"] == "update":
            tokens = table["tokens"]
            parts.append(pa.table({"update": pa.array([len(parts)] * len(tokens), pa.int64()), "tokens": tokens}))
    if parts:
        with replacing(_lengths_file(trial)) as temporary:
            pq.write_table(pa.concat_tables(parts), temporary)


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


def _judge(trials: Sequence[Trial], outcome: Outcome, out: Path) -> None:
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
        f"compare: {len(failed)} of {len(trials)} runs did not finish; the first, {first}: "
        f"{outcome.reasons.get(first, 'it was not begun')}\n  the table in {out / 'compare.md'} is of the others; the "
        "same command runs what is missing"
    )
    raise UnavailableError(text) if codes == {75} else DataflexError(text)
