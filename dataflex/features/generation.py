"""Responses that the live model writes to prompts, each a function of seed, prompt and number alone.

B responses of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dataflex.errors import DataflexError
from dataflex.features.batching import plan_batches
from dataflex.features.spec import PolicyGradientSpec

Responses = Iterator[list[tuple[int, np.ndarray]]]
"""Groups of (position of the job, token ids (t,) int64), each group as soon as it is written."""

_MORE = 4  # times the token budget: no activations are kept, only keys and values


@dataclass(frozen=True)
class Job:
    """One response to be written.

    Attributes:
        prompt: token ids of the prompt, (t,) int64, not empty.
        text: the prompt as people wrote it, for servers, which have a template of their own.
        key: identifies the prompt; a part of each token's random number.
        sample: number of the response among those to this prompt.
    """

    prompt: np.ndarray
    text: str
    key: bytes
    sample: int


class Generator(Protocol):
    """Writes responses."""

    def __call__(self, jobs: Sequence[Job], spec: PolicyGradientSpec) -> Responses:
        """Yield every job's response once, in any order."""
        ...


def uniform(seed: int, key: bytes, sample: int, position: int) -> float:
    """Return a number in [0, 1) that is a function of its arguments alone, on every machine; 52 random bits."""
    h = hashlib.blake2b(digest_size=8, person=b"dataflex-draw-v1")
    h.update(b"".join(n.to_bytes(8, "little") for n in (seed, sample, position)) + key)
    return (int.from_bytes(h.digest(), "little") >> 12) / (1 << 52)  # a float holds 53 bits; more could round up to 1


def draw(logits: Tensor, at: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Return the token at which the cumulative probability passes `at`, (B,) int64.

    Args:
        logits: (B, V).
        at: (B,) float64, uniform in [0, 1).
        temperature: divides the logits.
        top_p: the likeliest tokens are kept until their probability reaches this, of those that `top_k` leaves.
        top_k: likeliest tokens kept, with those that tie; 0 keeps all.

    Raises:
        DataflexError: a row has NaN or infinite logits.
    """
    logits = logits.double() / temperature
    if 0 < top_k < logits.shape[1]:
        kth = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = logits.softmax(dim=1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        outside = ordered.cumsum(dim=1) - ordered >= top_p
        probabilities = probabilities.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), 0.0)
    passed = probabilities.cumsum(dim=1)
    if not bool(passed[:, -1].isfinite().all()):
        raise DataflexError(
            "the model gave NaN or infinite logits while it wrote a response; check the learning rate and the dtype"
        )
    # Scaled by the last sum, which is below 1 where tokens were taken out. `right` passes over tokens of probability 0.
    return torch.searchsorted(passed, (at * passed[:, -1])[:, None], right=True).squeeze(1)


class ModelGenerator:
    """The live model in eval mode, by Transformers' `generate`; nothing of it is changed.

    Each token is drawn with a number of its own, which batch, order and number of processes have no part in. The model
    itself rounds a little differently in another batch, so a token differs where that number falls within rounding of
    the border between two tokens. A response is at most as long as the context leaves room for. Generation defaults
    that come with a model, such as a repetition penalty, do not act.

    Args:
        model: the bare module, whose weights are whole.
        stop: tokens that end a response, and belong to it.
        pad_token_id: fills up rows.
        token_budget: tokens of a training batch; here a batch has four times as many.
        autocast: makes the context of the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stop: Sequence[int],
        pad_token_id: int,
        token_budget: int = 8192,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        get_base: Any = getattr(model, "get_base_model", lambda: model)
        self._model, self._base = model, get_base()
        self._stop, self._pad, self._budget, self._autocast = list(stop), pad_token_id, _MORE * token_budget, autocast
        self._context = getattr(self._base.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

    def __call__(self, jobs: Sequence[Job], spec: PolicyGradientSpec) -> Responses:
        """Yield the responses of one batch after the other; an empty one where the prompt fills the context."""
        room = np.array([min(spec.max_new_tokens, self._context - len(job.prompt)) for job in jobs])
        none = np.flatnonzero(room <= 0)
        if len(none):
            yield [(int(i), np.empty(0, np.int64)) for i in none]
        for limit in np.unique(room[room > 0]).tolist():  # `generate` has one limit for all rows of a batch
            at = np.flatnonzero(room == limit)
            for batch in plan_batches([len(jobs[i].prompt) + limit for i in at.tolist()], self._budget):
                rows = at[batch].tolist()
                yield list(zip(rows, self._batch([jobs[i] for i in rows], spec, limit), strict=True))

    def _batch(self, jobs: Sequence[Job], spec: PolicyGradientSpec, limit: int) -> list[np.ndarray]:
        width = max(len(job.prompt) for job in jobs)
        ids = np.full((len(jobs), width), self._pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, job in enumerate(jobs):
            # Padded on the left: `generate` goes on behind the last column of every row.
            ids[i, width - len(job.prompt) :], mask[i, width - len(job.prompt) :] = job.prompt, 1
        device = next(self._model.parameters()).device
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,  # the choice is made by `_Draws`
            eos_token_id=self._stop or None,
            pad_token_id=self._pad,
            use_cache=True,
        )
        with self._plain(), torch.no_grad(), self._autocast():
            out = self._base.generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Draws(jobs, spec, width)]),
            )
        return [self._ended(row) for row in out[:, width:].cpu().numpy()]

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        """Return a response up to its first stop token."""
        stops = np.flatnonzero(np.isin(ids, self._stop))
        return ids[: stops[0] + 1] if len(stops) else ids

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Put the model into eval mode, and its generation defaults aside, until the block ends."""
        modes = [(module, module.training) for module in self._model.modules()]
        defaults = self._base.generation_config
        self._base.generation_config = GenerationConfig()
        self._model.eval()
        try:
            yield
        finally:
            self._base.generation_config = defaults
            for module, mode in modes:
                module.training = mode


class _Draws(LogitsProcessor):
    """Leaves of each row's logits only the token drawn, which greedy decoding then takes."""

    def __init__(self, jobs: Sequence[Job], spec: PolicyGradientSpec, width: int):
        self._jobs, self._spec, self._width = jobs, spec, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `transformers.LogitsProcessor`."""
        spec, position = self._spec, input_ids.shape[1] - self._width
        numbers = [uniform(spec.seed, job.key, job.sample, position) for job in self._jobs]
        at = torch.tensor(numbers, dtype=torch.float64, device=scores.device)
        drawn = draw(scores, at, spec.temperature, spec.top_p, spec.top_k)
        return torch.full_like(scores, -math.inf).scatter_(1, drawn[:, None], 0.0)
