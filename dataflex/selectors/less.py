"""LESS: choose the rows whose training step points where the targets' gradients point.

N rows, J target sets, D stored width of a projected gradient, C checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dataflex.errors import ConfigError, CoverageError
from dataflex.features.spec import GradientSpec, Projection
from dataflex.rows import Status
from dataflex.selectors.base import Context, Need, Selection, View
from dataflex.selectors.rules import round_robin, top_k


class Less:
    """Score = aggregate over target sets of the mean cosine between a row's step and the set's gradients.

    Online (no `checkpoints`): the gradients of the live model at every update. Offline: a learning-rate weighted sum
    over given checkpoints, the same at every update.

    Source: LESS, arXiv 2402.04333, definition 3.1: sum over checkpoints first, then the mean within a target set, then
    the maximum over sets; the mean of cosines, as in the official code (not the cosine to the mean). Deviations: target
    sets may differ in size; the online form has one term, whose weight does not matter.
    """

    class Params(BaseModel):
        """Parameters of `less`."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        gradient_type: Literal["adam", "sgd"] = Field(
            "adam", description="training side: Adam's step, or the plain gradient"
        )
        adam_variant: Literal["pytorch", "less_reference", "precond_only"] = Field(
            "pytorch",
            description="pytorch: as torch.optim.AdamW; less_reference: epsilon inside the root, no bias correction",
        )
        proj_dim: int = Field(
            8192, ge=1, description="numbers kept per gradient; cosine error is about 1/sqrt(proj_dim)"
        )
        seed: int = Field(42, ge=0, description="seed of the random projection")
        projection: Literal["sjlt", "rademacher", "normal", "srht", "factorized", "identity"] = Field(
            "sjlt", description="random projection; see dataflex.features.spec.Projection"
        )
        sparsity: int = Field(1, ge=1, description="sjlt: non-zeros per coordinate")
        aggregation: Literal["max", "mean", "round_robin"] = Field(
            "max", description="over target sets: best set, mean of sets, or sets taking turns"
        )
        checkpoints: tuple[str, ...] = Field(
            (), description="offline: LLaMA-Factory checkpoint folders; empty: the live model"
        )
        weights: tuple[float, ...] | None = Field(
            None, description="offline: weight of each checkpoint; default: mean learning rate of its span of steps"
        )
        save_interval: int = Field(16, ge=1, description="accepted for compatibility; batches are filled by tokens")
        cache_dir: str | None = Field(
            None, description="root of the stores where neither dataflex.store nor DATAFLEX_HOME is set"
        )

        @model_validator(mode="after")
        def _weights_fit(self) -> Less.Params:
            given = self.weights
            if given is not None and (len(given) != len(self.checkpoints) or min(given) < 0 or sum(given) <= 0):
                raise ValueError("as many weights as checkpoints, each 0 or more, not all 0")
            return self

    def __init__(self, params: Params):
        self.params = params
        projection = Projection(type=params.projection, dim=params.proj_dim, seed=params.seed, sparsity=params.sparsity)
        self._train = GradientSpec(
            direction=params.gradient_type, adam_variant=params.adam_variant, projection=projection
        )
        self._target = GradientSpec(direction="sgd", projection=projection)

    def needs(self) -> list[Need]:
        """Need the training rows' steps and the targets' gradients, under one projection."""
        states = self.params.checkpoints or (None,)
        return [n for s in states for n in (Need(self._train, "train", s), Need(self._target, "targets", s))]

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Score every row and choose.

        Raises:
            ConfigError: there is no target set.
            CoverageError: a target set has no usable row, or too few rows can be chosen.
        """
        if not context.targets:
            raise ConfigError("eval_dataset: found none; less needs target rows: set eval_dataset or val_size")
        scores, ages = self._scores(context)
        keys = context.rows.keys
        if self.params.aggregation == "round_robin":
            rows = round_robin(scores, keys, num_samples)
            combined = scores.max(axis=1)
        else:
            combined = scores.max(axis=1) if self.params.aggregation == "max" else scores.mean(axis=1)
            rows = top_k(combined, keys, num_samples)
        return Selection(rows, combined[rows], ages[rows], combined)

    def _scores(self, context: Context) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (N, J) float64, -inf where a row cannot be scored, and ages (N,)."""
        states: Sequence[str | None] = self.params.checkpoints or (None,)
        weights = np.ones(1) if states[0] is None else checkpoint_weights(self.params.checkpoints, self.params.weights)
        total = np.zeros((len(context.rows), len(context.targets)))
        ages = np.zeros(len(context.rows), dtype=np.int32)
        for state, weight in zip(states, weights, strict=True):
            view = context.features(self._train, state=state)
            means = [mean_direction(context.features(self._target, name, state), name) for name in context.targets]
            total += weight * cosines(view, np.stack(means))
            ages = np.maximum(ages, view.ages)
        return total, ages


def mean_direction(view: View, name: str) -> np.ndarray:
    """Return the mean of the unit vectors of a target set, (D,) float64; its inner product is the mean cosine.

    Raises:
        CoverageError: no row of the set has a gradient of non-zero length.
    """
    total, count = None, 0
    for _, vectors in view.blocks():
        norms = np.linalg.norm(vectors, axis=1)
        unit = vectors[norms > 0].astype(np.float64) / norms[norms > 0, None]
        total = unit.sum(axis=0) if total is None else total + unit.sum(axis=0)
        count += len(unit)
    if total is None or count == 0:
        raise CoverageError(
            f"target set {name}: found no row with a usable gradient; expected at least one row with supervised tokens "
            "and a finite, non-zero gradient"
        )
    return np.asarray(total / count)


def cosines(view: View, means: np.ndarray) -> np.ndarray:
    """Return the mean cosine of every row to every target set, (N, J) float64; -inf for rows that cannot be scored.

    Args:
        view: the rows' gradients; those that are not OK, not finite or of zero length cannot be scored.
        means: (J, D) mean unit vectors.
    """
    scores = np.full((len(view.status), len(means)), -np.inf)
    for rows, vectors in view.blocks():
        norms = np.linalg.norm(vectors, axis=1)
        ok = (view.status[rows] == Status.OK) & np.isfinite(norms) & (norms > 0)
        scores[rows[ok]] = (vectors[ok] / norms[ok, None]) @ means.T
    return scores


def checkpoint_weights(checkpoints: Sequence[str], given: Sequence[float] | None) -> np.ndarray:
    """Return the weight of each checkpoint, (C,), summing to one.

    The default is the mean logged learning rate of the steps since the checkpoint before, as in the paper; dividing by
    their sum does not change a ranking.

    Raises:
        ConfigError: a checkpoint has no log of learning rates.
    """
    if given is not None:
        return np.asarray(given) / sum(given)
    means, before = [], 0
    for folder in checkpoints:
        path = Path(folder) / "trainer_state.json"
        try:
            state = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not readable ({error}); give dataflex.params.weights") from error
        step = state["global_step"]
        rates = [
            e["learning_rate"] for e in state["log_history"] if "learning_rate" in e and before < e["step"] <= step
        ]
        if not rates:
            raise ConfigError(
                f"{path}: no learning rate logged for steps {before + 1} to {step}; give dataflex.params.weights, or "
                "name the checkpoints in the order of their steps"
            )
        means.append(float(np.mean(rates)))
        before = step
    return np.asarray(means) / sum(means)
