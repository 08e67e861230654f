"""Where a run begins: at a checkpoint that was named, at the newest one that is whole, or anew."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex import distributed
from dataflex.checkpoints.marks import agreed, incomplete_reason, is_marked, newest_complete, newest_first, step_of
from dataflex.errors import ConfigError, CorruptionError, MismatchError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumption:
    """What a run file says about where to begin.

    Attributes:
        output_dir: where the run's checkpoints are.
        named: the folder that `resume_from_checkpoint` names, if it names one.
        wanted: whether it says true: a checkpoint must be there.
        anew: `overwrite_output_dir`: what is there is left alone, unless a checkpoint is named or wanted.
        takes_unmarked: whether checkpoints that LLaMA-Factory wrote alone are gone on from (`train_type: static`).
    """

    output_dir: str
    named: str | None
    wanted: bool
    anew: bool
    takes_unmarked: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any], takes_unmarked: bool) -> Resumption:
        """Read LLaMA-Factory's keys."""
        said = arguments.get("resume_from_checkpoint")
        named = said if isinstance(said, str) else None
        anew = bool(arguments.get("overwrite_output_dir")) and not said
        folder = str(arguments.get("output_dir", "trainer_output"))  # Transformers' default
        return cls(folder, named, said is True, anew, takes_unmarked)

    def arguments(self) -> dict[str, Any]:
        """Return what keeps LLaMA-Factory from choosing a checkpoint itself: it would take the newest, whole or not.

        Only names and sizes are looked at here: there is no process group yet in which one process could read for all.

        Raises:
            ConfigError: the folder named is not there, or there is none where one is wanted.
            CorruptionError: it is damaged, or none is whole where one is wanted.
            MismatchError: it cannot be gone on from.
        """
        if self.named is not None:
            self._check_named(self.named)
            return {}
        if self.anew or (self.takes_unmarked and not self._has_marks()):
            return {}
        checkpoint, skipped = newest_complete(self.output_dir, contents=False)
        if checkpoint is not None:
            return {"resume_from_checkpoint": checkpoint}
        self._refuse_none()
        # Otherwise LLaMA-Factory would pick up the incomplete ones.
        return {"overwrite_output_dir": True} if skipped else {}

    def start(self, chosen: str | None) -> str | None:
        """Return the folder to begin from, every byte of it checked once on each node; None begins anew. Collective.

        Args:
            chosen: what LLaMA-Factory made of `arguments`.

        Raises:
            CorruptionError: no checkpoint is whole, and one is wanted.
        """
        if self.named is not None or self.anew:
            return chosen
        if self.takes_unmarked and not any(distributed.gather(self._has_marks())):
            if chosen is not None and distributed.is_main():
                log.warning("%s: dataflex did not write it, so whether it is whole is not known", chosen)
            return chosen
        found = agreed(self.output_dir)
        if found is None:
            self._refuse_none()
        return found

    def newest(self, step: int) -> int:
        """Return the step of the newest checkpoint up to a step that seems whole, by names and sizes; 0: none."""
        takes_any = self.takes_unmarked and not self._has_marks()
        for path in newest_first(self.output_dir):
            if step_of(path) <= step and (takes_any or incomplete_reason(path, contents=False) is None):
                return step_of(path)
        return 0

    def _has_marks(self) -> bool:
        return any(is_marked(path) for path in newest_first(self.output_dir))

    def _refuse_none(self) -> None:
        if self.wanted:
            kind = CorruptionError if newest_first(self.output_dir) else ConfigError
            raise kind(
                f"resume_from_checkpoint: no complete checkpoint in {self.output_dir}; remove the key to start anew"
            )

    def _check_named(self, named: str) -> None:
        """Refuse a checkpoint that is not whole; one process of each node reads it, and its refusal ends them all."""
        if not Path(named).is_dir():
            raise ConfigError(f"resume_from_checkpoint: found {named}; expected the folder of a checkpoint")
        if not is_marked(named) and self.takes_unmarked:
            return
        if distributed.local_rank() != 0 or (reason := incomplete_reason(named)) is None:
            return
        kind = (
            CorruptionError if is_marked(named) and not re.search("save_only_model|renamed", reason) else MismatchError
        )
        raise kind(f"resume_from_checkpoint: {named} cannot be resumed from: {reason}. Name a whole one.")
