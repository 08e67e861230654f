"""A reward model: a transformer whose head gives one number for a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from dataflex.components.params import Parameters
from dataflex.errors import ConfigError
from dataflex.folders import folder_digest
from dataflex.rewards.base import Reward


class RewardModel(Reward):
    """The raw logit of a sequence-classification model. It has no fixed zero, so use an estimator with a baseline.

    The model reads the conversation in its own chat template; without one, prompt and response as a pair of texts. A
    conversation that is longer than the model can read cannot be scored.
    """

    class Params(Parameters):
        """Parameters of `reward_model`."""

        path: str = Field(description="folder of the model and its tokenizer")
        batch_size: int = Field(8, ge=1, description="conversations at a time")
        device: str | None = Field(None, description="where it runs; default: a GPU if there is one")

    def __init__(self, params: Params):
        self.params = params
        self._folder = Path(params.path).expanduser()
        if not (self._folder / "config.json").is_file():
            raise ConfigError(
                f"reward_model.path: found no model in {self._folder}; expected a folder with config.json"
            )

    def prepare(self) -> None:
        """Load the model before any response is written.

        Raises:
            ConfigError: the folder holds another kind of model.
        """
        self._loaded  # noqa: B018  (it is kept)

    def score(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `dataflex.rewards.base.Reward`."""
        import torch

        model, tokenizer, device = self._loaded
        encoded = [self._encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        # The longest first: rows of like length need little padding, and too large a batch fails at once.
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
        order = [i for i in order if len(encoded[i]["input_ids"]) <= limit]
        # Without a padding token such a model cannot tell where a text ends, so each is read alone.
        size = self.params.batch_size if tokenizer.pad_token_id is not None else 1
        out: list[float | None] = [None] * len(encoded)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = [encoded[i] for i in rows]
            inputs = tokenizer.pad(batch, return_tensors="pt") if size > 1 else _alone(batch[0])
            with torch.inference_mode():
                logits = model(**{k: v.to(device) for k, v in inputs.items()}).logits
            for row, value in zip(rows, logits[:, 0].float().tolist(), strict=True):
                out[row] = value
        return out

    def identity(self) -> dict[str, Any]:
        """See `dataflex.rewards.base.Reward`; what the folder is called does not matter."""
        return {"type": "reward_model", "version": 1, "files": folder_digest(self._folder)}

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model, info = AutoModelForSequenceClassification.from_pretrained(self._folder, output_loading_info=True)
        missing = sorted(info["missing_keys"])  # of a language model the head: Transformers would draw it at random
        if missing or model.config.num_labels != 1:
            found = f"weights without {', '.join(missing[:3])}" if missing else f"{model.config.num_labels} labels"
            raise ConfigError(
                f"reward_model.path: found {found} in {self._folder}; expected a sequence-classification model with "
                "one label, whose head was trained"
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(self._folder, padding_side="right")
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        device = torch.device(self.params.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return model.to(device).eval(), tokenizer, device

    def _encode(self, prompt: str, response: str) -> dict[str, list[int]]:
        tokenizer = self._loaded[1]
        if tokenizer.chat_template is None:
            return dict(tokenizer(prompt, response))
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        return dict(tokenizer(text, add_special_tokens=False))  # the template has written them already


def _alone(encoded: dict[str, list[int]]) -> dict[str, Any]:
    import torch

    return {name: torch.tensor([values]) for name, values in encoded.items()}
