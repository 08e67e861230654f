"""Embeddings by another model than the run's: it reads text, with a tokenizer of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataflex.errors import ConfigError
from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import FeatureSpec, FeatureValues
from dataflex.rows import Status, Text


class TextEncoder:
    """Embeds the whole text of a row: system prompt, tools, prompt and response, those that there are, one a line.

    A folder with `modules.json` is a sentence-transformers model, which pools as it was trained to; `pooling` and
    `layer` of the specification act on a causal LM alone.

    Args:
        folder: the model's folder.
        device: where it runs.
        token_budget: tokens of a batch, padding included.

    Raises:
        ConfigError: sentence-transformers is needed and not installed.
    """

    def __init__(self, folder: Path, device: torch.device, token_budget: int):
        self._sentences: Any = None
        if (folder / "modules.json").is_file():
            self._sentences = _sentence_transformer(folder, device)
            return
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        model.to(device)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self._tokenizer = tokenizer
        self._limit = min(int(limit), int(tokenizer.model_max_length))
        self._engine = FeatureEngine(model, pad_token_id=tokenizer.pad_token_id or 0, token_budget=token_budget)

    def compute(
        self,
        texts: Sequence[Text],
        specs: Sequence[FeatureSpec],
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[FeatureValues]:
        """Return the embeddings of texts, one result for each specification.

        A text without a token gets a zero vector and is not usable. `on_batch` is told the rows and tokens of each
        batch that is done.
        """
        joined = [text.whole() for text in texts]
        if self._sentences is not None:
            with _heard(self._sentences, on_batch):
                found = np.asarray(self._sentences.encode(joined, show_progress_bar=False), np.float32)
            return [_values(found) for _ in specs]
        encoded = self._tokenizer(joined, truncation=True, max_length=self._limit)["input_ids"]
        empty = np.array([not ids for ids in encoded])
        # The engine refuses rows without a token, so those get one, and their values are taken away below.
        examples = [{"input_ids": ids or [0], "labels": [-100] * max(1, len(ids))} for ids in encoded]
        out = self._engine.compute(examples, specs, on_batch=on_batch)
        for values in out:
            assert values.vectors is not None
            values.status[empty] = Status.NO_LABELS
            values.vectors[empty] = values.scalars["norm"][empty, None] = 0.0
        return out

    def require_layers(self, specs: Sequence[FeatureSpec]) -> None:
        """Check that the model has the layers asked for; sentence-transformers models use none, so they are not asked.

        Raises:
            ConfigError: there is no such layer.
        """
        if self._sentences is None:
            self._engine.require_layers(specs)

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        model = self._sentences if self._sentences is not None else self._engine.model
        return sum(parameter.numel() for parameter in model.parameters())

    @property
    def width(self) -> int:
        """Numbers per embedding."""
        if self._sentences is not None:
            return int(self._sentences.get_embedding_dimension())
        config: Any = self._engine.model.config
        return int(config.hidden_size)


@contextlib.contextmanager
def _heard(model: Any, on_batch: Callable[[int, int], None] | None) -> Iterator[None]:
    """Tell of each batch that passes through a sentence-transformers model, which has no word for it."""
    if on_batch is None:
        yield
        return

    def passed(module: Any, given: Any, out: Any) -> None:
        # What goes in depends on the first module; what comes out always has one embedding for each text.
        mask = given[0].get("attention_mask", given[0].get("input_ids"))
        on_batch(len(out["sentence_embedding"]), 0 if mask is None else int((mask != 0).sum()))

    hook = model.register_forward_hook(passed)
    try:
        yield
    finally:
        hook.remove()


def _sentence_transformer(folder: Path, device: torch.device) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"embedding_model_name_or_path: {folder} needs a package that is not installed: "
            "pip install sentence-transformers"
        ) from error
    return SentenceTransformer(str(folder), device=str(device))


def _values(vectors: np.ndarray) -> FeatureValues:
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    vectors = np.where(finite[:, None], vectors, 0.0).astype(np.float32)
    status = np.where(finite, Status.OK, Status.NONFINITE).astype(np.uint8)
    return FeatureValues(status, {"norm": np.linalg.norm(vectors, axis=1).astype(np.float32)}, vectors)
