"""A model's state as far as names and sizes go, told from what is known of the model, with no model there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex.errors import MismatchError
from dataflex.explanation import explained
from dataflex.features.encoder import TextEncoder
from dataflex.features.need import StateName
from dataflex.features.spec import BASE
from dataflex.fingerprint import model_digest
from dataflex.folders import folder_digest, model_folder
from dataflex.live.live_trainer import LiveTrainer
from dataflex.live.memory import Memory, contents, is_settled
from dataflex.live.sharding import Sharding
from dataflex.live.state import ModelState

Names = Mapping[str, Any]
"""What `ModelState.names` returns."""


def facts_of(state: ModelState, has_moments: bool) -> dict[str, Any]:
    """Return what a `KnownState` knows of a model before its first step, as plain data.

    Args:
        state: the model's.
        has_moments: whether Adam's first moments are among it.
    """
    return {
        "loaded": state.loaded,
        "reference": state.reference,
        "numerics": state.numerics(),
        "hidden": state.hidden_size,
        "trainable": state.trainable_size,
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "adapter": state.has_adapter,
        "quantised": state.quantised_as,
        "end tokens": state.end_tokens,
        "initial": state.names(has_moments),
    }


class KnownState(ModelState):
    """Answers as the `ModelState` that the facts were taken of, where no model is needed for the answer.

    Args:
        facts: of `facts_of`.
        checkpoints: folder -> the names of the state that its checkpoint is of.
        trainer: its arguments and tokenizer are read, and nothing else.
        sharding: how the model will lie over the processes.
        memory: of models that are named beside.
    """

    def __init__(
        self,
        facts: Mapping[str, Any],
        checkpoints: Mapping[str, Names],
        trainer: LiveTrainer,
        sharding: Sharding,
        memory: Memory,
    ):
        self.trainer, self.sharding = trainer, sharding
        self.loaded, self.reference = facts["loaded"], facts["reference"]
        self.encoders = {}
        self._facts, self._memory = facts, memory
        self._names: dict[StateName, Names] = {None: facts["initial"]}
        self._names.update(checkpoints)
        self._checkpoint = None
        self._digests = {}

    @property
    def has_adapter(self) -> bool:
        """As it was."""
        return bool(self._facts["adapter"])

    @property
    def quantised_as(self) -> str | None:
        """As it was."""
        found: str | None = self._facts["quantised"]
        return found

    @property
    def hidden_size(self) -> int:
        """As it was."""
        return int(self._facts["hidden"])

    @property
    def trainable_size(self) -> int:
        """As it was."""
        return int(self._facts["trainable"])

    @property
    def end_tokens(self) -> list[int]:
        """As they were."""
        return list(self._facts["end tokens"])

    def numerics(self) -> dict[str, Any]:
        """Return what they were."""
        return dict(self._facts["numerics"])

    @contextlib.contextmanager
    def at(self, state: StateName) -> Iterator[None]:
        """Answer for another state for a while: `BASE`, or a checkpoint that was given."""
        before, self._checkpoint = self._checkpoint, state
        try:
            yield
        finally:
            self._checkpoint = before

    @contextlib.contextmanager
    def named(self, names: Names) -> Iterator[None]:
        """Answer for a live model of these names for a while."""
        before, self._names[None] = self._names[None], names
        try:
            yield
        finally:
            self._names[None] = before

    def _weights(self, forward_only: bool) -> dict[str, Any] | str:
        if self._checkpoint == BASE:
            return "none"
        found: dict[str, Any] | str = self._names[self._checkpoint]["acting" if forward_only else "weights"]
        return found

    def _adam(self) -> str:
        found = self._names[self._checkpoint].get("adam")
        if found is None:
            raise MismatchError(
                "found no Adam moments, which gradient_type: adam and target_direction: precond_only take; use AdamW, "
                "or sgd for both"
            )
        return str(found)

    def model_digest(self, folder: Path, sums: Mapping[str, str] | None = None) -> str:
        """Name a model folder by content, reading it once for as long as it is the same.

        Raises:
            FileNotFoundError: the folder holds no weight file.
        """
        return str(self._remembered("model digest", folder, lambda: model_digest(folder, sums)))

    def encoder(self, name_or_path: str) -> dict[str, Any]:
        """Return the identity of another model that embeds, reading it once for as long as it is the same."""
        if name_or_path not in self.encoders:
            folder = model_folder(name_or_path)
            files = self._remembered("folder digest", folder, lambda: folder_digest(folder))
            self.encoders[name_or_path] = {"files": files, "text": "system\ntools\nprompt\nresponse"}
        return self.encoders[name_or_path]

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return int(self._facts["parameters"])

    def encoder_sizes(self, name_or_path: str) -> Mapping[str, int]:
        """Return `width` and `parameters` of another model that embeds, which is loaded once.

        Raises:
            ConfigError: a package that it needs is missing.
            MismatchError: it cannot be loaded.
        """

        def load() -> dict[str, int]:
            with explained(f"embedding_model_name_or_path: {name_or_path}", refusal=MismatchError):
                loaded = TextEncoder(model_folder(name_or_path), self.trainer.args.device, 1)
                return {"width": loaded.width, "parameters": loaded.parameters}

        found: Mapping[str, int] = self._remembered("encoder", model_folder(name_or_path), load)
        return found

    def _remembered(self, what: str, folder: Path, find: Callable[[], Any]) -> Any:
        files = _contents(folder)
        about = {"what": what, "files": files}
        found = self._memory.recall(about)
        if found is None:
            found = find()
            if is_settled(files) and _contents(folder) == files:
                self._memory.keep(about, found)
        return found


def _contents(folder: Path) -> dict[str, Any]:
    """Return the files of a folder, and of the base that an adapter in it names."""
    found = contents(folder)
    if "adapter_config.json" in found and "config.json" not in found:
        named = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
        with contextlib.suppress(MismatchError):  # that there is none is said by what reads it
            found |= {f"the base/{name}": about for name, about in _contents(model_folder(str(named))).items()}
    return found
