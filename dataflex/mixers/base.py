"""What a mixer is given and what it returns.

K domains, in the order of `dataset:` in the run file; every artefact names them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dataflex.components.params import Parameters
from dataflex.draws import generator
from dataflex.errors import DataflexError
from dataflex.method import Method, default

LossForm = Literal["domain_mean", "token"]
LAST_BATCH = "last micro-batch"
"""The signal that mixers of the classic interface are handed."""


class RoutedRows(Parameters):
    """Parameters of a mixer that asks for the signal `expert_loads`: which rows are sent through the router."""

    collect_steps: int = Field(10, ge=1, description="evaluation batches of each domain per update, at most")
    eval_samples: int = Field(1000, ge=1, description="rows of each domain that are evaluated, at most")
    eval_batch_size: int = Field(32, ge=1, description="rows of an evaluation batch")


@dataclass(frozen=True)
class Domains:
    """The domains of a run.

    Attributes:
        names: (K,) in order.
        rows: (K,) int64, rows that can be drawn.
        tokens: (K,) int64, their supervised tokens.
        unit: what proportions are shares of.
    """

    names: Sequence[str]
    rows: np.ndarray
    tokens: np.ndarray
    unit: Literal["rows", "tokens"] = "rows"

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sizes(self) -> np.ndarray:
        """(K,) float64, sizes in the unit of the proportions."""
        return np.asarray(self.rows if self.unit == "rows" else self.tokens, dtype=np.float64)

    @property
    def natural(self) -> np.ndarray:
        """(K,) float64, proportions by size."""
        return normalised(self.sizes)


@dataclass(frozen=True)
class Statistics:
    """Sums over all ranks and micro-batches of the optimizer steps since the last update.

    Tokens are supervised ones whose loss is finite; losses are those of the training forward, before each step.

    Attributes:
        steps: optimizer steps.
        tokens: (K,) float64.
        loss: (K,) float64, sum of token losses in nats.
        groups: (K,) float64, micro-batches with tokens of the domain.
        group_loss: (K,) float64, sum over those of the domain's mean token loss in each.
        excess: (K,) float64, sum of max(loss - reference loss, 0) over tokens; zeros for a mixer without a reference.
        nonfinite: (K,) float64, supervised tokens left out as NaN or infinite.
    """

    steps: int
    tokens: np.ndarray
    loss: np.ndarray
    groups: np.ndarray
    group_loss: np.ndarray
    excess: np.ndarray
    nonfinite: np.ndarray

    @classmethod
    def zeros(cls, count: int) -> Statistics:
        """Return the statistics of no step over `count` domains."""
        return cls(0, *(np.zeros(count) for _ in range(6)))

    def __add__(self, other: Statistics) -> Statistics:
        summed: dict[str, Any] = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Statistics(**summed)

    def state(self) -> dict[str, Any]:
        """Return plain data from which `restored` makes the same."""
        return {name: value if name == "steps" else value.tolist() for name, value in vars(self).items()}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Statistics:
        """Return the statistics that `state` described."""
        arrays = {name: np.array(value) for name, value in state.items() if name != "steps"}
        return cls(steps=int(state["steps"]), **arrays)

    @property
    def seen(self) -> np.ndarray:
        """(K,) bool, domains that have a loss."""
        return self.tokens > 0

    def has_losses(self, mixer: str, step: int) -> bool:
        """Say whether any loss was finite; without one, `mixer` is to leave out its update before step `step`.

        Raises:
            DataflexError: there was no loss at all, not even one that was NaN or infinite.
        """
        if not self.seen.any() and not self.nonfinite.any():
            raise DataflexError(
                f"{mixer}: found no loss of any domain over {self.steps} steps up to step {step}; expected the "
                "training losses of the rows drawn, which it acts on. Look at whether the rows have labels"
            )
        return bool(self.seen.any())

    @property
    def mean_loss(self) -> np.ndarray:
        """(K,) float64, nats per token; NaN where a domain was not seen."""
        return _ratio(self.loss, self.tokens)

    @property
    def mean_excess(self) -> np.ndarray:
        """(K,) float64, excess per token; NaN where a domain was not seen."""
        return _ratio(self.excess, self.tokens)

    @property
    def mean_group_loss(self) -> np.ndarray:
        """(K,) float64, mean over micro-batches of the mean token loss; NaN where a domain was not seen."""
        return _ratio(self.group_loss, self.groups)


@dataclass(frozen=True)
class MixContext:
    """What a mixer is given at an update.

    Attributes:
        domains: names and sizes.
        initial: (K,) `init_mixture_proportions`, normalised; by size if the run file gives none.
        proportions: (K,) the proportions in force until now.
        statistics: losses of the steps since the last update; zeros before the first step.
        step: optimizer steps done.
        update: updates done before this one.
        seed: the run's seed.
        ask: name of a signal -> function that computes its value, for what `NativeMixer.signals` lists; collective.
    """

    domains: Domains
    initial: np.ndarray
    proportions: np.ndarray
    statistics: Statistics
    step: int
    update: int
    seed: int
    ask: Mapping[str, Callable[[], Any]]

    def rng(self, *names: int | str) -> np.random.Generator:
        """Return a generator that is a function of the run's seed and the names alone."""
        return generator(self.seed, *names)


class NativeMixer(Method):
    """Base of mixers: override `mix`, and of the rest what differs. See also `dataflex.method.Method`.

    Every rank holds one, gives it the same statistics, and so gets the same proportions. One that `watches` looks at
    `MixContext.statistics`.

    Attributes:
        interval: `update_step` where the run file gives none; 0: the proportions never change.
        needs_every_domain: whether each domain must have a share from the start.
        draws: how rows are dealt to the proportions by default: `greedy` (no randomness, near the shares at any
            time) or `random` (independent draws, which a bandit's estimates assume).
    """

    interval: ClassVar[int] = 0
    needs_every_domain: ClassVar[bool] = False
    draws: ClassVar[Literal["greedy", "random"]] = "greedy"

    @default
    def signals(self) -> tuple[str, ...]:
        """Names of the signals that the mixer takes from `MixContext.ask`."""
        return ()

    @default
    def whole_batches(self) -> bool:
        """Whether all rows of a micro-batch come from one domain."""
        return False

    @default
    def loss_form(self) -> LossForm | None:
        """How `loss_weights` enter the loss (`dataflex.trainers.factors.ByDomain`); None if the loss stays plain."""
        return None

    @default
    def looks_ahead(self) -> bool:
        """Whether a step's own losses move the weights before it is trained, at the cost of one more forward pass."""
        return False

    @default
    def reference_is_live(self) -> bool:
        """Whether the reference stands beside the model and runs at every step; else `needs` has its stored losses."""
        return False

    def check(self, names: Sequence[str], unit: str) -> list[str]:
        """Return what is wrong with the parameters for domains of these names and proportions in `unit`."""
        return []

    @abstractmethod
    def mix(self, model: Any, step_id: int, *, context: MixContext, **kwargs: Any) -> np.ndarray:
        """Return the proportions from the next step on, (K,) float64, at least 0 and summing to 1.

        Args:
            model: the live model.
            step_id: optimizer steps done.
            context: domains and statistics.
            kwargs: has_initial, whether the run file gives proportions; vocabulary, tokens of the tokenizer; budget,
                the run's rows or tokens.

        Raises:
            DataflexError: the signal that it lives on is missing.
        """

    def loss_weights(self) -> np.ndarray | None:
        """Return the weight of each domain's loss from the next step on, (K,) float64, or None for a plain loss."""
        return None

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs to go on the same: plain data, floats exact."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state()` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, found {sorted(state)}")

    def record(self) -> dict[str, Any]:
        """Return what the log says of the last update beside the proportions: numbers, lists in domain order."""
        return {}

    def outcome(self) -> np.ndarray | None:
        """Return the proportions that a later run should take, (K,), if that is what the method is for."""
        return None


def normalised(weights: Any) -> np.ndarray:
    """Return weights divided by their sum, (K,) float64.

    Raises:
        ValueError: one is negative or not finite, or all are 0, or too large to add up.
    """
    found = np.asarray(weights, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused in words below
        total = found.sum()
    if not 0 < total < np.inf or (found < 0).any():
        raise ValueError(f"found weights {found.tolist()}; expected finite numbers, 0 or more, not all 0")
    return found / total


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
