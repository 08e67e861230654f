"""Rank, world size and the collectives that the rest of the code needs; in a single process all of them work too."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dataflex.errors import ConfigError, DataflexError

T = TypeVar("T")

_KEEPERS = ("torch.distributed.nn.functional", "deepspeed.comm.torch")
"""Modules that keep the process group for ever, as a default of their functions, if imported while there is one."""

_PIECE = 1 << 20
"""Numbers that are summed over ranks at a time."""


def _group() -> Any:
    """Return `torch.distributed` if a process group is up; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    dist = torch.distributed
    return dist if dist.is_available() and dist.is_initialized() else None


def number(env: Mapping[str, str], name: str, default: int, least: int = 0, most: int = 2**31 - 1) -> int:
    """Return a whole number from an environment variable.

    Raises:
        ConfigError: the variable holds no number, or one that is out of bounds.
    """
    text = env.get(name)
    if text is None:
        return default
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ConfigError(
            f"environment variable {name}: found {text!r}; expected a whole number from {least} to {most}, as a "
            "launcher sets it. Unset it to run without one"
        )
    return int(text)


def check_environment(env: Mapping[str, str]) -> None:
    """Refuse a process that does not know which one of how many it is.

    Raises:
        ConfigError: a variable holds no number, or one that is out of bounds.
    """
    several = number(env, "WORLD_SIZE", 1, least=1)
    number(env, "RANK", 0, most=several - 1)
    number(env, "LOCAL_RANK", 0)


def rank() -> int:
    """Return this process's rank: of the process group, else of the launcher's environment, else 0."""
    dist = _group()
    return int(dist.get_rank()) if dist else number(os.environ, "RANK", 0)


def world() -> int:
    """Return the number of processes, at least 1."""
    dist = _group()
    return int(dist.get_world_size()) if dist else number(os.environ, "WORLD_SIZE", 1)


def local_rank() -> int:
    """Return this process's rank on its node."""
    return number(os.environ, "LOCAL_RANK", 0)


def is_main() -> bool:
    """Say whether this process is the one that decides, logs and writes the journal."""
    return rank() == 0


def prepare() -> None:
    """Import the modules of `_KEEPERS` while there is no process group yet, so that they cannot keep one alive."""
    for name in _KEEPERS if world() > 1 else ():
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)


def leave() -> None:
    """Destroy the process group, if there is one, and end its threads; the last act of a run that went well.

    A thread of gloo that still holds a tensor when the interpreter ends aborts the process ("terminate called without
    an active exception"), and the launcher then kills the others while they save. Where a collective still waits for
    another process, as after an error, this would wait too.
    """
    dist = _group()
    if dist:
        # The trainer and its model, which refer to each other, go first: were their reference to the group the last,
        # gloo's threads would be waited for with the interpreter's lock held, which they may need to end.
        gc.collect()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks. Collective."""
    dist = _group()
    if dist:
        dist.barrier()


def broadcast(value: T, source: int = 0) -> T:
    """Return `source`'s value on every rank. Collective; the value must be picklable."""
    dist = _group()
    if not dist or dist.get_world_size() == 1:
        return value
    box = [value if dist.get_rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    return box[0]  # type: ignore[return-value]


def from_main(call: Callable[[], T]) -> T:
    """Return on every rank what rank 0 gets: what all go by must be one thing, whatever each would read. Collective.

    Raises:
        DataflexError: that of rank 0.
    """
    found: list[T] = []
    with together():
        if is_main():
            found.append(call())
    return broadcast(found)[0]


def is_any(value: bool, device: Any) -> bool:
    """Say whether a value is true on any rank. Collective: one number of four bytes.

    Args:
        value: of this rank.
        device: where the process group computes.
    """
    dist = _group()
    if not dist or dist.get_world_size() == 1:
        return value
    import torch

    found = torch.tensor(int(value), dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def store() -> Any:
    """Return the key-value store that the processes met at, None if there is none; reading it waits for nobody."""
    dist = _group()
    if not dist or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def gather(value: T) -> list[T]:
    """Return every rank's value in rank order, on every rank. Collective; values must be picklable."""
    dist = _group()
    if not dist or dist.get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def summed(values: Any) -> Any:
    """Return the sum of every rank's NumPy array, added in rank order. Collective; the same shape on all.

    In pieces: what all ranks send at once is held by each.
    """
    if world() == 1:
        return values
    flat = values.reshape(-1).copy()  # the caller's own stays what it is
    for start in range(0, len(flat), _PIECE):
        flat[start : start + _PIECE] = sum(gather(flat[start : start + _PIECE]))
    return flat.reshape(values.shape)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise an error that one rank meets on every rank: otherwise the others would wait for it. Collective.

    Raises:
        DataflexError: the error of the lowest rank that met one.
    """
    failed: DataflexError | None = None
    try:
        yield
    except DataflexError as error:
        failed = error
    first = next((error for error in gather(failed) if error is not None), None)
    if first is None:
        return
    if first is failed:  # one process
        raise first
    first.everywhere = True
    raise first from failed


def shard(items: Sequence[T], rank: int, world: int) -> Sequence[T]:
    """Return every `world`-th item beginning at `rank`; the shards of all ranks are a partition."""
    return items[rank::world]


def all_gather_rows(tensor: Any) -> Any:
    """Return every rank's tensor stacked in rank order, (world, ...); the same shape on all. Collective."""
    dist = _group()
    if not dist or dist.get_world_size() == 1:
        return tensor[None]
    found = [tensor.new_empty(tensor.shape) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    import torch

    return torch.stack(found)
