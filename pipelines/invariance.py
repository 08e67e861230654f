"""`dataflex doctor --gradients`: whether padding or the rest of a batch moves the gradients of a run's rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from dataflex import distributed
from dataflex.config.settings import Settings
from dataflex.errors import ConfigError
from dataflex.features.engine import FeatureEngine
from dataflex.features.invariance import Moved, chosen_rows, moved
from dataflex.live.state import numerics
from dataflex.pipelines.featurize import run_until_update
from dataflex.schedule import Round, Schedule
from dataflex.trainers.directing import DirectedTrainer, OwnStep
from dataflex.trainers.weighing import Weighing

log = logging.getLogger(__name__)

EAGER = "eager"
"""The attention that `flash_attn: disabled` asks for: plain matrix products and a mask."""


@dataclass
class Invariance:
    """What was found.

    Attributes:
        lengths: tokens of each row that was looked at.
        attention: the attention of the model, as Transformers calls it.
        precision: what the forward pass is computed in: float32, tf32, bfloat16, float16, float64.
        moved: by condition, how far values move.
        under_eager: the same under eager attention; empty where the model has that already, or cannot be switched.
    """

    lengths: list[int] = field(default_factory=list)
    attention: str = ""
    precision: str = ""
    moved: dict[str, Moved] = field(default_factory=dict)
    under_eager: dict[str, Moved] = field(default_factory=dict)


def asks_for_gradients(settings: Settings) -> bool:
    """Say whether a run's methods, or its run file, ask for gradients of single examples."""
    methods = [each for each in (settings.new_method(), settings.new_weighter()) if each is not None]
    specs = [need.spec for need in settings.needs] + [spec for each in methods for spec in each.asked]
    return any(spec.gradient for spec in [*specs, *settings.dataflex.features])


def look(settings: Settings) -> Invariance:
    """Load the run's model and rows, and compute a few rows' gradients in several ways. Call it on every rank.

    Raises:
        ConfigError: no row has a supervised token.
    """
    nothing: dict[str, Any] = {"component": None, "component_name": None, "params": None, "needs": ()}
    nothing |= {"weighter": None, "weighter_params": None, "schedule": Schedule(train_step=1)}
    nothing |= {"prefilter": None, "prefilter_params": None}
    bare = settings.model_copy(update=nothing)
    found = Invariance()
    run_until_update(bare, InvarianceDirector.verb, partial(InvarianceDirector, found, settings.dataflex.token_budget))
    return found


class InvarianceDirector:
    """A `dataflex.trainers.directing.RoundDirector` that stops before the first step.

    Args:
        found: takes what is found.
        token_budget: tokens of a batch.
        trainer: which does not train.
        checkpoint: none.
    """

    verb = "doctor"
    start: str | None = None
    weighing: Weighing | None = None
    own_step: OwnStep | None = None
    acts_from, steps_kept = 0, 0

    def __init__(self, found: Invariance, token_budget: int, trainer: DirectedTrainer, checkpoint: str | None):
        self._found, self._token_budget, self._trainer = found, token_budget, trainer

    @property
    def rounds(self) -> Sequence[Round]:
        """The one round that is never begun."""
        return self._trainer.rounds

    def decide(self, round: Round) -> None:
        """Look, and stop."""
        trainer, rows = self._trainer, self._trainer.row_sets.train
        eligible = np.flatnonzero(rows.supervised > 0)
        if not len(eligible):
            raise ConfigError("dataset: found no row with a supervised token; check template and cutoff_len")
        chosen = eligible[chosen_rows(rows.length[eligible], self._token_budget)]
        if len(chosen) == 1:  # a batch of its own has to have another row
            chosen = np.repeat(chosen, 2)
        examples = [rows.examples[int(row)] for row in chosen]
        pad = trainer.processing_class.pad_token_id or 0
        longest = int(rows.length[chosen].max())
        engine = FeatureEngine(
            trainer.model, pad_token_id=pad, token_budget=len(chosen) * longest, autocast=trainer.accelerator.autocast
        )
        about = numerics(trainer)
        self._found.lengths = [int(rows.length[row]) for row in chosen]
        self._found.attention = about["attention"]
        self._found.precision = _precision(about)
        said = "gradients of %d rows under %s in %s: alone, padded, in one batch"
        log.info(said, len(examples), self._found.attention, self._found.precision)
        self._found.moved = moved(engine, examples, pad)
        model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        if about["attention"] != EAGER and hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(EAGER)
            if model.config._attn_implementation == EAGER:  # some models have no choice, and say so
                self._found.under_eager = moved(engine, examples, pad)
            model.set_attn_implementation(about["attention"])

    def saved(self, checkpoint: str) -> dict[str, Any]:
        """Return nothing: no checkpoint is written."""
        return {}

    def finish(self) -> None:
        """Let the processes meet, so that none is gone while another computes."""
        distributed.barrier()


def _precision(about: dict[str, Any]) -> str:
    weights = str(about["weights"]).removeprefix("torch.")
    name = weights if about["autocast"] == "none" else str(about["autocast"])
    return "tf32" if name == "float32" and torch.cuda.is_available() and _takes_tf32() else name


def _takes_tf32() -> bool:
    matmul: Any = torch.backends.cuda.matmul
    # Asked in the newer way where there is one: once it was used, the older one raises an error.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"
