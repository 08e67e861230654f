"""What is asked of the trainer in whose hands the model is, by those who must not know its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState


class LiveTrainer(Protocol):
    """A Transformers trainer with what LLaMA-Factory and `dataflex.trainers.trainer.DataflexTrainer` add to it.

    `Any` stands where Transformers, PEFT and LLaMA-Factory give no narrower type that holds for every model.
    """

    @property
    def args(self) -> TrainingArguments:
        """The training's arguments."""
        ...

    @property
    def model_arguments(self) -> Any:
        """LLaMA-Factory's `ModelArguments`."""
        ...

    @property
    def finetuning_args(self) -> Any:
        """LLaMA-Factory's `FinetuningArguments`."""
        ...

    @property
    def state(self) -> TrainerState:
        """How far the training has come."""
        ...

    @property
    def accelerator(self) -> Accelerator:
        """What placed the model, and casts its forward passes."""
        ...

    @property
    def model(self) -> Any:
        """The bare model, with its adapter."""
        ...

    @property
    def model_wrapped(self) -> Any:
        """The model as it is trained: in DDP, or DeepSpeed's engine."""
        ...

    @property
    def optimizer(self) -> Any:
        """The optimizer, as accelerate or DeepSpeed wraps it."""
        ...

    @property
    def parameter_groups(self) -> Sequence[dict[str, Any]]:
        """The groups of LLaMA-Factory's optimizer before anything wrapped it."""
        ...

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        ...

    @property
    def model_accepts_loss_kwargs(self) -> bool:
        """Whether the model divides its loss by the step's tokens; else a step is the mean of its micro-batches."""
        ...

    @property
    def is_deepspeed_enabled(self) -> bool:
        """Whether DeepSpeed trains the model."""
        ...

    @property
    def is_fsdp_enabled(self) -> bool:
        """Whether FSDP shards the model."""
        ...

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Put a micro-batch where the model is."""
        ...

    def judge_loss(self, mean: float, where: str) -> None:
        """Warn if a mean loss, in nats per supervised token, is that of a model that guesses."""
        ...
