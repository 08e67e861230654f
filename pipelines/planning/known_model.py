"""What is known of a run's model: remembered, or found out from it once."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex.components.registry import import_plugin
from dataflex.components.user_code import modules_digest
from dataflex.config.arguments import values
from dataflex.config.settings import Settings
from dataflex.features.spec import BASE, ENGINE_VERSION
from dataflex.folders import model_folder
from dataflex.live.base_model import code_elsewhere
from dataflex.live.known import KnownState, facts_of
from dataflex.live.memory import Memory, contents, is_settled
from dataflex.live.sharding import Sharding
from dataflex.live.state import ModelState
from dataflex.stores.root import libraries, versions
from dataflex.trainers.directing import DirectedTrainer
from dataflex.trainers.outline import Prepared

_WAYS = ("content", "configuration", "model", "drawn", "drawn file", "step", "step file", "reference")
"""How arguments enter that may change a weight before the first step, or what a step makes of it."""

_BESIDE = ("accelerate", "bitsandbytes", "flash-attn", "liger-kernel")
"""Libraries that a model is loaded with where they are installed."""


class KnownModel:
    """Facts of a model and of the checkpoints that features are asked of.

    Args:
        settings: the run file.
        prepared: its arguments and rows.
        memory: where facts are remembered.
    """

    def __init__(self, settings: Settings, prepared: Prepared, memory: Memory):
        self._memory, self._prepared = memory, prepared
        args, tuning, training = prepared.model_args, prepared.finetuning_args, prepared.training_args
        states = dict.fromkeys(need.state for need in settings.needs)
        self.checkpoints = [folder for folder in states if folder is not None and folder != BASE]
        is_initial = settings.schedule.warmup_step == 0  # else Adam's moments are asked of a later state
        needs = settings.needs if is_initial else ()
        self._has_moments = any(need.spec.needs_moments for need in needs if need.state is None)
        hub = {"revision": args.model_revision, "cache_dir": args.cache_dir}
        base = model_folder(args.model_name_or_path, **hub)
        adapters = args.adapter_name_or_path or []
        beside = [each.strip() for each in (tuning.ref_model or "", *(tuning.ref_model_adapters or "").split(","))]
        self._folders: Sequence[Path] = [
            base,
            *(model_folder(each, subfolder=args.adapter_folder, **hub) for each in adapters),
            *(model_folder(each, cache_dir=args.cache_dir) for each in beside if each),
        ]
        self._seen: list[dict[str, Any]] = []
        self._about: dict[str, Any] = {
            "what": "model",
            "engine": ENGINE_VERSION,
            "libraries": libraries() | versions(_BESIDE),
            "arguments": values(_WAYS, args, tuning, training),
            "device": str(training.device),
            "precision": os.environ.get("ACCELERATE_MIXED_PRECISION", ""),
            "tokens": len(prepared.tokenizer),
            "code": code_elsewhere(base, args.cache_dir) if args.trust_remote_code else {},
            "plugins": modules_digest(import_plugin(name).__name__ for name in settings.dataflex.plugins),
            "moments": self._has_moments,
        }

    def recall(self) -> list[Any] | None:
        """Return the facts of the model and those of each checkpoint; None where some are not remembered."""
        self._seen = self._abouts()
        found = [self._memory.recall(about) for about in self._seen]
        return None if any(each is None for each in found) else found

    def find_out(self, trainer: DirectedTrainer) -> list[Any]:
        """Return the same facts of a model that is there, and remember them.

        Args:
            trainer: has the model, and has taken no step.

        Raises:
            CorruptionError: a checkpoint is damaged.
            MismatchError: it is not of this model.
        """
        state = ModelState(trainer)
        if trainer.optimizer is None:  # it knows the order of the parameters, and what their moments begin as
            trainer.create_optimizer()
        found = [facts_of(state, self._has_moments)]
        for folder in self.checkpoints:
            with state.at(folder):
                found.append(state.names())
        # What was changed, or downloaded, while it was loaded is known neither as it was nor as it is.
        if self._abouts() == self._seen and all(is_settled(f) for about in self._seen for f in about["files"]):
            for about, facts in zip(self._seen, found, strict=True):
                self._memory.keep(about, facts)
        return found

    def state(self, facts: Sequence[Any], trainer: DirectedTrainer, sharding: Sharding) -> KnownState:
        """Return the state that facts tell of."""
        checkpoints = dict(zip(self.checkpoints, facts[1:], strict=True))
        return KnownState(facts[0], checkpoints, trainer, sharding, self._memory)

    def _abouts(self) -> list[dict[str, Any]]:
        """Return what each of the facts is about, the files as they are now among it."""
        files = [contents(folder) for folder in self._folders]
        return [
            {**self._about, "files": files},
            *({**self._about, "files": [*files, contents(Path(f))], "checkpoint": True} for f in self.checkpoints),
        ]


def sharding_of(settings: Settings) -> Sharding:
    """Return how a run's model will lie over its processes, as its run file says."""
    path = settings.llamafactory.get("deepspeed")
    if not path:
        return Sharding("none")
    stage = path if isinstance(path, dict) else json.loads(Path(path).read_text("utf-8"))
    zero = (stage.get("zero_optimization") or {}).get("stage", 0)
    return Sharding("parameters" if zero == 3 else "optimizer")
