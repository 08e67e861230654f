"""How a run with a selector begins: refused where it cannot come to a good end, and started where its work is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataflex import distributed
from dataflex.errors import CoverageError
from dataflex.pipelines.run import Run
from dataflex.pipelines.selecting import update, warmup
from dataflex.pipelines.selecting.pool import most_rows
from dataflex.results import opening
from dataflex.selectors.base import Beginning


@dataclass(frozen=True)
class Begun:
    """A run that may begin.

    Attributes:
        run: the run.
        warm: the state at the end of its warm-up.
        start: folder of the checkpoint or kept state that the training starts from; None: it starts anew.
    """

    run: Run
    warm: warmup.WarmState
    start: str | None


def begin(run: Run, checkpoint: str | None, largest: int, too_many: str) -> Begun:
    """Let the selector check what it can, and bring the journal to the state that is started from. Collective.

    Args:
        run: the run, nothing of it computed.
        checkpoint: to go on from, or None.
        largest: rows that the largest choice will be of at least; 0 where nothing is chosen.
        too_many: what is said where there are fewer rows than that.

    Raises:
        DataflexError: the run cannot come to a good end, as far as is known before anything is computed.
    """
    refuse_silent_targets(run)
    if run.settings.train_type == "dynamic_select":
        most = most_rows(run)
        if run.selector.chooses_distinct and largest > most:
            raise CoverageError(too_many)
        # Which rows go on is not known yet; how many is, so any so many stand for them.
        rows = run.rows if run.prefilter is None else run.rows.take(run.eligible[:most])
        run.selector.prepare(Beginning(rows, run.targets, largest, run.access.width))
        if run.prefilter is not None:
            run.prefilter.prepare(Beginning(run.rows, run.targets, 1, run.access.width))
    if not run.state.has_adapter:  # of a model trained whole, the base is at hand before any weight is loaded
        update.ensure_base(run)
    warm = warmup.WarmState(run, is_resumed=checkpoint is not None)
    if checkpoint is not None:
        run.state.require_same_base(checkpoint, is_resumed=True)
        run.say_what_has_changed(checkpoint)
        if distributed.is_main():
            opening.give_back(run.journal.folder)
        warmup.restore_rounds(run, Path(checkpoint))
        return Begun(run, warm, checkpoint)
    if distributed.is_main():
        opening.set_aside(run.journal.folder)
    distributed.barrier()
    return Begun(run, warm, warm.start())


def refuse_silent_targets(run: Run) -> None:
    """Refuse targets that say nothing, where a method compares rows with them.

    Raises:
        CoverageError: a target set has no supervised token.
    """
    for name, target in run.targets.items() if any(need.of == "targets" for need in run.declared) else ():
        if not (target.supervised > 0).any():
            raise CoverageError(
                f"target set {name}: none of its {len(target)} rows has a supervised token; check its answers, the "
                "template and cutoff_len"
            )
