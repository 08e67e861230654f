"""A run that is asked to stop: every process at the same step, with a checkpoint, and the truth about what is lost."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

from dataflex import distributed, status, stop
from dataflex.checkpoints.marks import incomplete_reason
from dataflex.errors import Cancelled, Interrupted
from dataflex.results import opening
from dataflex.trainers.resumption import Resumption

log = logging.getLogger(__name__)


class Stopping(TrainerCallback):
    """Stops training at the end of a step, of an evaluation or of a save, wherever a signal came.

    All processes compare notes there, one number in one collective, since a signal may reach only one of them. An
    evaluation that is under way is finished: its result may decide what is trained next. A signal after the last step
    changes nothing, as little is left to do.

    Args:
        resumption: where the same command would begin.
        writes: whether a checkpoint is written (`dataflex.checkpoint_on_signal`).
        is_training: whether the run is a training, and not one that only computes features.
    """

    def __init__(self, resumption: Resumption, writes: bool, is_training: bool):
        self._resumption, self._writes, self._is_training = resumption, writes, is_training
        self._kept: Callable[[], int] = lambda: 0
        self._step: int | None = None
        self._total = 0
        self._saved = -1
        self._is_stopping, self._is_last = False, False
        self._holds = contextlib.ExitStack()

    def counts(self, kept: Callable[[], int]) -> None:
        """Count what `kept` returns: steps that need not be done again even without a checkpoint."""
        self._kept = kept

    def __enter__(self) -> Stopping:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Let signals interrupt at once again, and have an interruption say where the same command goes on."""
        self._holds.close()
        if isinstance(error, Interrupted):
            error.args = (f"{error} {self.account()}",)
        elif isinstance(error, KeyboardInterrupt):  # it stops where it comes, and nothing more is written
            raise Cancelled(f"Ctrl-C: stopped {self.account()}") from error

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on a signal is only noted."""
        status.training_begins()
        self._holds.enter_context(stop.held())
        self._step, self._total = state.global_step, state.max_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Its rows are there, so nothing can be refused any more: what waits for the first step is done."""
        if self._is_training:
            opening.step_begins(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here, unless the epoch that ends here has work of its own, behind which `on_epoch_end` stops."""
        self._step = state.global_step
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        if not (ends_epoch and IntervalStrategy.EPOCH in (args.eval_strategy, args.save_strategy)):
            self._consider(args, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop with what the evaluation came to."""
        if self._step:  # none in the loop is at step 0, but `eval_on_start`
            self._consider(args, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop with the checkpoint that was just written."""
        self._saved = state.global_step
        self._consider(args, control)
        if self._is_last:
            self._leave()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the loop, which comes here after a stop: what would follow is for a training that is over."""
        at_stop = self._is_stopping
        if not at_stop and control.should_evaluate and args.save_strategy == SaveStrategy.BEST:
            return  # the evaluation would overrule the save: the next step's end stops
        self._consider(args, control)
        if not self._is_stopping:
            return
        if not self._writes or self._saved == state.global_step:
            self._leave()
        if at_stop:  # in the middle of an epoch, or `save_strategy: best` has overruled the save
            control.should_evaluate = control.should_log = False
        control.should_save = self._is_last = True

    def is_due(self, args: Any, state: Any) -> bool:
        """Say whether an update that is broken off, between two steps, is to leave a checkpoint of the last one."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        is_there = incomplete_reason(folder, contents=False) is None
        if not self._writes or state.global_step == 0 or distributed.broadcast(is_there):
            return False
        self._saved = state.global_step
        self._whole(args)
        return True

    def account(self) -> str:
        """Say where the same command goes on, and which steps are done again."""
        if not self._is_training:
            return "where it was; what is committed stays, and the same command computes the rest"
        if self._step is None:
            return "before the first step; the same command begins where this one would have"
        there = f"after step {self._step} of {self._total}"
        resumption = self._resumption
        if resumption.named is not None:
            on = f"; resume_from_checkpoint: true goes on from step {self._saved}" if self._saved > 0 else ""
            return f"{there}; the same command begins at {resumption.named} again{on}"
        if resumption.anew and self._saved > 0:
            return (
                f"{there}; overwrite_output_dir makes the same command begin anew, resume_from_checkpoint: true beside "
                f"it goes on from step {self._saved}"
            )
        done = max(self._kept(), 0 if resumption.anew else resumption.newest(self._step))
        lost = self._step - done
        again = "no step is done again" if not lost else f"{lost} {'step is' if lost == 1 else 'steps are'} done again"
        return f"{there}; the same command goes on from step {done}, {again}"

    def _consider(self, args: Any, control: Any) -> None:
        """Stop if any process was asked to. Collective."""
        if self._is_stopping or control.should_training_stop or not stop.is_asked_anywhere(args.device):
            return
        self._is_stopping = control.should_training_stop = True
        if self._writes and self._saved != self._step:
            control.should_save = True
            self._whole(args)

    def _whole(self, args: Any) -> None:
        if args.save_only_model:
            args.save_only_model = False
            log.warning("save_only_model: this checkpoint has the optimizer's state too, or no run could go on from it")

    def _leave(self) -> None:
        """Raise `Interrupted` once every process has written what it writes. Collective."""
        distributed.barrier()
        stop.leave(together=True)
