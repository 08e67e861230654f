"""How a model in training lies over the processes, and what follows from it; nobody else asks for a kind by name."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.tensor import distribute_tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dataflex.errors import ConfigError
from dataflex.features.sharded import put_back, whole
from dataflex.live.live_trainer import LiveTrainer


@dataclass(frozen=True)
class Sharding:
    """How a model lies over the processes.

    Attributes:
        kind: none: each process has all of it, DDP or alone; optimizer: DeepSpeed below ZeRO-3 deals out the
            optimizer's state, and the gradients; parameters: ZeRO-3 deals out the weights too; fsdp: FSDP2 does.
        cast: the precision that FSDP2 gathers every weight in, such as "bfloat16"; None: that which it has.
        is_loaded_late: whether other processes than the first have no weights before FSDP2 deals them out.
    """

    kind: Literal["none", "optimizer", "parameters", "fsdp"]
    cast: str | None = None
    is_loaded_late: bool = False

    @classmethod
    def of(cls, trainer: LiveTrainer) -> Sharding:
        """Return how a trainer's model lies, or will lie when its first step begins.

        Raises:
            ConfigError: in a way under which values are not known to be right.
        """
        if trainer.is_fsdp_enabled:
            plugin = trainer.accelerator.state.fsdp_plugin
            _refuse(plugin, trainer.args)
            if getattr(trainer.model.config, "quantization_config", None) is not None:
                raise ConfigError(
                    "model_name_or_path: found a quantised base under FSDP2; expected half or full precision. "
                    "What is trained over quantised weights that are dealt out was not verified; use DDP or ZeRO-2"
                )
            dtype = getattr(plugin.mixed_precision_policy, "param_dtype", None)
            cast = None if dtype is None else str(dtype).removeprefix("torch.")
            return cls("fsdp", cast, bool(plugin.cpu_ram_efficient_loading))
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ConfigError(
                "ACCELERATE_USE_FSDP in the environment: found a model that accelerate does not shard; expected "
                "several processes with a device each, under a launcher such as torchrun. Leave FSDP out, or start them"
            )
        if is_deepspeed_zero3_enabled():
            return cls("parameters")
        return cls("optimizer" if trainer.is_deepspeed_enabled else "none")

    @property
    def name(self) -> str:
        """What people call it."""
        return {"none": "DDP", "optimizer": "DeepSpeed", "parameters": "ZeRO-3", "fsdp": "FSDP2"}[self.kind]

    @property
    def has_whole_weights(self) -> bool:
        """Whether each process has every weight, so that weights can be compared and run by one alone."""
        return self.kind not in ("parameters", "fsdp")

    @property
    def takes_weights(self) -> bool:
        """Whether a checkpoint's weights can be put into the model."""
        return self.kind != "parameters"

    @property
    def has_torch_optimizer(self) -> bool:
        """Whether the optimizer is torch's, its state by parameter, and checkpoints are those of one process."""
        return self.kind in ("none", "fsdp")

    @property
    def numerics(self) -> dict[str, Any]:
        """What of a model's numerics is otherwise than without sharding; empty where nothing is."""
        # Trained weights, kept in float32, act in the precision of the cast too, and without autocast's exceptions.
        return {} if self.cast is None else {"weights": f"torch.{self.cast}", "cast by": "FSDP2"}

    @contextlib.contextmanager
    def gathered(self, parameters: Sequence[Any]) -> Iterator[None]:
        """Make ZeRO-3's weights whole for a while; collective there, else nothing."""
        if self.kind != "parameters":
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
            yield

    def whole(self, named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield tensors whole, one after the other; collective under FSDP2, where they go to the CPU."""
        for name, tensor in named:
            yield name, whole(tensor.detach()).cpu() if self.kind == "fsdp" else tensor

    def settle(self, model: Any) -> None:
        """Leave each process the part of the weights that is its own, as the optimizer has it."""
        if self.kind == "fsdp":
            put_back(model)


def _refuse(plugin: Any, args: Any) -> None:
    """Refuse ways of FSDP that were not seen to give right values.

    Raises:
        ConfigError: this is one.
    """
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"fsdp: found FSDP{plugin.fsdp_version}, whose flat parameters have no gradients of single rows; expected "
            "FSDP2. Set fsdp_version: 2 in the configuration of accelerate, or use DDP or DeepSpeed"
        )
    if "src_data_rank" not in inspect.signature(distribute_tensor).parameters:
        raise ConfigError(
            f"fsdp: found torch {torch.__version__}; expected a newer one, in which each process takes its own part of "
            "a weight that all have"
        )
    if plugin.activation_checkpointing:
        raise ConfigError(
            "fsdp: found activation_checkpointing, which renames the weights; expected it to be off. LLaMA-Factory "
            "checkpoints activations itself, unless disable_gradient_checkpointing says otherwise"
        )
    if getattr(plugin.cpu_offload, "pin_memory", None) is not None:  # `CPUOffloadPolicy`; without, a plain policy
        raise ConfigError(
            "fsdp: found weights that are offloaded to the CPU; expected them on the devices, as features under "
            "offloading were never held against one process. Set fsdp_offload_params: false, or use ZeRO-3"
        )
    if args.torch_compile:
        raise ConfigError("torch_compile: found true under FSDP2; expected false, as it renames the weights")
