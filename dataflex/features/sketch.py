"""Gather a batch's per-example gradients into one sketch per gradient asked for.

B rows of the batch (n in `start`), m elements of a block, K numbers of a sketch, G a parameter's gradient of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dataflex.errors import DataflexError
from dataflex.features.capture import Taps
from dataflex.features.gradient import Parameter, Rows, gradient_rows
from dataflex.features.projection import Projector

Direction = Callable[[str, int, Tensor], Tensor]
"""(parameter, start, g) -> the direction for elements [start, start + m) of a parameter; g (B, m) is not changed."""

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements of G held at a time, over all rows of the batch: 4 MB float32 on a CPU, about its cache; 256 MB on a GPU."""


class DidNotRun(DataflexError):
    """The module of a trainable parameter did not run, so its gradient would be missing unnoticed."""


@dataclass(frozen=True)
class Target:
    """One gradient asked for: what is made of it (None leaves the gradient as it is) and how that is projected."""

    direction: Direction | None
    projector: Projector


class Sketches:
    """Receives (module, input, output gradient) of one batch and keeps (B, K) per target.

    A parameter's gradient is formed in blocks of its rows, made an Adam direction if asked, added into the sketches and
    freed. Where several modules share a parameter, or its module runs several times, it waits until all its uses are
    there, because an Adam direction needs their sum.

    Attributes:
        squares: (B,) squared norm of each row's whole gradient, if a direction is asked for; known after `finish`.
    """

    def __init__(self, parameters: Sequence[Parameter], targets: Sequence[Target]) -> None:
        self.taps = Taps(self._receive)
        self._parameters, self._targets = parameters, targets
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        self._owned: dict[nn.Module, dict[str, Parameter]] = {}
        for parameter in parameters:
            for module, local in parameter.owners:
                self._owned.setdefault(module, {})[local] = parameter

    @property
    def modules(self) -> list[nn.Module]:
        """The modules to put taps on."""
        return list(self._owned)

    def start(self, n: int, device: torch.device) -> None:
        """Begin a batch of n rows."""
        self.taps.calls.clear()
        self._n, self._block = n, BLOCK_ELEMENTS.get(device.type, 1 << 26)
        self._uses: dict[str, list[Rows]] = {}
        self._sums = [t.projector.zeros(n, device, self._dtype) for t in self._targets]
        self.squares = torch.zeros(n, device=device, dtype=self._dtype)

    def finish(self, total: Tensor) -> list[Tensor]:
        """Run the backward pass; return (B, K) per target.

        Raises:
            DidNotRun: a trainable parameter's module did not run.
        """
        for parameter in self._parameters:
            if not self._expected(parameter):
                raise DidNotRun(
                    f"{parameter.name} is trainable, but its module did not run on this data, so no gradient can be "
                    "read from it; freeze it"
                )
        self.taps.backward(total)
        for parameter in self._parameters:  # uses whose output never reached the loss have no gradient
            if parameter.name in self._uses:
                self._reduce(parameter, self._uses.pop(parameter.name))
        return [t.projector.values(y) for t, y in zip(self._targets, self._sums, strict=True)]

    def _expected(self, parameter: Parameter) -> int:
        return sum(self.taps.calls.get(module, 0) for module, _ in parameter.owners)

    def _receive(self, module: nn.Module, x: Tensor, gy: Tensor) -> None:
        if x.shape[0] != self._n or gy.shape[0] != self._n:
            raise DataflexError(
                f"a {type(module).__name__} with trainable parameters was given {tuple(x.shape)} for a batch of "
                f"{self._n} rows: they cannot be told apart; freeze it"
            )
        owned = self._owned[module]
        self.taps.paused = True  # a rule may run the module again, which is no use of it by the model
        try:
            rows = gradient_rows(module, list(owned), x, gy)
        finally:
            self.taps.paused = False
        for local, parameter in owned.items():
            uses = self._uses.setdefault(parameter.name, [])
            uses.append(rows[local])
            if len(uses) == self._expected(parameter):
                self._reduce(parameter, self._uses.pop(parameter.name))

    def _reduce(self, parameter: Parameter, uses: list[Rows]) -> None:
        cols = parameter.cols
        step = max(1, self._block // (self._n * cols))
        for a in range(0, parameter.rows, step):
            b = min(a + step, parameter.rows)
            g = uses[0](a, b)
            for use in uses[1:]:
                g = g + use(a, b)
            made: dict[Direction | None, Tensor] = {None: g}
            if any(target.direction for target in self._targets):
                self.squares += g.square().sum(dim=1)
            for target, y in zip(self._targets, self._sums, strict=True):
                if target.direction not in made:
                    made[target.direction] = target.direction(parameter.name, a * cols, g)  # type: ignore[misc]
                target.projector.add(y, parameter.key, a * cols, made[target.direction])
