"""`dataflex featurize`: compute ahead what the run's method will ask for at its first update."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dataflex import distributed
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError, CoverageError
from dataflex.features.spec import BASE, FeatureSpec
from dataflex.llamafactory import workflow
from dataflex.pipelines.run import open_run
from dataflex.pipelines.selecting.beginning import Begun, begin
from dataflex.pipelines.selecting.director import SelectingDirector
from dataflex.pipelines.selecting.pool import most_rows
from dataflex.pipelines.selecting.update import choose, looked_at
from dataflex.rows import Rows
from dataflex.schedule import Round
from dataflex.stores.search.faiss_cache import load_or_build
from dataflex.stores.search.faiss_index import kind_for, load_faiss
from dataflex.trainers.directing import DirectedTrainer, Directing, RoundDirector
from dataflex.trainers.rounds import DecidedRound

log = logging.getLogger(__name__)

QUIET: dict[str, Any] = {
    "do_train": True,
    "do_eval": False,
    "do_predict": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "early_stopping_steps": None,
    "report_to": "none",
    "plot_loss": False,
    "push_to_hub": False,
    "overwrite_output_dir": True,
    "resume_from_checkpoint": None,
}
"""What a run does beside changing its weights, left out."""


def featurize(settings: Settings, is_worker: bool = False) -> None:
    """Compute what is missing of the run's features into the stores. Call it on every rank.

    Any number of launches may do so at once, on any number of nodes: they share the work. Each ends when all is there.

    The model state is the checkpoints that the method names, or the end of the run file's own warm-up, which is run
    once and kept. Interrupt it at will: the next call goes on where it stopped, with any number of processes.

    Args:
        settings: the validated run file.
        is_worker: whether the warm-up, if features depend on its end, is to be another launch's.

    Raises:
        ConfigError: the method asks for no features, and `dataflex.features` names none.
        CoverageError: a worker finds no kept state; ConfigError: there can be none.
    """
    is_declared = settings.component is None or settings.component.declares_needs
    if is_declared and not settings.needs and not settings.dataflex.features:
        name = settings.component_name or "train_type: static"
        raise ConfigError(f"{name} asks for no features; name some under dataflex.features")
    run_until_update(settings, FeaturizeDirector.verb, partial(_directed, settings, is_worker))


def run_until_update(
    settings: Settings,
    verb: str,
    directed: Callable[[DirectedTrainer, str | None], RoundDirector],
    measures: bool = False,
) -> None:
    """Run the workflow up to the first update, leaving the run's own output folder as it is.

    Args:
        settings: the validated run file.
        verb: which is run.
        directed: makes the director.
        measures: whether the test sets are needed.
    """
    # One folder for all processes of a launch, another for every other launch at the same time, on whatever node.
    names = ("MASTER_ADDR", "MASTER_PORT") if distributed.world() > 1 else ()
    launch = [os.environ.get(name, "") for name in names] or [platform.node(), str(os.getpid())]
    scratch = Path(settings.llamafactory["output_dir"]) / f".{verb}-{re.sub(r'[^A-Za-z0-9.-]', '_', '-'.join(launch))}"
    arguments = {**settings.llamafactory, **QUIET, "output_dir": str(scratch)}
    arguments.pop("max_steps", None)
    measured = {} if measures else {"test_dataset": (), "test_reward": None}
    try:
        workflow.run(
            arguments,
            Directing(directed, settings.schedule, interrupts=True),
            is_training=False,
            options=settings.dataflex.model_copy(update=measured),
        )
    finally:
        if distributed.is_main():
            shutil.rmtree(scratch, ignore_errors=True)


def _directed(
    settings: Settings, is_worker: bool, trainer: DirectedTrainer, checkpoint: str | None
) -> FeaturizeDirector:
    begun = begin_to_update(settings, trainer, checkpoint, FeaturizeDirector.verb)
    waits = is_worker and begun.start is None and begun.run.rounds[0].kind == "warmup"
    if waits and begun.warm.lineage is None:
        raise ConfigError(
            "--worker: features depend on the end of a warm-up whose state cannot be kept, under DeepSpeed or a "
            "schedule of learning rates that follows losses; run `dataflex featurize` without --worker"
        )
    if waits:
        raise CoverageError(
            f"--worker: found no kept state of the end of the warm-up under {begun.run.access.url}; expected one, as "
            "every worker would train to it. Run `dataflex featurize` without --worker first: it may be stopped as "
            "soon as it says that the state is kept"
        )
    return FeaturizeDirector(begun)


def begin_to_update(
    settings: Settings, trainer: DirectedTrainer, checkpoint: str | None, verb: str, chosen: int = 0
) -> Begun:
    """Begin a run that ends at its first update. Collective.

    Args:
        settings: the validated run file.
        trainer: which trains the warm-up.
        checkpoint: to go on from, or None.
        verb: which is run.
        chosen: rows to be chosen at the update; 0: none.
    """
    run = open_run(settings, trainer, verb, trainer.rounds)
    if not run.is_live:  # no feature depends on the trained state, so there is no warm-up
        run = replace(run, rounds=[Round(0, "update", 0, 1, 0, 1)])
    those = "with labels" if run.prefilter is None else "behind dataflex.prefilter; raise its keep, or leave it out"
    too_many = f"--num: found {chosen}; expected at most {most_rows(run)}, the rows {those}"
    begun = begin(run, checkpoint, chosen, too_many)
    if not run.is_live:
        return replace(begun, start=None)
    if run.rounds[0].kind == "update" and not trainer.model_arguments.adapter_name_or_path:
        log.warning(
            "there is no warm-up and there are no checkpoints: at LoRA's initialisation B is zero and the "
            "gradients of A vanish. Set warmup_step, or name checkpoints"
        )
    return begun


class FeaturizeDirector(SelectingDirector):
    """Stops at the first update, with its features computed."""

    verb = "featurize"

    def decide(self, round: Round) -> DecidedRound | None:
        """Stop at the first update, its work done."""
        if round.kind == "warmup":
            return super().decide(round)
        self.warm.keep(round)
        self.at_update(round)
        return None

    def at_update(self, round: Round) -> None:
        """Compute every feature that the method or the run file asks for."""
        wanted = self._wanted(round)
        if not wanted:
            raise ConfigError(
                f"{self.settings.component_name or 'train_type: static'} asks for no features; "
                "name some under dataflex.features"
            )
        access = self.run.access
        with access.progress.showing(sum(access.passes(specs, rows) for specs, rows, _ in wanted)):
            found = [(specs, access.ensure(specs, rows, state)) for specs, rows, state in wanted]
        for specs, stores in found:
            for spec, store in zip(specs, stores, strict=True):
                if spec.is_indexed:
                    load_faiss()  # where it is missing, every rank says so
                    kind = kind_for(store, len(self.run.rows))
                    if distributed.is_main() and kind is not None:  # a larger store is streamed
                        load_or_build(store, kind=kind)
        if self.settings.train_type == "dynamic_select" and self.run.selector.is_adaptive:
            choose(self.run, round, round.steps * self.run.trainer.global_batch, is_at_most=True)
        distributed.barrier()

    def finish(self) -> None:
        """Write the summary beside the run's output."""
        self.summarise(Path(self.settings.llamafactory["output_dir"]) / f"dataflex_{self.verb}.json")

    def _wanted(self, round: Round) -> list[tuple[list[FeatureSpec], Rows, str | None]]:
        """List (features, rows, state), features of the same rows and state together: they share one pass.

        What the prefilter looks at is computed, so that it can say which rows go on. Collective.
        """
        run = self.run
        train = run.rows if run.prefilter is None else looked_at(run, round).rows
        states = list(dict.fromkeys(need.state for need in run.needs))
        if all(state == BASE for state in states):
            states.append(None)  # where the run file's own features are of
        out: list[tuple[list[FeatureSpec], Rows, str | None]] = []
        for state in states:
            more = () if state == BASE else self.settings.dataflex.features
            for of, sets in (("train", [train]), ("targets", list(run.targets.values()))):
                needed = [need.spec for need in run.needs if need.state == state and need.of == of]
                # What the run file names itself is of all rows, whatever goes on to the method.
                beside = more if train is run.rows or of == "targets" else ()
                specs = list(dict.fromkeys([*needed, *beside]))
                out += [(specs, rows, state) for rows in sets if specs]
            if train is not run.rows and more:
                out.append((list(more), run.rows, state))
        return out
