"""How a model in training lies over the processes, and what follows from it; nobody else asks for a kind by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dataflex.errors import ConfigError
from dataflex.live.live_trainer import LiveTrainer


@dataclass(frozen=True)
class Sharding:
    """How a model lies over the processes.

    Attributes:
        kind: none: each process has all of it, DDP or alone; optimizer: DeepSpeed below ZeRO-3 deals out the
            optimizer's state, and the gradients; parameters: ZeRO-3 deals out the weights too.
    """

    kind: Literal["none", "optimizer", "parameters"]

    @classmethod
    def of(cls, trainer: LiveTrainer) -> Sharding:
        """Return how a trainer's model lies.

        Raises:
            ConfigError: in a way under which there are no values of single examples.
        """
        if trainer.is_fsdp_enabled:
            raise ConfigError("fsdp: per-example features of a sharded model are not supported; use DDP or DeepSpeed")
        if is_deepspeed_zero3_enabled():
            return cls("parameters")
        return cls("optimizer" if trainer.is_deepspeed_enabled else "none")

    @property
    def has_whole_weights(self) -> bool:
        """Whether each process has every weight, so that weights can be loaded, compared and run by one alone."""
        return self.kind != "parameters"

    @property
    def is_plain(self) -> bool:
        """Whether each process has the optimizer's whole state, and checkpoints are those of Transformers."""
        return self.kind == "none"

    @contextlib.contextmanager
    def gathered(self, parameters: Sequence[Any]) -> Iterator[None]:
        """Make weights whole for a while; collective where they are dealt out, else nothing."""
        if self.has_whole_weights:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
            yield
