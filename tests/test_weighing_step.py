"""A step's weighted loss leaves out what may not count, and never waits for the device; without a trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dataflex.trainers import factors
from dataflex.trainers.factors import ByWeighter, StepCounts
from dataflex.trainers.micro_batch import ROWS, MicroBatch
from dataflex.trainers.weighing import Weighing
from dataflex.weighters.base import Group, NativeWeighter
from dataflex.weighters.loss import ByLoss
from tests.weighed import adapt, by_feature

SHARP = {"temperature": 0.2}


class Batch(dict[str, Any]):
    """A micro-batch of B rows, and the logits of its forward pass."""

    def __init__(self, rows: Sequence[int], tokens: int = 5, vocabulary: int = 7):
        generator = torch.Generator().manual_seed(rows[0])
        labels = torch.randint(vocabulary, (len(rows), tokens), generator=generator)
        self.logits = torch.randn(len(rows), tokens, vocabulary, generator=generator).requires_grad_()
        super().__init__({ROWS: torch.tensor(rows), "labels": labels})


def begun(weighter: NativeWeighter, batches: Sequence[Batch], items: torch.Tensor | None = None) -> Weighing:
    """Return a weighing that is about to be told of the first micro-batch; `items` are those of the batches."""
    made = Weighing([ByWeighter(weighter, 3)])
    args = SimpleNamespace(average_tokens_across_devices=True, device=torch.device("cpu"))
    state = SimpleNamespace(global_step=0, max_steps=1)
    if items is None:
        items = torch.stack([(b["labels"][:, 1:] >= 0).sum() for b in batches]).sum()
    # Sharded, so that the head is left in the model: logits are given here.
    trainer: Any = SimpleNamespace(args=args, state=state, model_accepts_loss_kwargs=True, is_fsdp_enabled=True)
    made.begin(trainer, batches, items)
    return made


def loss_of(weighing: Weighing, batch: Batch) -> torch.Tensor:
    # The gradient is written into the logits, so a copy of them goes in.
    return weighing.loss(batch.logits.clone(), batch["labels"], batch[ROWS], [], {})


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_an_example_whose_loss_is_not_finite_weighs_nothing(reduction):
    weighter = ByLoss(ByLoss.Params(**SHARP, reduction=reduction))
    whole, without = Batch([0, 1, 2]), Batch([0, 1, 2])
    without["labels"][1] = -100
    with torch.no_grad():
        whole.logits[1, 2] = math.nan
    items = (whole["labels"][:, 1:] >= 0).sum()
    found = []
    for batch in (whole, without):
        weighing = begun(weighter, [batch], items)
        loss = loss_of(weighing, batch)
        loss.backward()
        found.append((loss.detach(), batch.logits.grad))
    (one, gradient), (other, expected) = found
    assert torch.isfinite(one)
    assert float(one) == pytest.approx(float(other), rel=1e-6)
    torch.testing.assert_close(gradient, expected)
    assert gradient is not None
    assert not gradient[1].any()


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_a_micro_batch_in_which_nothing_is_usable_weighs_nothing(reduction):
    batch = Batch([0, 1])
    with torch.no_grad():
        batch.logits[:] = math.nan
    loss = loss_of(begun(ByLoss(ByLoss.Params(reduction=reduction)), [batch]), batch)
    loss.backward()
    assert float(loss) == 0
    assert batch.logits.grad is not None
    assert not batch.logits.grad.any()


def micro_batch(rows: Sequence[int], tokens: Sequence[int] = ()) -> MicroBatch:
    """Return what a forward pass gave: a loss of 1 on each token of a row, of which it has one by default."""
    counts = torch.tensor(tokens or [1] * len(rows))
    is_target = torch.arange(int(counts.max())) < counts[:, None]
    ids = torch.tensor(list(rows))
    return MicroBatch(ids, is_target.double(), is_target.long() - 1, None, {}, counts.sum(), 1, 1)


class ByRow(NativeWeighter):
    """Weighs a row by its number."""

    def weights(self, group: Group) -> torch.Tensor:
        return group.rows.double()


@pytest.mark.parametrize("rank", range(4))
def test_each_rank_takes_its_own_part_of_the_weights(monkeypatch, rank):
    """Of four processes on two nodes: the part of the rank in the world, not of the one on its node."""
    factor = ByWeighter(ByRow(ByRow.Params()), 2)
    factor.begin([], StepCounts((), (), 0, 1))
    parts = [micro_batch([2 * r, 2 * r + 1]) for r in range(4)]
    sent: list[torch.Tensor] = []

    def noted(mine: torch.Tensor) -> torch.Tensor:
        sent.append(mine)
        return mine[None]

    monkeypatch.setattr(factors, "all_gather_rows", noted)
    for part in parts:
        factor.factors(part, 0)
    everyone = torch.stack(sent)
    monkeypatch.setattr(factors, "all_gather_rows", lambda _: everyone)
    monkeypatch.setattr(factors, "rank", lambda: rank)
    monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
    assert factor.factors(parts[rank], 0).tolist() == [2 * rank, 2 * rank + 1]


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Constant(NativeWeighter):
    """Weighs by rows, and looks at them on the host: what must not be done."""

    def weights(self, group: Group) -> torch.Tensor:
        return torch.full_like(group.losses, float(group.losses[0].item()))


@pytest.mark.parametrize(
    "weighter",
    [
        ByLoss(ByLoss.Params(**SHARP)),
        ByLoss(ByLoss.Params(weight_cap=1.5, range_quantiles=(0.1, 0.9), reduction="example")),
        ByLoss(ByLoss.Params(strategy="uniform")),
        by_feature(np.arange(4.0), function="rank"),
    ],
)
def test_no_micro_batch_makes_the_host_wait(weighter):
    batches = [Batch([0, 1, 2]), Batch([3, 1])]
    weighing = begun(weighter, batches)
    with Waits() as waits:
        for batch in batches:
            loss_of(weighing, batch).backward()
    assert waits.found == []
    weighing = begun(Constant(Constant.Params()), batches)
    with Waits() as waits:
        loss_of(weighing, batches[0])
    assert waits.found == ["_local_scalar_dense"]


@pytest.mark.parametrize(
    "kind", ["linupper", "quadratic", "extremes", "exponential", "uniform", "adapt", "exp", "rank"]
)
def test_weights_wait_for_no_number(kind):
    """A tensor of the device `meta` has no numbers: whatever asks for one raises."""
    weighter: Any
    if kind == "adapt":
        weighter = adapt(form="relative", clip=0.9)
    elif kind in ("exp", "rank"):
        weighter = by_feature(function=kind)
    else:
        cap = {} if kind == "uniform" else {"weight_cap": 2.0, "range_quantiles": (0.1, 0.9)}
        weighter = ByLoss(ByLoss.Params(strategy=kind, **cap))
    empty = torch.empty(5, dtype=torch.float64, device="meta")
    found = weighter.weights(Group(empty.long(), empty, empty, 3, 3, 100))
    assert found.shape == (5,)
    assert found.dtype == torch.float64
    with pytest.raises(RuntimeError):
        bool(found.sum() > 0)


class ByList(NativeWeighter):
    """Weighs rows by a list, normalised or not; the last row is not usable."""

    given = torch.tensor([1.0, 3.0, 2.0, 4.0, 0.0], dtype=torch.float64)

    def weights(self, group: Group) -> torch.Tensor:
        return self.given[group.rows]


def test_the_product_with_other_factors_keeps_their_mean():
    """Over the examples that are weighed against each other, and those alone that have a loss."""
    others = torch.tensor([2.0, 0.5, 0.5, 3.0, 9.0], dtype=torch.float64)
    factor = ByWeighter(ByList(ByList.Params()), 5, beside=lambda rows: others[rows])
    factor.begin([], StepCounts((), (), 0, 1))
    found = factor.factors(micro_batch(range(5), (1, 2, 3, 4, 0)), 0)
    weights = ByList.given.tolist()
    expected_mean = sum(weights[:4]) / 4 * sum(others[:4].tolist()) / 4
    assert float((found * others)[:4].mean()) == pytest.approx(expected_mean)
    torch.testing.assert_close(found / found[0], ByList.given)  # only their scale has changed


def test_equal_factors_beside_change_nothing():
    plain = ByWeighter(ByList(ByList.Params()), 5)
    beside = ByWeighter(ByList(ByList.Params()), 5, beside=lambda rows: torch.full((len(rows),), 0.7).double())
    nothing = ByWeighter(ByList(ByList.Params()), 5, beside=lambda rows: torch.zeros(len(rows)).double())
    for factor in (plain, beside, nothing):
        factor.begin([], StepCounts((), (), 0, 1))
    part = micro_batch(range(4))
    torch.testing.assert_close(beside.factors(part, 0), plain.factors(part, 0))
    torch.testing.assert_close(nothing.factors(part, 0), plain.factors(part, 0))
