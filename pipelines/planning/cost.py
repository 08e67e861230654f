"""How long a run will take: by what the same work took on this machine before, else by arithmetic."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataflex.access.speed import nearest, pass_of, training_of
from dataflex.features.spec import PolicyGradientSpec
from dataflex.live.known import KnownState
from dataflex.pipelines.planning.needs import Pass

SHARE = 0.4
"""Of what a product of matrices reaches, the share that passes through a model do: a rule of thumb."""


@dataclass(frozen=True)
class Work:
    """Something that takes time.

    Attributes:
        what: for people.
        of: what it is, as `dataflex.access.speed` has it.
        tokens: how much of it there is.
        flops: floating-point operations.
    """

    what: str
    of: Mapping[str, Any]
    tokens: int
    flops: float


class Clock:
    """Tells how long work takes.

    Args:
        state: of the model.
        speeds: that were recorded, the latest first.
        processes: that share the work.
        recomputes: whether a backward pass of the training computes activations again.
    """

    def __init__(
        self,
        state: KnownState,
        speeds: Sequence[Mapping[str, Any]],
        processes: int,
        recomputes: bool,
    ):
        self._state, self._parameters, self._speeds = state, state.parameters, speeds
        self._processes, self._recomputes = processes, recomputes
        self._rate: float | None = None

    def passes(self, one: Pass) -> Work:
        """Return a pass as work. A response counts with as many tokens as it may have, read and written."""
        tokens, written = one.tokens, 0.0
        for spec in one.specs:
            if isinstance(spec, PolicyGradientSpec):
                mean = one.tokens / max(1, one.backward)
                written += one.backward * spec.mc_samples * (mean + 2 * spec.max_new_tokens)
        encoder = next((spec.encoder for spec in one.specs if spec.encoder is not None), None)
        deep = self._deep(one.backward > 0) if encoder is None else 2 * self._state.encoder_sizes(encoder)["parameters"]
        of = pass_of(self._state, one.specs)
        kinds = ", ".join(dict.fromkeys(spec.describe() for spec in one.specs))
        at = "" if one.update is None else f", update {one.update}" if one.times == 1 else f", {one.times} times"
        return Work(f"{kinds} of {one.of}{at}", of, tokens, deep * (tokens if not written else written))

    def training(self, steps: int, tokens: int) -> Work:
        """Return optimizer steps over so many tokens as work."""
        more = 2 * self._parameters if self._recomputes else 0
        of = training_of(self._state)
        return Work(f"{steps} steps of training", of, tokens, tokens * (self._deep(True) + more))

    def tell(self, work: Sequence[Work]) -> dict[str, Any]:
        """Return the seconds of work, in all and one by one, each with what it was told from."""
        details = [self._tell(each) for each in work]
        is_measured = all(each["from"] == "measured" for each in details)
        found: dict[str, Any] = {
            "estimate": round(sum(each["seconds"] for each in details), 2),
            "from": "measured" if is_measured else "arithmetic",
            "details": details,
        }
        return found if self._rate is None else found | {"flops_per_second": self._rate, "share_of_product": SHARE}

    def _tell(self, work: Work) -> dict[str, Any]:
        about = {"what": work.what, "tokens": work.tokens}
        known = nearest(work.of, self._speeds)
        if known is not None:
            seconds = work.tokens * known["seconds"] / known["tokens"] / self._processes
            return about | {"seconds": round(seconds, 3), "from": "measured"}
        seconds = work.flops / self.rate / self._processes
        return about | {"seconds": round(seconds, 3), "from": "arithmetic", "flops": work.flops}

    @property
    def rate(self) -> float:
        """Floating-point operations per second that passes are reckoned with: a share of a product's, measured once."""
        if self._rate is None:
            self._rate = float(f"{SHARE * _product(self._state):.3g}")
        return self._rate

    def _deep(self, has_backward: bool) -> float:
        """Return the operations of a token: two for each weight forwards, as many backwards, and the gradients'."""
        return 4 * self._parameters + 2 * self._state.trainable_size if has_backward else 2 * self._parameters


def _product(state: KnownState) -> float:
    """Return the floating-point operations per second of a product of matrices on the run's device."""
    import torch

    device = state.trainer.args.device
    numerics = state.numerics()
    name = numerics["weights"] if numerics["autocast"] == "none" else f"torch.{numerics['autocast']}"
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=device, dtype=getattr(torch, name.removeprefix("torch.")))
    matrix @ matrix  # the first one chooses a kernel
    begun, count, total = time.monotonic(), 0, 0.0
    while time.monotonic() - begun < 0.1:
        total += float((matrix @ matrix)[0, 0])  # read, so that it is done
        count += 1
    return 2 * size**3 * count / (time.monotonic() - begun)
