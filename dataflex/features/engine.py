"""Losses, embeddings and projected gradients of many examples in one pass over them.

B rows of a batch, T tokens, K numbers per projected gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataflex.errors import ConfigError, DataflexError
from dataflex.features.adam import Moments, adam_direction
from dataflex.features.batching import Batch, collate, plan_batches
from dataflex.features.cross_entropy import token_losses
from dataflex.features.gradient import Parameter, trainable_parameters
from dataflex.features.head import Head, find_head
from dataflex.features.inference import evaluation
from dataflex.features.lora import in_one
from dataflex.features.pooling import pool
from dataflex.features.projection import Projector, build_projector
from dataflex.features.sketch import DidNotRun, Direction, Sketches, Target
from dataflex.features.spec import (
    EmbeddingSpec,
    FeatureSpec,
    FeatureValues,
    GradientSpec,
    LossSpec,
    Projection,
    TokenLossSpec,
)
from dataflex.rows import Status


class FeatureEngine:
    """Computes features of examples from a model that may be in the middle of its training.

    Values are those of the model in eval mode, and nothing of it is changed: not `.grad`, random states, or flags. The
    gradient is that of each example's *mean* cross-entropy over its supervised tokens, whatever batch it is in.

    Args:
        model: the bare module (PeftModel or PreTrainedModel), not a DDP wrapper or a DeepSpeed engine.
        pad_token_id: fills up short rows of a batch; which token it is does not matter.
        padding_side: "right" or "left".
        token_budget: tokens of a batch, padding included.
        autocast: makes the context of the forward pass, for mixed precision.
        moments: Adam's moments, for gradients with `direction: adam`; may be replaced between calls.
        device: where batches go; the model's own by default.
        is_loaded: whether this process has the weights; without them nothing can be tried before the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pad_token_id: int,
        padding_side: str = "right",
        token_budget: int = 8192,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        moments: Moments | None = None,
        device: torch.device | str | None = None,
        is_loaded: bool = True,
    ) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise DataflexError("the feature engine was given a DistributedDataParallel; give it the module inside")
        self.model, self.moments, self._is_loaded = model, moments, is_loaded
        self.token_budget = token_budget
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self._collate = partial(collate, pad_token_id=pad_token_id, padding_side=padding_side, device=self.device)
        self.measured = np.zeros(2)
        """Loss in nats and tokens, summed over the usable rows so far that a loss or a gradient was taken of."""
        # Two tokens, so that one of them is predicted and there is a loss to go back from.
        self._dummy = {"input_ids": [pad_token_id] * 2, "labels": [pad_token_id] * 2}
        self.autocast = autocast
        self._projectors: dict[Projection, Projector] = {}  # kept, as sjlt and srht make random tables on first use
        # PEFT's wrapper takes any keyword and does not say which its model takes.
        get_base: Any = getattr(model, "get_base_model", lambda: model)
        self._accepts = inspect.signature(get_base().forward).parameters

    @cached_property
    def parameters(self) -> list[Parameter]:
        """The trainable parameters whose gradients are taken."""
        return trainable_parameters(self.model)

    def require_rules(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Check that every trainable parameter has an exact per-example gradient, by taking one; nothing is kept.

        Args:
            examples: rows of the data; run only if two tokens do not reach every module, as in a layer of many experts.

        Raises:
            DataflexError: a parameter has no exact rule; it is named.
        """
        spec = GradientSpec(projection=Projection(dim=16))
        if not self._can_try:
            trainable_parameters(self.model)
            return
        try:
            self.compute([], [spec])
        except DidNotRun:
            self.compute(examples, [spec])

    def require_layers(self, specs: Sequence[FeatureSpec]) -> None:
        """Check that the model has the layers that embeddings ask for, by one pass over two tokens.

        Raises:
            ConfigError: the model has no such layer.
        """
        embeddings = [spec for spec in specs if isinstance(spec, EmbeddingSpec)]
        if embeddings and self._can_try:
            self.compute([], embeddings)
            return
        config: Any = self.model.config
        for spec in embeddings:
            _require_layer(spec, int(config.get_text_config().num_hidden_layers) + 1)

    @property
    def _can_try(self) -> bool:
        """Whether a forward pass can be tried: where ZeRO-3 holds the weights, not before its engine is set up."""
        return self._is_loaded and not any(hasattr(p, "ds_id") for p in self.model.parameters())

    def compute(
        self,
        examples: Sequence[Mapping[str, Any]],
        specs: Sequence[FeatureSpec],
        min_batches: int = 0,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[FeatureValues]:
        """Return the values of each feature, rows in the order of `examples`.

        Each batch is one forward pass, and one backward pass if any gradient is asked for. Under sharded parameters
        (ZeRO-3, FSDP) every rank must run as many: give each the largest `count_batches` of all ranks as `min_batches`,
        and the missing ones are run on a dummy row. `on_batch` is told the rows and tokens of each batch that is done.

        Raises:
            ConfigError: a specification cannot be computed together with this model or these moments.
            DataflexError: the model or an example has no exact features.
        """
        directions: dict[str, Direction | None] = {}
        targets = [self._target(spec, directions) for spec in specs if isinstance(spec, GradientSpec)]
        sketches = Sketches(self.parameters, targets) if targets else None
        lengths = [len(e["input_ids"]) for e in examples]
        plan, longest = plan_batches(lengths, self.token_budget), max(lengths, default=2)
        values: list[FeatureValues] = []
        with ExitStack() as stack:
            stack.enter_context(evaluation(self.model))
            tapped = sketches.modules if sketches else []
            stack.enter_context(in_one(self.model, sketches.taps if sketches else None, tapped))
            if sketches:  # after the others, who ask whether somebody else looks into a layer
                stack.enter_context(sketches.taps.on(tapped))
            # At least one batch: without rows, that of the dummy still tells which columns and widths there are.
            for number in range(max(len(plan), min_batches, 1)):
                rows = plan[number].tolist() if number < len(plan) else []
                batch = self._collate([examples[i] for i in rows] or [self._dummy])
                parts = self._run(batch, specs, sketches, longest, counts=bool(rows))
                values = values or [_empty(part, len(examples)) for part in parts]
                for whole, part in zip(values, parts, strict=True):
                    _place(part, rows, whole)
                if on_batch is not None:
                    on_batch(len(rows), sum(lengths[i] for i in rows))
        return values

    def _target(self, spec: GradientSpec, directions: dict[str, Direction | None]) -> Target:
        if spec.projection not in self._projectors:
            sizes = {p.key: p.size for p in self.parameters}
            self._projectors[spec.projection] = build_projector(spec.projection, sizes)
        projector = self._projectors[spec.projection]
        if spec.direction == "sgd":
            return Target(None, projector)
        if self.moments is None:
            raise ConfigError(
                "direction adam needs the moments of an optimizer; train a warm-up first, or use direction sgd"
            )
        missing = next((p.name for p in self.parameters if p.name not in self.moments.scalars), None)
        if missing:
            raise ConfigError(
                f"no Adam moments for the trainable parameter {missing}; they were taken from another model"
            )
        if spec.adam_variant not in directions:  # one object for all targets: `Sketches` computes it once a block
            moments = self.moments.to(self.device)
            directions[spec.adam_variant] = partial(adam_direction, moments, spec.adam_variant)
        return Target(directions[spec.adam_variant], projector)

    @cached_property
    def _head(self) -> Head | None:
        """The head if it can be run apart from the model, which is tried once; asked for while features are taken."""

        def run(tokens: list[int]) -> Any:
            batch = self._collate([{"input_ids": tokens, "labels": tokens}])
            with torch.no_grad(), self.autocast():
                return self.model(**self._inputs(batch, [LossSpec()]), use_cache=False, return_dict=True)

        return find_head(self.model, run)

    def _apart(self, sketches: Sketches | None) -> Head | None:
        """Return the head if this pass can do without it: its own gradient, if asked for, is of all tokens at once."""
        head = self._head
        if head is None or (sketches and not set(head.module.modules()).isdisjoint(sketches.modules)):
            return None
        return head

    def _inputs(self, batch: Batch, specs: Sequence[FeatureSpec]) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if "position_ids" in self._accepts:  # per row, so that a trained position embedding sees rows apart
            inputs["position_ids"] = batch.position_ids
        if any(isinstance(spec, EmbeddingSpec) for spec in specs):
            inputs["output_hidden_states"] = True
        if all(isinstance(spec, EmbeddingSpec) for spec in specs) and "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = 1  # where the head is not run apart: nobody reads them
        return inputs

    def _run(
        self, batch: Batch, specs: Sequence[FeatureSpec], sketches: Sketches | None, longest: int, counts: bool
    ) -> list[FeatureValues]:
        tokens = (batch.targets >= 0).sum(dim=1)
        status = torch.where(tokens > 0, Status.OK, Status.NO_LABELS).to(torch.uint8)
        results: dict[int, FeatureValues] = {}
        with torch.set_grad_enabled(sketches is not None):
            if sketches:
                sketches.start(len(batch.input_ids), self.device)
            head = self._apart(sketches)
            with self.autocast(), nullcontext() if head is None else head.apart() as given:
                output = self.model(**self._inputs(batch, specs), use_cache=False, return_dict=True)
            for i, spec in enumerate(specs):
                if isinstance(spec, EmbeddingSpec):
                    states = output.hidden_states
                    _require_layer(spec, len(states))
                    vectors = pool(states[spec.layer].detach(), batch.attention_mask.bool(), spec)
                    results[i] = _vectors(vectors, torch.zeros_like(status))  # OK: an embedding needs no labels
            if len(results) < len(specs):
                if head is None or given is None:
                    losses = token_losses(output.logits, batch.targets)
                else:
                    losses = head.losses(given[0], batch.targets)
                sums = losses.sum(dim=1, dtype=torch.float64)
                del output
                finite = sums.isfinite()
                status[~finite & (tokens > 0)] = Status.NONFINITE
                usable = status == Status.OK
                if counts:
                    self.measured += float(sums.detach()[usable].sum()), int(tokens[usable].sum())
            if sketches:
                # One backward pass for all rows: no row acts on another's loss, so what reaches a row's activations is
                # its own. The mean is a row's, not the batch's, or values would depend on which rows come together.
                sketched = iter(sketches.finish(torch.where(usable, sums / tokens.clamp(min=1), 0.0).sum()))
        for i, spec in enumerate(specs):
            if isinstance(spec, LossSpec):
                results[i] = _losses(sums.detach(), tokens, status)
            elif isinstance(spec, TokenLossSpec):
                results[i] = replace(_losses(sums.detach(), tokens, status), vectors=_by_token(losses, status, longest))
            elif isinstance(spec, GradientSpec):
                results[i] = _vectors(next(sketched), status)
                if spec.direction == "adam":
                    assert sketches is not None
                    norm = sketches.squares.sqrt().float().cpu().numpy()
                    results[i].scalars["gradient_norm"] = np.where(results[i].status == Status.OK, norm, np.float32(0))
        return [results[i] for i in range(len(specs))]


def _require_layer(spec: EmbeddingSpec, count: int) -> None:
    if not -count <= spec.layer < count:
        of = spec.embedding_model_name_or_path or "the model"
        raise ConfigError(f"layer: found {spec.layer}; {of} has hidden states 0 to {count - 1}, or -1 for the last one")


def _losses(sums: Tensor, tokens: Tensor, status: Tensor) -> FeatureValues:
    good = status == Status.OK
    scalars = {"loss_sum": torch.where(good, sums, 0.0).cpu().numpy(), "tokens": (tokens * good).int().cpu().numpy()}
    return FeatureValues(status.cpu().numpy(), scalars, None)


def _by_token(losses: Tensor, status: Tensor, width: int) -> np.ndarray:
    """Return token losses (B, width) float32, zeros behind a row's end and in a row that is not usable."""
    good = torch.where((status == Status.OK)[:, None], losses.detach().float(), 0.0)
    return nn.functional.pad(good, (0, width - good.shape[1])).cpu().numpy()


def _vectors(vectors: Tensor, status: Tensor) -> FeatureValues:
    vectors = vectors.float()
    norm = torch.linalg.vector_norm(vectors, dim=1)
    status = torch.where((status == Status.OK) & ~norm.isfinite(), Status.NONFINITE, status)
    bad = status != Status.OK
    scalars = {"norm": norm.masked_fill(bad, 0.0).cpu().numpy()}
    return FeatureValues(status.cpu().numpy(), scalars, vectors.masked_fill(bad[:, None], 0.0).cpu().numpy())


def _empty(part: FeatureValues, count: int) -> FeatureValues:
    scalars = {name: np.zeros(count, dtype=column.dtype) for name, column in part.scalars.items()}
    vectors = None if part.vectors is None else np.zeros((count, part.vectors.shape[1]), dtype=np.float32)
    return FeatureValues(np.zeros(count, dtype=np.uint8), scalars, vectors)


def _place(part: FeatureValues, rows: list[int], whole: FeatureValues) -> None:
    """Copy a batch's values to their rows; a dummy batch has none."""
    if not rows:
        return
    whole.status[rows] = part.status
    for name, column in part.scalars.items():
        whole.scalars[name][rows] = column
    if whole.vectors is not None:
        whole.vectors[rows] = part.vectors
