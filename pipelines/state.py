"""The model in a trainer's hands: which state it is in, and how to put it into the state of a checkpoint."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dataflex import distributed
from dataflex.errors import ConfigError, MismatchError
from dataflex.features.adam import Moments, Scalars
from dataflex.features.spec import ENGINE_VERSION, GradientSpec
from dataflex.fingerprint import model_digest, tensors_digest

_MODEL_OPTIONS = (
    "rope_scaling", "shift_attn", "mixture_of_depths", "use_unsloth", "upcast_layernorm", "upcast_lmhead_output",
    "resize_vocab", "add_tokens", "add_special_tokens", "quantization_bit", "enable_liger_kernel", "moe_aux_loss_coef",
)  # fmt: skip
MOMENTS_FILE = "dataflex/moments.safetensors"


class ModelState:
    """Names the state of a live model by its content.

    Args:
        trainer: the running `RoundTrainer`; model and optimizer are read from it at every question.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.model = trainer.model
        self.is_zero3 = is_deepspeed_zero3_enabled()
        if trainer.is_fsdp_enabled:
            raise ConfigError("fsdp: per-example features of a sharded model are not supported; use DDP or DeepSpeed")
        self._base = distributed.broadcast(self._base_identity() if distributed.is_main() else None)
        self._checkpoint: str | None = None
        self._cache: dict[tuple[Any, ...], Any] = {}
        self._held: tuple[tuple[str | None, int], Moments] | None = None

    @property
    def position(self) -> tuple[str | None, int]:
        """Which state the model is in, for as long as this object lives."""
        return self._checkpoint, self.trainer.state.global_step

    def recipe(self, spec: Any) -> dict[str, Any]:
        """Return everything but the row that determines a feature's values. Collective under ZeRO-3."""
        is_gradient = isinstance(spec, GradientSpec)
        recipe: dict[str, Any] = {
            "feature": spec.recipe() if is_gradient else spec.model_dump(exclude={"embedding_model_name_or_path"}),
            "model": {"base": self._base, "adapter": self.weights(forward_only=not is_gradient)},
            "numerics": self._numerics(),
        }
        if is_gradient and spec.direction == "adam":
            recipe["optimizer"] = self.optimizer_identity()
        return recipe

    def origin(self) -> dict[str, Any]:
        """Return the identity that a lineage begins with: base and trainable weights. Collective under ZeRO-3."""
        return {"base": self._base, "weights": self.weights()}

    def weights(self, forward_only: bool = False) -> dict[str, Any] | str:
        """Return the identity of the trainable weights; "none" where an adapter does not act on the output yet."""
        key = ("weights", forward_only, *self.position)
        if key not in self._cache:
            with self._gathered():
                tensors = dict(self.trainable())
                inert = forward_only and self._is_inert(tensors)
                self._cache[key] = (
                    "none" if inert else {"weights": tensors_digest(tensors.items())} | self._adapter_config()
                )
        return self._cache[key]  # type: ignore[no-any-return]

    def optimizer_identity(self) -> dict[str, Any]:
        """Return the identity of Adam's moments, step, betas and epsilon."""
        key = ("moments", *self.position)
        if key not in self._cache:
            self._cache[key] = {"adam": self.moments().digest()}
        return self._cache[key]  # type: ignore[no-any-return]

    def trainable(self) -> list[tuple[str, Any]]:
        """Return the trainable parameters by name, in the model's order."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def moments(self) -> Moments:
        """Return Adam's moments by parameter name: of the checkpoint entered, else of the live optimizer.

        Collective under DeepSpeed when a position is asked about for the first time; `recipe` asks on every rank.

        Raises:
            MismatchError: the optimizer or the checkpoint has no moments that belong to these parameters.
        """
        if self._held is None or self._held[0] != self.position:
            self._held = self.position, self._read_moments()
        return self._held[1]

    def _read_moments(self) -> Moments:
        if self._checkpoint is not None:
            return self._checkpoint_moments(Path(self._checkpoint))
        if self.trainer.is_deepspeed_enabled:
            return self._deepspeed_moments()
        if self.trainer.state.global_step == 0:
            return self._moments_before_any_step()
        return Moments.from_optimizer(self.trainer.optimizer, self.trainable())

    def _moments_before_any_step(self) -> Moments:
        """Return the zeros that Adam begins with."""
        named = dict(self.trainable())
        groups = {id(p): group for group in self.trainer.optimizer.param_groups for p in group["params"]}
        scalars = {}
        for name, parameter in named.items():
            group = groups[id(parameter)]
            if "betas" not in group or "eps" not in group:
                kind = type(self.trainer.optimizer).__name__
                raise MismatchError(f"{kind} has no betas and eps; use optim: adamw_torch, or gradient_type: sgd")
            scalars[name] = _scalars(0, group)
        zeros = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
        return Moments(zeros, zeros, scalars)

    @contextlib.contextmanager
    def at(self, checkpoint: str | None) -> Iterator[None]:
        """Put a checkpoint's trainable weights into the model for a while; None leaves the model as it is.

        Raises:
            MismatchError: the checkpoint's weights are not those of this model.
        """
        if checkpoint is None:
            yield
            return
        if self.is_zero3:
            raise ConfigError("dataflex.params.checkpoints: cannot be loaded into a ZeRO-3 model; use ZeRO-2 or DDP")
        kept = {name: p.detach().clone() for name, p in self.trainable()}
        try:
            self._load(Path(checkpoint))
            self._checkpoint = checkpoint
            yield
        finally:
            self._checkpoint = None
            with torch.no_grad():
                for name, parameter in self.trainable():
                    parameter.copy_(kept[name])

    def _base_identity(self) -> dict[str, Any]:
        """Name the frozen base: its files, the adapters merged into it, and the options it was loaded with."""
        args = self.trainer.model_arguments
        adapters = list(args.adapter_name_or_path or [])
        if not self.trainer.finetuning_args.create_new_adapter:
            adapters = adapters[:-1]  # the last one goes on being trained: it is among the trainable weights
        options = {name: getattr(args, name, None) for name in _MODEL_OPTIONS}
        return {
            "weights": model_digest(model_folder(args.model_name_or_path)),
            "merged": [model_digest(model_folder(path)) for path in adapters],
            "options": {name: _plain(value) for name, value in options.items() if value},
        }

    def _adapter_config(self) -> dict[str, Any]:
        """Return what scales the adapter's weights, which the weights do not tell."""
        configs = getattr(self.model, "peft_config", None)
        if not configs:
            return {}
        config = configs[self.model.active_adapter]
        names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        return {name: _plain(getattr(config, name)) for name in names if getattr(config, name, None)}

    def _is_inert(self, tensors: dict[str, Any]) -> bool:
        """Say whether only LoRA is trained and every B is zero: the model computes what its base does."""
        if not tensors or not all("lora_" in name for name in tensors):
            return False
        return all(
            not bool(p.detach().any()) for name, p in tensors.items() if "lora_B" in name or "lora_embedding_B" in name
        )

    def _numerics(self) -> dict[str, Any]:
        args = self.trainer.args
        compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "none"
        frozen = next((p.dtype for p in self.model.parameters() if not p.requires_grad), None)
        return {
            "engine": ENGINE_VERSION,
            "autocast": compute,
            "weights": str(frozen or next(self.model.parameters()).dtype),
            "attention": str(getattr(self.model.config, "_attn_implementation", "unknown")),
            "reduction": "mean over supervised tokens",
        }

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        """Make partitioned trainable parameters whole for a while; no-op but under ZeRO-3, where it is collective."""
        if not self.is_zero3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for _, p in self.trainable() if hasattr(p, "ds_id")]):
            yield

    def _deepspeed_moments(self) -> Moments:
        """Gather the moments from DeepSpeed's shards. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        engine = self.trainer.model_wrapped
        groups = engine.optimizer.param_groups
        if not self.trainer.state.global_step:
            raise MismatchError(
                "gradient_type: adam has no moments before the first step under DeepSpeed; set warmup_step"
            )
        averages: dict[str, Any] = {}
        squares: dict[str, Any] = {}
        for name, parameter in self.trainable():
            for kept, key in ((averages, "exp_avg"), (squares, "exp_avg_sq")):
                value = safe_get_full_optimizer_state(parameter, key)
                if value is None:
                    raise MismatchError(
                        f"{name}: DeepSpeed's optimizer holds no {key}; use AdamW, or gradient_type: sgd"
                    )
                kept[name] = value.detach().float().cpu()
        step = self.trainer.state.global_step - int(engine.skipped_steps)
        return Moments(averages, squares, dict.fromkeys(averages, _scalars(step, groups[0])))

    def _load(self, folder: Path) -> None:
        """Copy a checkpoint's trainable weights into the model, every one of them or none."""
        from safetensors.torch import load_file

        if (folder / "adapter_model.safetensors").is_file():
            found = {
                _with_adapter(k, self.model): v for k, v in load_file(folder / "adapter_model.safetensors").items()
            }
            self._check_adapter(folder)
        elif shards := sorted(folder.glob("model*.safetensors")):
            found = {k: v for shard in shards for k, v in load_file(shard).items()}
        else:
            raise MismatchError(
                f"{folder}: found neither adapter_model.safetensors nor model*.safetensors; expected a checkpoint"
            )
        ours = dict(self.trainable())
        missing = sorted(ours.keys() - found.keys())
        wrong = sorted(n for n in ours.keys() & found.keys() if ours[n].shape != found[n].shape)
        if missing or wrong or ("lora_" in next(iter(ours), "") and found.keys() - ours.keys()):
            raise MismatchError(
                f"{folder}: its weights are not those of this run's trainable parameters: {len(missing)} missing "
                f"(first: {missing[:1]}), {len(wrong)} of another shape (first: {wrong[:1]}), "
                f"{len(found.keys() - ours.keys())} unknown; use the finetuning_type, "
                "lora_rank and lora_target it was made with"
            )
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(found[name].to(parameter))

    def _check_adapter(self, folder: Path) -> None:
        """Refuse a checkpoint whose adapter is scaled differently."""
        theirs = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        for name, value in self._adapter_config().items():
            if _plain(theirs.get(name)) != value:
                raise MismatchError(f"{folder}/adapter_config.json: {name} is {theirs.get(name)}, this run has {value}")

    def _checkpoint_moments(self, folder: Path) -> Moments:
        if (folder / MOMENTS_FILE).is_file():
            return Moments.load(folder / MOMENTS_FILE)
        if not (folder / "optimizer.pt").is_file():
            raise MismatchError(
                f"{folder}: found neither {MOMENTS_FILE} nor optimizer.pt; gradient_type: adam needs the optimizer "
                "state. Train with save_only_model: false, or use gradient_type: sgd"
            )
        if self.trainer.is_deepspeed_enabled:
            raise ConfigError(
                f"{folder}/optimizer.pt: cannot be matched to DeepSpeed's parameters; run without deepspeed"
            )
        names = {id(p): name for name, p in self.trainable()}
        groups = self.trainer.optimizer.param_groups
        ordered = {names[id(p)]: tuple(p.shape) for group in groups for p in group["params"]}
        # The one place where a pickle is read, with torch's restricted unpickler: ids are all that optimizer.pt has.
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        return Moments.from_optimizer_pt(state, list(ordered), ordered)


def model_folder(name_or_path: str) -> Path:
    """Return the local folder of a model or adapter, a Hub name resolved to its downloaded snapshot."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from transformers.utils.hub import cached_file

    for name in ("config.json", "adapter_config.json"):
        found = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return Path(found).parent
    raise MismatchError(f"{name_or_path}: found no configuration; expected a model or adapter, local or on the Hub")


def _scalars(step: int, group: Any) -> Scalars:
    beta1, beta2 = group["betas"]
    return Scalars(step, float(beta1), float(beta2), float(group["eps"]))


def _with_adapter(key: str, model: Any) -> str:
    """Insert the adapter's name, which PEFT leaves out of its files."""
    adapter = model.active_adapter
    for part in ("lora_A", "lora_B"):
        if f".{part}." in key and f".{part}.{adapter}." not in key:
            return key.replace(f".{part}.", f".{part}.{adapter}.")
    for part in ("lora_embedding_A", "lora_embedding_B"):
        if key.endswith(f".{part}"):
            return f"{key}.{adapter}"
    return key


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | type(None) | dict) else str(value)
