"""The warm-up: its rows, and the state at its end, which one run keeps and another starts from."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import distributed
from dataflex.checkpoints.marks import FOLDER
from dataflex.checkpoints.pickles import frozen, thawed
from dataflex.draws import stream
from dataflex.errors import MismatchError
from dataflex.fingerprint import difference, digest
from dataflex.pipelines.run import Run
from dataflex.schedule import Round
from dataflex.selectors.base import NativeSelector
from dataflex.trainers.journal import Journal
from dataflex.trainers.lineage import lineage, split_of
from dataflex.trainers.rounds import DecidedRound

log = logging.getLogger(__name__)

_SPLIT = "divided"
"""Where a kept state's record has the division of the global batch that made it."""
NAMES = "names"
"""Where it has what features of the state are named by (`ModelState.names`), so that they are found without it."""


def draw(run: Run, round: Round) -> DecidedRound:
    """Draw a warm-up: random rows without replacement, a new permutation for every epoch and every full pass.

    A selector may have rows of its own.
    """
    count = round.steps * run.trainer.global_batch
    own = run.method.warmup_rows(count) if isinstance(run.method, NativeSelector) else None
    if own is not None:
        rows = own
        run.check(rows, count, run.rows)
    else:
        rows = stream(run.eligible, 0, count, run.trainer.args.seed, "warmup", round.epoch)
    info = {"method": "warmup", "identity": run.identity}
    return DecidedRound(round, rows, np.full(count, np.nan), np.full(count, -1, np.int32), info)


class WarmState:
    """The state at the end of a run's first warm-up, found by lineage.

    It is kept only where the method asks for features of the live model: another run's features are of no use without
    the state that they belong to.

    Args:
        run: the run.
        is_resumed: whether it goes on from a checkpoint.
    """

    def __init__(self, run: Run, is_resumed: bool):
        self.run = run
        self.lineage: str | None = None
        self.loaded = False
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._story: dict[str, Any] | None = None
        self._names: list[str] = []  # that a state may be kept under, the run's own first
        first = run.rounds[0]
        self._end = first.steps
        if first.kind != "warmup" or not run.is_live or is_resumed:
            return  # what came before a checkpoint may have been trained otherwise
        if not run.state.sharding.has_torch_optimizer:
            log.info("DeepSpeed's checkpoints are pickles, which no store holds: every run warms up itself")
            return
        keys = run.rows.keys[draw(run, first).rows]
        is_exact = run.settings.dataflex.warmup_split == "exact"
        self._story = lineage(run.trainer, run.state.origin(), keys, 0, first.steps, is_exact)
        if self._story is not None:
            own = {**self._story, "batch": split_of(run.trainer)}
            self._names = list(dict.fromkeys([digest(self._story), digest(own)]))
            self.lineage = self._names[0]

    def start(self) -> str | None:
        """Return the folder of the kept state, its round put into the journal, or None. Collective."""
        if self.lineage is None:
            return None
        self.run.access.note("state", self.lineage)
        found = distributed.from_main(self.find)
        if found is None:
            if distributed.is_main():
                self._explain(self.run.access.root.states.infos())
            return None
        self.lineage, info = found
        folder = self._fetch(self.lineage)
        by = _divided(info.get(_SPLIT))
        log.info("starting from the kept state %s%s: %d steps of warm-up are done", self.lineage[:8], by, self._end)
        self.loaded = True
        restore_rounds(self.run, folder)
        return str(folder)

    @property
    def reached(self) -> int:
        """Steps that a run that begins alike starts behind."""
        find = self.run.access.root.states.find
        return self._end if self.loaded or any(find(name) is not None for name in self._names) else 0

    def find(self) -> tuple[str, dict[str, Any]] | None:
        """Return the name and the record of a kept state that serves.

        One that is named with this run's division of the batch does too: by `warmup_split: exact`, and by all before
        there was that key.
        """
        states = self.run.access.root.states
        for name in self._names:
            if states.find(name) is not None:
                self.run.access.note("state", name)
                if (info := states.find(name)) is not None:  # after the note: nobody removes it any more
                    return name, info
        return None

    def _explain(self, kept: list[dict[str, Any]]) -> None:
        """Say what keeps the nearest kept state from being this run's."""
        assert self._story is not None
        differences = [_differences(self._story, other) for other in kept]
        if nearest := min(differences, key=len, default=None):
            log.info("no kept state fits, warming up anew; the nearest differs in %s", ", ".join(nearest))

    def _fetch(self, lineage: str) -> Path:
        """Return a folder of this node's with the state as a checkpoint, which one of its processes makes."""
        folder = None
        if distributed.local_rank() == 0:
            output_dir = self.run.trainer.output_dir
            output_dir.mkdir(parents=True, exist_ok=True)
            # Readable by this user alone, and removed with this object. Not in /tmp: an optimizer's state can be large.
            self._scratch = tempfile.TemporaryDirectory(prefix=".state-", dir=output_dir)
            kept = self.run.access.root.states.fetch(lineage, Path(self._scratch.name, "kept"))
            folder = thawed(kept, Path(self._scratch.name, "checkpoint"))
        found = distributed.gather(folder)[distributed.rank() - distributed.local_rank()]
        assert found is not None
        return found

    def release(self) -> None:
        """Remove the checkpoint that the run started from, once a step has been done: all of it has been read then."""
        if self._scratch is not None and self.run.trainer.state.global_step > self._end:
            self._scratch.cleanup()
            self._scratch = None

    def keep(self, round: Round) -> None:
        """Keep the state if the warm-up has just ended and was trained here. Collective."""
        if self.lineage is None or self._story is None or self.loaded or round.first_step != self._end:
            return
        scratch = self.run.trainer.output_dir / ".state"
        folder = Path(self.run.trainer.snapshot(str(scratch)))
        named = self.run.state.names()
        if distributed.is_main():
            try:
                frozen(folder)
            except MismatchError as error:  # an optimizer with objects in its state: such a run trains all the same
                log.warning("the state at the end of the warm-up is not kept, so every run warms up itself: %s", error)
            else:
                story = {**self._story, _SPLIT: split_of(self.run.trainer), NAMES: named}
                is_ours = self.run.access.root.states.put(self.lineage, folder, story)
                said = (
                    "kept the state at the end of the warm-up as %s" if is_ours else "another launch has kept %s first"
                )
                log.info(said, self.lineage[:8])
            shutil.rmtree(scratch)
        distributed.barrier()


def _divided(split: Any) -> str:
    """Say by how many processes a state was made; nothing of one that does not tell."""
    if not isinstance(split, dict):
        return ""
    processes, rows, parts = (split.get(name) for name in ("processes", "per device", "accumulation"))
    return f", made by {processes} process{'es' if processes != 1 else ''} of {rows} rows × {parts}"


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Name what two states differ in: parts of their stories, the arguments one by one."""
    parts = [name for name in ours if name != "arguments" and ours[name] != theirs.get(name)]
    return parts + difference(ours["arguments"], theirs.get("arguments", {}))


def restore_rounds(run: Run, checkpoint: Path) -> None:
    """Bring the rounds that led to a checkpoint into the run's journal. Collective.

    Raises:
        MismatchError: the checkpoint has none.
    """
    source = Journal(checkpoint / FOLDER / "rounds")
    if distributed.is_main():
        numbers = source.numbers()
        if not numbers:
            raise MismatchError(f"{checkpoint}: found no rounds; expected a checkpoint of a `dataflex train` run")
        source.copy_to(run.journal.folder, numbers)
    distributed.barrier()
