"""The model in a trainer's hands: the name of the state that it is in."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex import distributed
from dataflex.checkpoints.marks import is_marked, require_whole
from dataflex.config import quantised
from dataflex.errors import ConfigError, CoverageError, DataflexError, MismatchError
from dataflex.explanation import explained
from dataflex.features.adam import Moments
from dataflex.features.facts import Feature
from dataflex.features.need import StateName
from dataflex.features.sharded import is_dealt_out
from dataflex.features.spec import BASE, ENGINE_VERSION
from dataflex.fingerprint import model_digest, tensors_digest
from dataflex.folders import folder_digest, model_folder
from dataflex.live import frozen, weights
from dataflex.live.base_model import base_identity, reference_identity
from dataflex.live.live_trainer import LiveTrainer
from dataflex.live.moments import checkpoint_moments, live_moments
from dataflex.live.sharding import Sharding

log = logging.getLogger(__name__)


class ModelState:
    """Names the state of a live model by its content.

    Args:
        trainer: the running trainer; model and optimizer are read from it at every question.

    Raises:
        ConfigError: the model is sharded in a way under which values are not known to be right.
    """

    def __init__(self, trainer: LiveTrainer):
        self.trainer = trainer
        self.model = trainer.model
        self.sharding = Sharding.of(trainer)
        self._digests: dict[Path, str] = {}
        named = (
            (base_identity(trainer, self.model_digest), reference_identity(trainer)) if distributed.is_main() else None
        )
        found = distributed.broadcast(named)
        assert found is not None
        self.loaded: dict[str, Any] = found[0]
        """The base as it was loaded: its frozen weights, code, configuration and options."""
        self.reference: list[Any] = found[1]
        """The models that the training loss compares with."""
        self.encoders: dict[str, dict[str, Any]] = {}
        """Identities of other models that embed, by what they are called: each is read once for the run."""
        self._checkpoint: StateName = None
        self._whole: set[str] = set()
        self._compared: set[str] = set()
        self._known: dict[tuple[Any, ...], Any] = {}
        self._moments: tuple[tuple[str | None, int], Moments] | None = None

    @property
    def position(self) -> tuple[str | None, int]:
        """Cache key of the current state: the checkpoint entered, and the global step."""
        return self._checkpoint, self.trainer.state.global_step

    @property
    def has_adapter(self) -> bool:
        """True for a PEFT model: its base can be run at any step by disabling the adapter."""
        return hasattr(self.model, "disable_adapter")

    @property
    def base(self) -> dict[str, Any]:
        """What the frozen weights are, whatever they are computed with: files, merged adapters, random draws."""
        return {name: self.loaded[name] for name in ("weights", "merged", "drawn")}

    def require_runnable(self) -> None:
        """Refuse to compute features of weights that are not at hand.

        Raises:
            CoverageError: of the base model, whose own weights have been trained.
            ConfigError: of a model that FSDP2 has not dealt out yet, as it does behind the run's preparations; or of a
                base that ZeRO-3 has sharded, whose engine does not run yet.
        """
        if self.sharding.kind == "fsdp" and not is_dealt_out(self.model):
            raise ConfigError(
                "found features that are wanted before the first step, when other processes than the first may have no "
                "weights under FSDP2; expected them in the stores. Compute them with `dataflex featurize` without FSDP"
            )
        if self._checkpoint != BASE or self.has_adapter:
            return
        if not self.sharding.takes_weights:
            raise ConfigError(
                "deepspeed: features of the base of a model that is trained whole cannot be computed under ZeRO-3; use "
                "ZeRO-2, or compute them with `dataflex featurize` without it"
            )
        if self.trainer.state.global_step:
            raise CoverageError(
                "features of the base model are missing, and its weights have been trained meanwhile; compute them "
                "with `dataflex featurize` first"
            )

    @contextlib.contextmanager
    def at(self, state: StateName) -> Iterator[None]:
        """Put the model into another state for a while; None leaves it as it is.

        Args:
            state: a checkpoint's folder, whose trainable weights are loaded, or `BASE`, the model without the adapter.

        Raises:
            CorruptionError: the checkpoint is damaged.
            MismatchError: its weights are not those of this model, or were trained over another base.
            ConfigError: the model is sharded by ZeRO-3.
        """
        if state is None:
            yield
            return
        if state == BASE:
            leave_out = getattr(self.model, "disable_adapter", contextlib.nullcontext)
            entered = leave_out()
        elif not self.sharding.takes_weights:
            raise ConfigError(
                f"{state}: a checkpoint's weights cannot be put into a model that ZeRO-3 has sharded; use ZeRO-2 or DDP"
            )
        else:
            self.require_whole(state)
            self.require_same_base(state)
            self.sharding.settle(self.model)
            entered = weights.loaded(Path(state), self.model, weights.scaling(self.model))
        with entered:
            self._checkpoint = state
            try:
                yield
            finally:
                self._checkpoint = None

    def require_whole(self, folder: str) -> None:
        """Hold a checkpoint's files against its mark, once for the run; one process of each node reads. Collective.

        Raises:
            CorruptionError: a file is missing or damaged, or was put there afterwards.
        """
        if folder in self._whole:
            return
        self._on_each_node(lambda: require_whole(folder))
        if distributed.is_main() and not is_marked(folder) and (Path(folder) / "trainer_state.json").is_file():
            log.warning("%s: dataflex did not write it, so whether it is whole is not known", folder)
        self._whole.add(folder)

    def require_same_base(self, folder: str, is_resumed: bool = False) -> None:
        """Hold what a checkpoint was trained on against what this run is trained on, once for the run. Collective.

        Args:
            folder: the checkpoint.
            is_resumed: whether all of it is loaded, its buffers too.

        Raises:
            MismatchError: a frozen weight differs, or the base.
        """
        if folder not in self._compared:
            self._on_each_node(lambda: self._compare_base(Path(folder), is_resumed))
            self._compared.add(folder)

    def _compare_base(self, folder: Path, is_resumed: bool) -> None:
        is_known = all(parameter.requires_grad for parameter in self.model.parameters())
        if is_resumed and is_known:
            return
        if self.sharding.takes_weights and not is_resumed:
            weights.check(folder, self.model, weights.scaling(self.model))
        if self.sharding.has_whole_weights:
            is_known = frozen.covers(folder, self.model, buffers=not is_resumed)
        if not is_known:
            frozen.require_base(folder, self.base, self.trainer.model_arguments)

    @staticmethod
    def _on_each_node(check: Callable[[], None]) -> None:
        """Run a check on one process of each node; what it refuses is refused on every process. Collective."""
        with distributed.together():
            if distributed.local_rank() == 0:
                check()

    def recipe(self, spec: Feature) -> dict[str, Any]:
        """Return everything but the row that determines a feature's values. Collective where anything is dealt out."""
        is_gradient = spec.gradient is not None
        recipe: dict[str, Any] = {
            "feature": spec.recipe(),
            "model": {"base": self.loaded, "adapter": self._weights(forward_only=not is_gradient)},
            "numerics": self.numerics(),
        }
        if is_gradient and self._checkpoint == BASE:
            raise ConfigError("gradients of the base model: there are none, the weights that are trained are left out")
        if spec.needs_moments:
            recipe["optimizer"] = {"adam": self._adam()}
        return recipe

    def names(self, has_moments: bool = True) -> dict[str, Any]:
        """Return what features of the current state are named by. Collective where anything is dealt out.

        Args:
            has_moments: whether Adam's moments are named too, if the optimizer has them.

        Returns:
            `acting`: the trainable weights as a forward pass sees them; `weights`: as they are; `adam`: the moments.
        """
        found: dict[str, Any] = {"acting": self._weights(forward_only=True), "weights": self._weights(False)}
        with contextlib.suppress(DataflexError):  # an optimizer that is not Adam
            found |= {"adam": self._adam()} if has_moments else {}
        return found

    def _adam(self) -> str:
        """Return the digest of Adam's moments."""
        key = ("moments", *self.position)
        if key not in self._known:
            self._known[key] = self.moments().digest()
        return str(self._known[key])

    @property
    def quantised_as(self) -> str | None:
        """How the base is quantised, by the run file or since it was saved."""
        return quantised.kind_of(getattr(self.model.config, "quantization_config", None))

    def refuse_quantised(self, has_gradients: bool) -> None:
        """Refuse values of single rows where the base is quantised in a way under which they are not exact.

        Args:
            has_gradients: whether gradients are among the values.

        Raises:
            ConfigError: it is.
        """
        found = self.quantised_as
        if found is not None and not self.sharding.has_whole_weights:
            raise ConfigError(
                f"model_name_or_path: found a base quantised as {found} under {self.sharding.name}; expected ZeRO-2 or "
                "DDP. Values of single rows were not verified over quantised weights that are dealt out"
            )
        if found == quantised.BATCHED or (has_gradients and found not in (None, quantised.EXACT)):
            why = quantised.WHY_NO_VALUES if found == quantised.BATCHED else quantised.WHY_NO_GRADIENTS
            raise ConfigError(
                f"model_name_or_path: found a base quantised as {found}; expected {quantised.EXACT}, or none. {why}"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states; a model of several kinds of input has its text part's."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def trainable_size(self) -> int:
        """Elements of all trainable parameters."""
        return sum(parameter.numel() for _, parameter in self.trainable())

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end what the model writes, as far as its generation configuration names any."""
        found = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return found if isinstance(found, list) else [] if found is None else [found]

    def origin(self) -> dict[str, Any]:
        """Return what a lineage begins with: base, trainable weights, numerics. Collective under ZeRO-3 and FSDP2."""
        begun = {"base": self.loaded, "weights": self._weights(forward_only=False), "numerics": self.numerics()}
        return begun | ({"reference": self.reference} if self.reference else {})

    def encoder(self, name_or_path: str) -> dict[str, Any]:
        """Return the identity of another model that embeds.

        Raises:
            DataflexError: there is none.
        """
        if name_or_path not in self.encoders:
            with explained(f"embedding_model_name_or_path: {name_or_path}", refusal=MismatchError):
                files = folder_digest(model_folder(name_or_path))
            self.encoders[name_or_path] = {"files": files, "text": "system\ntools\nprompt\nresponse"}
        return self.encoders[name_or_path]

    def model_digest(self, folder: Path, sums: Mapping[str, str] | None = None) -> str:
        """Name a model folder by content, reading it once for the run.

        Args:
            folder: the model's or adapter's.
            sums: SHA-256 of files in it that is known already.

        Raises:
            FileNotFoundError: the folder holds no weight file.
        """
        place = folder.resolve()
        if place not in self._digests:
            self._digests[place] = model_digest(folder, sums)
        return self._digests[place]

    def trainable(self) -> list[tuple[str, Any]]:
        """Return the trainable parameters by name, in the model's order."""
        self.sharding.settle(self.model)
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def moments(self) -> Moments:
        """Return Adam's moments by parameter name: of the checkpoint entered, else of the live optimizer.

        Collective, where anything is dealt out, when a position is asked about for the first time; `recipe` asks on
        every rank.

        Raises:
            MismatchError: the optimizer or the checkpoint has no moments that belong to these parameters.
        """
        if self._moments is None or self._moments[0] != self.position:
            named = self.trainable()
            found = (
                live_moments(self.trainer, self.sharding, named)
                if self._checkpoint is None
                else checkpoint_moments(Path(self._checkpoint), self.trainer, self.sharding, named)
            )
            self._moments = self.position, found
        return self._moments[1]

    def _weights(self, forward_only: bool) -> dict[str, Any] | str:
        """Return the identity of the trainable weights; "none" where an adapter does not act on the output yet."""
        if self._checkpoint == BASE:
            return "none"
        key = ("weights", forward_only, *self.position)
        if key not in self._known:
            tensors = self.trainable()
            with self.sharding.gathered([parameter for _, parameter in tensors]):
                is_inert = forward_only and _is_inert(tensors, self.sharding)
                named = None if is_inert else tensors_digest(self.sharding.whole(tensors))
                self._known[key] = "none" if named is None else {"weights": named} | weights.scaling(self.model)
        return self._known[key]

    def numerics(self) -> dict[str, Any]:
        """Return what the same weights are computed with."""
        return numerics(self.trainer) | self.sharding.numerics


def numerics(trainer: LiveTrainer) -> dict[str, Any]:
    """Return what the weights of a trainer's model are computed with: precision, attention, engine."""
    # Accelerate's: where the run file is silent, a launcher may set it (ACCELERATE_MIXED_PRECISION).
    model, precision = trainer.model, str(trainer.accelerator.mixed_precision)
    frozen = next((p.dtype for p in model.parameters() if not p.requires_grad), None)
    return {
        "engine": ENGINE_VERSION,
        "autocast": {"bf16": "bfloat16", "fp16": "float16", "no": "none"}.get(precision, precision),
        "weights": str(frozen or next(model.parameters()).dtype),
        "attention": str(getattr(model.config, "_attn_implementation", "unknown")),
        "reduction": "mean over supervised tokens",
    }


def _is_inert(tensors: list[tuple[str, Any]], sharding: Sharding) -> bool:
    """Say whether only LoRA is trained and every B is zero: the model computes what its base does."""
    factors = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    if not tensors or not all(any(factor in name for factor in factors) for name, _ in tensors):
        return False
    outer = ((name, p) for name, p in tensors if "lora_B" in name or "lora_embedding_B" in name)
    return not any(bool(p.detach().any()) for _, p in sharding.whole(outer))
