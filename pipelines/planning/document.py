"""A plan as plain data: the form of docs/planning.md."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.access.feature_access import FeatureAccess
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError
from dataflex.features.spec import LossSpec
from dataflex.fingerprint import digest
from dataflex.live.known import KnownState
from dataflex.llamafactory.records import Sample
from dataflex.pipelines.identity import run_identity
from dataflex.pipelines.planning.asks import Ask, kept_rows, of_featurize, of_train
from dataflex.pipelines.planning.cost import Clock, Work
from dataflex.pipelines.planning.counting import Counting
from dataflex.pipelines.planning.naming import Naming
from dataflex.pipelines.planning.needs import Count, together
from dataflex.pipelines.planning.notes import notes_of
from dataflex.pipelines.planning.steps import steps_of
from dataflex.pipelines.run import Run
from dataflex.pipelines.selecting.warmup import WarmState
from dataflex.rows import Rows
from dataflex.stores.root import StoreRoot
from dataflex.stores.runs import Unrecorded, read_speeds
from dataflex.trainers.directing import DirectedTrainer
from dataflex.trainers.journal import Journal

FORMAT = 1
"""Version of the document; raised when a reader of the old one would misread the new."""


class Planned:
    """A run as it stands before it begins.

    Args:
        settings: its run file.
        outline: its trainer, which has rows and arguments and no model.
        state: what is known of its model.
        sample: the records that stand for all; None: all were looked at.
        processes: that will train.
    """

    def __init__(
        self,
        settings: Settings,
        outline: DirectedTrainer,
        state: KnownState,
        sample: Sample | None,
        processes: int,
    ):
        self.settings, self.state, self.sample, self.processes = settings, state, sample, processes
        self.folder = Path(settings.llamafactory["output_dir"])
        self.run = self._run(outline)
        self.steps = steps_of(self.run, settings, outline.args, processes, self._factor(self.run.rows))
        warm = WarmState(self.run, is_resumed=bool(self.steps.done)) if sample is None and self.run.rounds else None
        self.naming = Naming(self.run, state, warm)
        self._factors: dict[str | None, float] = {n: self._of_target(rows) for n, rows in self.run.targets.items()}
        self._factors[None] = self._factor(self.run.rows)

    def document(self) -> dict[str, Any]:
        """Return all that there is to say."""
        run, steps, naming = self.run, self.steps, self.naming
        train = Counting(naming, self._factors).count(of_train(run, self._skipped()))
        ahead = Counting(naming, self._factors).count(of_featurize(run))
        clock, mean = self._clock(), float(run.rows.length.mean())
        chosen = sum(round.steps for round in run.updates) * run.trainer.global_batch
        ratio = float(f"{train.gradients / max(1, chosen):.3f}")
        return {
            "format": FORMAT,
            "run": str(self.settings.path),
            "train_type": self.settings.train_type,
            "method": self.settings.component_name,
            "prefilter": self._prefilter(),
            "store": run.access.url,
            **self._data(),
            "schedule": steps.plain(mean),
            "needs": [asdict(need) for need in train.needs],
            "states": self._states(),
            "totals": {
                **train.totals(),
                "gradients_per_chosen_row": ratio,
                "gradients_per_trained_row": float(f"{train.gradients / max(1, steps.rows):.3f}"),
            },
            "featurize": {
                **ahead.totals(),
                "needs": [asdict(need) for need in ahead.needs],
                "seconds": clock.tell(self._ahead(clock, ahead, mean)),
            },
            "tests": {name: _about(rows, self._factor(rows)) for name, rows in run.tests.items()},
            "seconds": clock.tell(self._work(clock, train, mean)),
            "notes": notes_of(run, naming, self.sample, self.settings),
        }

    def _run(self, outline: DirectedTrainer) -> Run:
        """Put the run together as `open_run` does, over what is known of its model, and recording nothing."""
        settings, sets, state = self.settings, outline.row_sets, self.state
        method, weighter, prefilter = settings.new_method(), settings.new_weighter(), settings.new_prefilter()
        methods = [each for each in (method, weighter, prefilter) if each is not None]
        about = run_identity(settings, outline, state, methods) if self.sample is None else {}
        identity = digest(about) if about else ""
        root = StoreRoot(settings.store_root)
        record = Unrecorded(root.files, self.folder, "plan", identity)
        run = Run(
            settings=settings,
            trainer=outline,
            rounds=outline.rounds,
            rows=sets.train,
            targets=sets.targets,
            tests=sets.tests,
            eligible=np.flatnonzero(sets.train.supervised > 0),
            state=state,
            access=FeatureAccess(root, state, settings.dataflex, record, settings.llamafactory.get("cutoff_len", 2048)),
            journal=Journal(self.folder / "rounds"),
            method=method,
            weighter=weighter,
            prefilter=prefilter,
            identity=identity,
            about=about,
            since=time.monotonic(),
        )
        if not len(run.eligible):
            raise ConfigError("dataset: found no row with a supervised token; check template and cutoff_len")
        specs = [need.spec for need in run.declared] + list(settings.dataflex.features)
        if specs or run.tests:
            state.refuse_quantised(any(spec.gradient for spec in specs))
        return run

    def _prefilter(self) -> dict[str, Any] | None:
        """Return the prefilter, and how many distinct rows it lets through at an update."""
        options = self.settings.dataflex.prefilter
        if options is None:
            return None
        factor = self._factor(self.run.rows)
        head, tail = (round(count * factor) for count in kept_rows(self.run))
        return {"method": options.method, "kept": head, "tail": tail}

    def _skipped(self) -> set[int]:
        """Return the numbers of the rounds that a run which goes on from a checkpoint does not decide any more."""
        if not self.steps.done:
            return set()
        begun = {round.number for round in self.run.rounds if round.first_step < self.steps.done}
        return begun | {round.number for at, round in enumerate(self.run.updates) if at in self.naming.journal}

    def _work(self, clock: Clock, train: Count, mean: float) -> list[Work]:
        """Return what the training takes time for: passes, steps, and measuring in the end."""
        left = self.steps.steps_left(self.naming.warm_step if self._begins_kept else 0)
        steps = [clock.training(left, round(left * self.steps.global_batch * mean))] if left else []
        return [*map(clock.passes, together(train.passes)), *steps, *self._measuring(clock)]

    def _ahead(self, clock: Clock, ahead: Count, mean: float) -> list[Work]:
        """Return what featurize takes time for: passes, behind the warm-up if features depend on its end."""
        step, is_trained = self.naming.warm_step, self.run.is_live and not self.naming.is_kept
        warmup = [clock.training(step, round(step * self.steps.global_batch * mean))] if step and is_trained else []
        return [*warmup, *map(clock.passes, together(ahead.passes))]

    @property
    def _begins_kept(self) -> bool:
        """Whether the training starts from a kept state; trainings with a mixer or weighter do not look for one."""
        return self.naming.is_kept and not self.steps.done and self.settings.train_type == "dynamic_select"

    def _measuring(self, clock: Clock) -> list[Work]:
        """Return the passes over the test sets at the end of the training, whose model nobody knows yet."""
        found = []
        for name, rows in self.run.tests.items():
            ask = Ask((LossSpec(),), None, None, -1)
            for one in Counting(self.naming, {None: self._factor(rows)}, rows).count([ask]).passes:
                one.of = f"test set {name}"
                found.append(clock.passes(one))
        return found

    def _data(self) -> dict[str, Any]:
        """Return what the rows came to, scaled where only some of the records were looked at."""
        rows, factor = self.run.rows, self._factor(self.run.rows)
        about = _about(rows, factor)
        lost: dict[str, int | None] = {
            "without_labels": round((len(rows) - len(self.run.eligible)) * factor),
            "truncated": None if rows.truncated is None else round(int(rows.truncated.sum()) * factor),
            "dropped": None if rows.dropped is None else round(len(rows.dropped) * factor),
        }
        return {
            "rows": about["rows"],
            "tokens": about["tokens"],
            "pool": about | lost,
            "targets": {name: _about(some, self._of_target(some)) for name, some in self.run.targets.items()},
            "sample": None if self.sample is None else self.sample.plain(),
        }

    def _factor(self, rows: Rows) -> float:
        """Return how many rows each that was looked at stands for."""
        if self.sample is None or not len(rows):
            return 1.0
        return self.sample.scaled(rows) / len(rows)

    def _of_target(self, rows: Rows) -> float:
        """Return the same of a target set, of which no more are drawn than the run file says."""
        most = self.settings.dataflex.target_rows
        factor = self._factor(rows)
        return factor if self.sample is None or most is None else min(factor, most / max(1, len(rows)))

    def _states(self) -> list[dict[str, Any]]:
        """Return the kept state that the run begins from, or that it will keep."""
        naming = self.naming
        if naming.lineage is None or self.settings.train_type != "dynamic_select":
            return []
        is_kept = naming.is_kept or self.settings.dataflex.keep_warmup
        # The weights, and Adam's two moments twice: in the optimizer's state, and by name.
        size = self.state.trainable_size * (4 + 8 + 8)
        about = {"lineage": naming.lineage, "step": naming.warm_step, "exists": naming.is_kept}
        return [about | {"is_kept": is_kept, "bytes": size}]

    def _clock(self) -> Clock:
        recomputes = not self.run.trainer.model_arguments.disable_gradient_checkpointing
        speeds = [*_of_summaries(self.folder), *read_speeds(self.run.access.root.files)]
        return Clock(self.state, speeds, self.processes, recomputes)


def _about(rows: Rows, factor: float) -> dict[str, int]:
    """Return how many rows and tokens there are."""
    return {
        "rows": round(len(rows) * factor),
        "distinct": round(len(np.unique(rows.keys)) * factor),
        "tokens": round(int(rows.length.sum()) * factor),
        "supervised": round(int(rows.supervised.sum()) * factor),
        "longest": int(rows.length.max(initial=0)),
    }


def _of_summaries(folder: Path) -> list[Mapping[str, Any]]:
    """Return the speeds that earlier runs in a folder recorded: one that uses no store leaves them nowhere else."""
    found: list[Mapping[str, Any]] = []
    for name in ("dataflex_summary.json", "dataflex_featurize.json"):
        try:
            found += json.loads((folder / name).read_text("utf-8")).get("speeds", [])
        except (OSError, ValueError, AttributeError):
            continue
    return found
