"""Policy gradients of target rows: responses of the model, their rewards, and the gradient that both make."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from dataflex import display, distributed
from dataflex.access.responses import ResponseStore, RewardStore, keys_of
from dataflex.access.sources import ModelSource, Wanted
from dataflex.config.keys import DataflexKeys
from dataflex.errors import ConfigError
from dataflex.explanation import explained
from dataflex.features.generation import Generator, Job, ModelGenerator, Responses
from dataflex.features.policy import policy_gradients, response_weights
from dataflex.features.served import ServerGenerator
from dataflex.features.spec import (
    FeatureSpec,
    FeatureValues,
    LossSpec,
    PolicyGradientSpec,
    RewardSpec,
)
from dataflex.fingerprint import IGNORE_INDEX, digest, row_key, text_key
from dataflex.live.state import ModelState
from dataflex.rewards import Reward, build_reward, reward_identity
from dataflex.rows import Rows, Status
from dataflex.stores.root import StoreRoot, folder_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What a target row asks and what it expects.

    Attributes:
        prompt: token ids before the first supervised one; empty where the row has none that is supervised.
        text: the prompt as text.
        reference: the answer as text.
    """

    prompt: np.ndarray
    text: str
    reference: str


class PolicySource:
    """The model in the trainer's hands as the one that answers, a reward as the one that judges.

    Args:
        model: computes the gradients.
        state: names the model's state.
        root: where responses and rewards are kept.
        options: the run file's `dataflex` mapping.
        note: takes the name of every store before it is opened.

    Raises:
        ConfigError: ZeRO-3 or FSDP2 deals the model's weights out.
    """

    is_collective = False

    def __init__(
        self, model: ModelSource, state: ModelState, root: StoreRoot, options: DataflexKeys, note: Callable[[str], None]
    ):
        if not state.sharding.has_whole_weights:
            raise ConfigError(
                f"policy_gradient: a model that {state.sharding.name} shards cannot write responses here; use ZeRO-2 "
                "or DDP"
            )
        self._model, self._state, self._root, self._options, self._note = model, state, root, options, note
        self._tokenizer = state.trainer.processing_class
        self._rewards: dict[str, Reward] = {}
        self._keys: WeakKeyDictionary[Rows, np.ndarray] = WeakKeyDictionary()

    def keys(self, rows: Rows) -> np.ndarray:
        """Return the keys of tokens and texts: rewards read the texts, which the tokens alone do not tell."""
        if rows not in self._keys:
            targets = (self._target(rows, row) for row in range(len(rows)))
            self._keys[rows] = keys_of(
                [key.tobytes() + text_key(t.text, t.reference) for key, t in zip(rows.keys, targets, strict=True)]
            )
        return self._keys[rows]

    def recipe(self, spec: FeatureSpec) -> dict[str, Any]:
        """Return the feature with its rewards by content, the model's state, tokenizer and stop tokens."""
        assert isinstance(spec, PolicyGradientSpec)
        recipe = self._state.recipe(spec.gradient)
        rewards = [{"weight": each.weight, **reward_identity(self._reward(each))} for each in spec.reward]
        self._note_stores(spec)
        return {**recipe, "feature": {**spec.recipe(), "reward": rewards}, **self._words}

    def _note_stores(self, spec: PolicyGradientSpec) -> None:
        self._note(folder_name("response", self._response_recipe(spec)))
        for each in spec.reward:
            self._note(folder_name("reward", self._reward_recipe(each)))

    def width(self, spec: FeatureSpec) -> int:
        """Return D."""
        assert isinstance(spec, PolicyGradientSpec)
        return self._model.width(spec.gradient)

    def require(self, wanted: Sequence[Wanted]) -> None:
        """Look whether every row has a prompt, and whether what judges can be loaded.

        Raises:
            ConfigError: a row has none, or a reward cannot be had.
        """
        for rows in {id(rows): rows for _, rows in wanted}.values():
            for row in range(len(rows)):
                self._target(rows, row)
        for each in [each for spec, _ in wanted for each in spec.rewards]:
            reward = self._reward(each)
            with distributed.together(), explained(f"reward {each.type}", refusal=ConfigError):
                reward.prepare()

    def compute(
        self, rows: Rows, at: np.ndarray, specs: Sequence[FeatureSpec], min_batches: int
    ) -> list[FeatureValues]:
        """Write, score and differentiate what is missing for rows `at`.

        Raises:
            UnavailableError: a server does not answer; what it has answered is kept.
        """
        targets = [self._target(rows, int(row)) for row in at]
        usable = [row for row, target in enumerate(targets) if len(target.prompt)]
        asked = [targets[row] for row in usable]
        return [
            _spread(self._values(asked, spec), usable, len(targets))
            for spec in specs
            if isinstance(spec, PolicyGradientSpec)
        ]

    def rewards(self, rows: Rows, at: np.ndarray, spec: PolicyGradientSpec) -> np.ndarray:
        """Return what the responses to rows `at` are worth, (n,) float64: the mean of each row's; NaN of one unscored.

        Nothing is differentiated. Written and scored is what no store has.

        Raises:
            UnavailableError: as `compute`.
        """
        self._note_stores(spec)
        targets = [self._target(rows, int(row)) for row in at]
        usable = [row for row, target in enumerate(targets) if len(target.prompt)]
        asked = [targets[row] for row in usable]
        found = np.full(len(targets), np.nan)
        if asked:
            texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in self._responses(asked, spec)]
            scores = self._scores([t for t in asked for _ in range(spec.mc_samples)], texts, spec)
            found[usable] = scores.reshape(len(asked), -1).mean(axis=1)
        return found

    def _values(self, targets: Sequence[Prompt], spec: PolicyGradientSpec) -> FeatureValues:
        count = spec.mc_samples
        responses = self._responses(targets, spec)
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
        rewards = self._scores([t for t in targets for _ in range(count)], texts, spec).reshape(-1, count)
        reference = np.full(len(targets), np.nan)
        if spec.estimator == "hard_rejection":
            reference = self._scores(targets, [target.reference for target in targets], spec)
        vectors, status = policy_gradients(
            self._model.engine,
            [target.prompt for target in targets],
            [responses[start : start + count] for start in range(0, len(responses), count)],
            [response_weights(spec.estimator, r, ref, spec.k) for r, ref in zip(rewards, reference, strict=True)],
            spec.projection,
            spec.normalisation,
        )
        self._report(spec, rewards, status)
        scored = (~np.isnan(rewards)).sum(axis=1)
        scalars = {
            "norm": np.linalg.norm(vectors, axis=1).astype(np.float32),
            "reward": np.nansum(rewards, axis=1) / np.maximum(1, scored),
            "scored": scored.astype(np.int32),
        }
        return FeatureValues(status, scalars, vectors)

    def _responses(self, targets: Sequence[Prompt], spec: PolicyGradientSpec) -> list[np.ndarray]:
        """Return the responses to every target, `mc_samples` to each, in order."""
        jobs = []
        for target in targets:
            key = row_key(target.prompt, np.full(len(target.prompt), IGNORE_INDEX))
            if spec.generator.type != "model":
                key += text_key(target.text, "")  # a server reads the text
            jobs += [Job(target.prompt, target.text, key, sample) for sample in range(spec.mc_samples)]
        generate = self._generator(spec)
        kept = ResponseStore(self._root, self._response_recipe(spec), spec.max_new_tokens)
        return kept.get(jobs, lambda missing: _shown(generate(missing, spec), len(missing)))

    def _generator(self, spec: PolicyGradientSpec) -> Generator:
        if spec.generator.type != "model":
            return ServerGenerator(spec, self._tokenizer, self._tokenizer.eos_token_id)
        trainer = self._state.trainer
        return ModelGenerator(
            trainer.model,
            stop=self._words["stop"],
            pad_token_id=self._tokenizer.pad_token_id or 0,
            token_budget=self._options.token_budget,
            autocast=trainer.accelerator.autocast,
        )

    def _scores(self, targets: Sequence[Prompt], texts: Sequence[str], spec: PolicyGradientSpec) -> np.ndarray:
        """Return the weighted sum of the rewards of each text, NaN where one could not score it."""
        total = np.zeros(len(texts))
        for each in spec.reward:
            kept = RewardStore(self._root, self._reward_recipe(each), self._reward(each))
            columns = [target.text for target in targets], texts, [target.reference for target in targets]
            total += each.weight * kept.get(*columns)
        return total

    def _reward(self, spec: RewardSpec) -> Reward:
        named = digest({"type": spec.type, "params": spec.params()})
        if named not in self._rewards:
            self._rewards[named] = build_reward(spec.type, spec.params(), self._options.plugins)
        return self._rewards[named]

    def _reward_recipe(self, spec: RewardSpec) -> dict[str, Any]:
        return {"feature": {"kind": "reward", **reward_identity(self._reward(spec))}}

    def _response_recipe(self, spec: PolicyGradientSpec) -> dict[str, Any]:
        recipe: dict[str, Any] = {"feature": {"kind": "response", "version": 1, **spec.sampling()}, **self._words}
        if spec.generator.type == "model":
            # As for a loss: an adapter that does not act yet writes what its base writes.
            state = self._state.recipe(LossSpec())
            recipe |= {name: state[name] for name in ("model", "numerics")}
        return recipe

    @cached_property
    def _words(self) -> dict[str, Any]:
        """What the tokens mean, and which of them end a response."""
        own = self._tokenizer.eos_token_id
        flat = [*self._state.end_tokens, *(own if isinstance(own, list) else [] if own is None else [own])]
        return {"tokenizer": digest(_decoding(self._tokenizer)), "stop": sorted(set(flat))}

    def _target(self, rows: Rows, row: int) -> Prompt:
        """Split a row at its first supervised token.

        Of a row with one answer the texts are those of its record; of a conversation whose every answer is supervised
        they are decoded from the tokens, since the record's last answer is not the one that follows the prompt.
        """
        example = rows.examples[row]
        ids, labels = np.asarray(example["input_ids"], np.int64), np.asarray(example["labels"])
        supervised = np.flatnonzero(labels != IGNORE_INDEX)
        if not len(supervised):
            return Prompt(ids[:0], "", "")
        start, count = int(supervised[0]), len(supervised)
        if start == 0:
            raise ConfigError(
                f"policy_gradient: row {row} of the target set begins with a supervised token, so it has no prompt to "
                "respond to; use stage: sft without train_on_prompt"
            )
        if supervised[-1] - start + 1 == count:
            text = rows.text(row)
            return Prompt(ids[:start], text.prompt, text.response)
        ignored = np.flatnonzero(labels[start:] == IGNORE_INDEX)
        answer = ids[start : start + int(ignored[0])]
        prompt, reference = (self._tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], answer))
        return Prompt(ids[:start], prompt, reference)

    def _report(self, spec: PolicyGradientSpec, rewards: np.ndarray, status: np.ndarray) -> None:
        unscored = int(np.isnan(rewards).sum())
        silent = int((status == Status.NO_LABELS).sum())
        mean = float(np.nanmean(rewards)) if unscored < rewards.size else float("nan")
        log.info("policy gradients of %d prompts: mean reward %.4g of %d responses, %d prompts without a signal",
                 len(status), mean, rewards.size, silent)  # fmt: skip
        if unscored:
            names = ", ".join(each.type for each in spec.reward)
            log.warning("%d of %d responses could not be scored by %s; left out", unscored, rewards.size, names)


def _shown(responses: Responses, count: int) -> Responses:
    """Give what is written on, group by group, and show how many of `count` responses there are."""
    with display.showing("responses", count) as task:
        for group in responses:
            yield group
            task.update(task.done + len(group))


def _spread(found: FeatureValues, rows: Sequence[int], count: int) -> FeatureValues:
    """Place values at their rows among `count`; the other rows have no supervised token, so nothing was asked there."""
    assert found.vectors is not None
    status = np.full(count, Status.NO_LABELS, dtype=np.uint8)
    vectors = np.zeros((count, found.vectors.shape[1]), dtype=np.float32)
    scalars = {name: np.zeros(count, column.dtype) for name, column in found.scalars.items()}
    status[rows], vectors[rows] = found.status, found.vectors
    for name, column in found.scalars.items():
        scalars[name][rows] = column
    return FeatureValues(status, scalars, vectors)


def _decoding(tokenizer: Any) -> dict[str, Any]:
    """Return what turns tokens into text: the words, which of them are special, and how they are put together."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "class": type(tokenizer).__name__,
        "words": tokenizer.get_vocab(),
        "special": sorted(tokenizer.all_special_ids),
        "added": {str(i): [token.content, token.special] for i, token in tokenizer.added_tokens_decoder.items()},
        "decoder": None if backend is None else json.loads(backend.to_str())["decoder"],
        "clean_up": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
    }
