"""`dataflex plan`: what a run will need and cost, without a forward or a backward pass."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any, NoReturn

from dataflex import distributed
from dataflex.config.outputs import refuse_misplaced
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError
from dataflex.launch import one_device, processes
from dataflex.live.memory import Memory, default_folder
from dataflex.llamafactory import workflow
from dataflex.llamafactory.records import Sample
from dataflex.pipelines.featurize import QUIET
from dataflex.pipelines.planning.document import Planned
from dataflex.pipelines.planning.known_model import KnownModel, sharding_of
from dataflex.redaction import redacted
from dataflex.results.names import PLAN
from dataflex.trainers.directing import DirectedTrainer, Directing, Stopped
from dataflex.trainers.outline import Prepared
from dataflex.whole import replacing

log = logging.getLogger(__name__)

_STAGES = ("sft", "pt")


def plan(settings: Settings, sample: int | None = None) -> dict[str, Any]:
    """Return what a run will need and cost, and keep it as `PLAN` in its folder. Nothing under its store is written.

    Args:
        settings: the validated run file.
        sample: records of each dataset that are looked at, drawn at random; None: all.

    Raises:
        ConfigError: it is one process of several, or the rows of the run's stage are LLaMA-Factory's alone.
        DataflexError: the run could not begin: its data or its model cannot be loaded.
    """
    if distributed.world() > 1:
        raise ConfigError(
            f"plan: found {distributed.world()} processes; expected one. FORCE_TORCHRUN=1 with NPROC_PER_NODE tells "
            "how many the run will have"
        )
    if settings.llamafactory.get("stage", "sft") not in _STAGES:
        raise ConfigError(
            f"stage: found {settings.llamafactory['stage']}, whose rows are LLaMA-Factory's own; plan looks at those "
            f"of {' and '.join(_STAGES)}"
        )
    held_out = settings.llamafactory.get("val_size") or 0
    if sample is not None and held_out >= 1:
        raise ConfigError(
            f"--sample: found val_size: {held_out}, a number of rows; expected a share below 1, as some records "
            "stand for all. Plan without --sample"
        )
    refuse_misplaced(settings.llamafactory["output_dir"])
    count = processes(os.environ, bool(settings.llamafactory.get("deepspeed")))
    one_device(os.environ)  # LLaMA-Factory refuses several in one process
    return _Planning(settings, None if sample is None else Sample(sample), count).run()


class _Planning:
    """One call of `plan`."""

    def __init__(self, settings: Settings, sample: Sample | None, processes: int):
        self.settings, self.sample, self.processes = settings, sample, processes
        self.folder = Path(settings.llamafactory["output_dir"])
        self.schedule = settings.schedule if settings.train_type in ("dynamic_select", "dynamic_mix") else None
        self.known: KnownModel | None = None
        self.prepared: Prepared | None = None
        self.found: dict[str, Any] = {}
        self.begun = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Run the workflow up to where the model is loaded, or known."""
        scratch = self.folder / f".plan-{platform.node()}-{os.getpid()}"
        is_new = not self.folder.exists()
        arguments = {**self.settings.llamafactory, **QUIET, "output_dir": str(scratch)}
        arguments.pop("deepspeed", None)  # it would want a launcher, and changes neither rows nor names
        if self.schedule is not None:
            arguments.pop("max_steps", None)
        elif self.settings.keys.train_step:
            arguments["max_steps"] = self.settings.keys.train_step
        try:
            workflow.run(
                arguments,
                Directing(self.with_model, self.schedule),
                is_training=False,
                options=self.settings.dataflex,
                foresee=self.without_model,
                sample=self.sample,
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if is_new and self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
        with replacing(self.folder / PLAN) as temporary:
            temporary.write_text(json.dumps(self.found, indent=1) + "\n", "utf-8")
        return self.found

    def without_model(self, prepared: Prepared) -> None:
        """Plan, if what is asked of the model is remembered."""
        self.prepared = prepared
        self.known = KnownModel(self.settings, prepared, Memory(default_folder()))
        facts = self.known.recall()
        if facts is None:
            log.info("loading the model once, to name it; what names it is remembered")
            return
        self.plan(facts)
        raise Stopped

    def with_model(self, trainer: DirectedTrainer, checkpoint: str | None) -> NoReturn:
        """Plan, with the model there."""
        assert self.known is not None
        self.plan(self.known.find_out(trainer))
        raise Stopped

    def plan(self, facts: list[Any]) -> None:
        """Put together what there is to say."""
        assert self.prepared is not None
        assert self.known is not None
        # Left out above, and part of the run's identity all the same.
        self.prepared.training_args.deepspeed = self.settings.llamafactory.get("deepspeed")
        rows = None if self.sample is None else self.sample.scaled(self.prepared.sets.train)
        outline = self.prepared.outline(self.schedule, self.processes, rows)
        state = self.known.state(facts, outline, sharding_of(self.settings))
        planned = Planned(self.settings, outline, state, self.sample, self.processes)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        about = {"digest": planned.run.identity, "time": now, "took": round(time.monotonic() - self.begun, 2)}
        self.found = redacted(planned.document() | about)
