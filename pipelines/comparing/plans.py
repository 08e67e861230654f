"""How the runs of a comparison are made: their commands, what each waits for, and what is computed once for several."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.config.paths import names
from dataflex.errors import ConfigError
from dataflex.features.spec import FeatureSpec
from dataflex.fingerprint import digest
from dataflex.fingerprint import plain as as_plain
from dataflex.pipelines.comparing.running import Task
from dataflex.pipelines.comparing.trials import Trial
from dataflex.trainers.journal import Journal
from dataflex.whole import replacing


@dataclass(frozen=True)
class Plan:
    """A run that may have to be made.

    Attributes:
        trial: the run.
        of: the run whose lengths it has, or None.
        choice: of the run that chooses its rows, or None.
        command: makes it.
        identity: what its result depends on.
        everywhere: the same by content alone; None where no table is kept.
    """

    trial: Trial
    of: Trial | None
    choice: Plan | None
    command: list[str]
    identity: dict[str, Any]
    everywhere: dict[str, Any] | None = None

    def begin(self) -> None:
        """Write down what it is, and what it needs."""
        if self.of is not None:
            _write_lengths(self.trial, self.of)
        self.trial.note(self.identity, self.command)

    @property
    def parts(self) -> list[Plan]:
        """What is made for it: the choice first."""
        return [*([self.choice] if self.choice is not None else []), self]


def plans_of(
    trials: Sequence[Trial], run: Path, given: Sequence[str], processes: int, is_kept: bool
) -> dict[str, Plan]:
    """Plan every run, by its name.

    Args:
        trials: the runs.
        run: the run file that all of them vary.
        given: what the command line puts in place of its values.
        processes: that each is trained by.
        is_kept: whether a table is kept, which asks for identities by content.

    Raises:
        ConfigError: a run is to have the lengths of what chooses no rows.
    """
    found = {}
    for trial in trials:
        of = _mirrored(trial, trials)
        choice = None
        if trial.choice is not None:
            of = None if of is None else of.choice
            keys = _lengths_of(trial.choice, of)
            command = trial.choice.command(run, given, keys)
            choice = Plan(trial.choice, of, None, command, trial.choice.identity(of, processes))
        command = trial.command(run, given, {} if choice is not None else _lengths_of(trial, of))
        everywhere = trial.identity(of, processes, is_portable=True) if is_kept else None
        own = of if choice is None else None
        found[trial.name] = Plan(trial, own, choice, command, trial.identity(of, processes), everywhere)
    return found


def tasks_of(
    todo: Sequence[Plan],
    plans: Mapping[str, Plan],
    finished: Mapping[str, bool],
    run: Path,
    given: Sequence[str],
    done: Callable[[Plan, float], None],
) -> list[Task]:
    """Return what is to be run, in order: before a run what it is made of, and what it shares with others.

    Args:
        todo: the runs to make.
        plans: all of them, by name.
        finished: by name of a run or a choice, whether it lies finished in its folder.
        run: the run file.
        given: what the command line puts in place of its values.
        done: called with each run of `todo`, and each choice of one, that has ended well, and its seconds.
    """
    every = {part.trial.name: part for plan in plans.values() for part in plan.parts}
    wanted: dict[str, Plan] = {}

    def want(part: Plan) -> None:
        if part.of is not None and not finished[part.of.name]:
            want(every[part.of.name])  # its result may be known from a table, and its rows not
        wanted.setdefault(part.trial.name, part)

    for plan in todo:
        for part in plan.parts:
            if part is plan or not finished[part.trial.name]:
                want(part)
    shared = _shared(run, given, [part.trial for part in wanted.values()])
    reported = {part.trial.name for plan in todo for part in plan.parts}
    found: dict[str, Task] = {}
    for name, part in wanted.items():
        trial = part.trial
        if name in shared:
            found.setdefault(shared[name].name, shared[name])
        needs = [each.name for each in (part.of, trial.choice) if each is not None and each.name in wanted]
        after = [shared[name].name] if name in shared else []
        ended = _ended(done, part) if name in reported else _nothing
        found[name] = Task(
            trial.name, part.command, trial.log, trial.folder, trial.verb, after, needs, part.begin, ended
        )
    return list(found.values())


def _ended(done: Callable[[Plan, float], None], plan: Plan) -> Callable[[float], None]:
    return lambda seconds: done(plan, seconds)


def _nothing(seconds: float) -> None:
    """Do nothing at the end of what is run for another's sake."""


def _shared(run: Path, given: Sequence[str], trials: Sequence[Trial]) -> dict[str, Task]:
    """Return, by the name of a run, the featurize of what it and others ask for of the same model at the first update.

    Features are found by content, so a run that was grouped with others in vain computes its own. Choices are not
    grouped: what each costs is asked of them, and all of it would be the featurize's.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.num is None and trial.settings.train_type == "dynamic_select" and _live(trial):
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
    """Return the run whose lengths a run has: of the same seed, target and draw.

    Raises:
        ConfigError: it chooses no rows.
    """
    if trial.arm.mirrors is None:
        return None
    wanted = trial.arm.mirrors, trial.seed, trial.target, trial.target_seed
    of = next(each for each in trials if (each.arm.name, each.seed, each.target, each.target_seed) == wanted)
    if of.settings.train_type != "dynamic_select":
        raise ConfigError(f"--methods: {trial.arm.name}: {of.arm.name} chooses no rows whose lengths could be taken")
    return of


def _lengths_of(trial: Trial, of: Trial | None) -> dict[str, Any]:
    """Return the key that names the lengths of another run."""
    return {} if of is None else {"dataflex.params": {"lengths": str(_lengths_file(trial))}}


def _lengths_file(trial: Trial) -> Path:
    return trial.folder.with_name(f"{trial.folder.name}-lengths.parquet")


def _write_lengths(trial: Trial, of: Trial) -> None:
    """Write the lengths that another run chose, update by update, where there are any."""
    if of.num is not None:
        tokens = pq.read_table(of.chosen, columns=["tokens"])["tokens"]
        _put_lengths(trial, pa.table({"update": pa.array([0] * len(tokens), pa.int64()), "tokens": tokens}))
        return
    journal = Journal(of.folder / "rounds")
    parts: list[pa.Table] = []
    for number in journal.numbers():
        table = pq.read_table(journal.path(number))
        about = json.loads(table.schema.metadata[b"dataflex"])["round"]
        if about["kind"] == "update":
            tokens = table["tokens"]
            parts.append(pa.table({"update": pa.array([len(parts)] * len(tokens), pa.int64()), "tokens": tokens}))
    if parts:
        _put_lengths(trial, pa.concat_tables(parts))


def _put_lengths(trial: Trial, table: pa.Table) -> None:
    with replacing(_lengths_file(trial)) as temporary:
        pq.write_table(table, temporary)
