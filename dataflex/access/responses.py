"""Responses and what they are worth, kept so that another estimator or projection writes and scores nothing anew.

Both are ordinary stores of the root, so they are committed piece by piece, checked by digest, verified, repaired and
collected like features. A response is a row of kind `response`: its token ids stand in the vector, which float32 holds
exactly below 2^24. A reward is a row of kind `reward` under the texts that it is of, whichever model wrote them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dataflex import stop
from dataflex.errors import DataflexError
from dataflex.features.generation import Job, Responses
from dataflex.fingerprint import keys_digest, text_key
from dataflex.rewards import Reward
from dataflex.rows import Status, keys_from
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values

_EXACT = 1 << 24  # float32 holds every whole number below
_AT_A_TIME = 128  # texts that are scored and committed together


class ResponseStore:
    """Token ids of responses.

    Args:
        root: where the store is.
        recipe: everything that determines a response beside its key.
        limit: tokens of a response, at most.
    """

    def __init__(self, root: StoreRoot, recipe: Mapping[str, Any], limit: int):
        self._limit = limit
        self._store = root.open("response", recipe, Layout({"length": "int32"}, limit, "float32"))

    def get(self, jobs: Sequence[Job], generate: Callable[[Sequence[Job]], Responses]) -> list[np.ndarray]:
        """Return the token ids of every job, (t,) int64 each; those that are missing are generated and kept first.

        What is returned is read from the store: the first answer to a job is the one that counts.
        """
        keys = keys_of([job.key + job.sample.to_bytes(8, "little") for job in jobs])
        unique, first = np.unique(keys, return_index=True)
        missing = first[~self._store.contains(unique)]
        for group in generate([jobs[i] for i in missing]) if len(missing) else ():
            self._append(keys[missing], group)
        found = self._store.read(keys)
        assert found.vectors is not None
        ids = found.vectors.astype(np.int64)
        return [row[:length] for row, length in zip(ids, found.scalars["length"], strict=True)]

    def _append(self, keys: np.ndarray, group: list[tuple[int, np.ndarray]]) -> None:
        order = np.argsort(keys[[job for job, _ in group]])
        jobs = np.array([group[i][0] for i in order])
        vectors = np.full((len(group), self._limit), -1.0, dtype=np.float32)
        for row, i in enumerate(order):
            ids = group[i][1]
            if ids.max(initial=0) >= _EXACT:
                raise DataflexError(
                    f"a response holds the token {ids.max()}; a store of responses keeps those below 2^24"
                )
            vectors[row, : len(ids)] = ids
        lengths = np.array([len(group[i][1]) for i in order], dtype=np.int32)
        status = np.full(len(group), Status.OK, dtype=np.uint8)
        self._store.append(keys_digest(keys[jobs]), Values(keys[jobs], status, {"length": lengths}, vectors))


class RewardStore:
    """Rewards of texts under one reward.

    Args:
        root: where the store is.
        recipe: names the reward.
        reward: scores what is missing.
    """

    def __init__(self, root: StoreRoot, recipe: Mapping[str, Any], reward: Reward):
        self._reward = reward
        self._store = root.open("reward", recipe, Layout({"reward": "float64", "scored": "bool"}))

    def get(self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """Return the reward of each response, (N,) float64, NaN where it could not be scored.

        Raises:
            DataflexError: the reward gave NaN, infinity, or another number of values.
        """
        texts = list(zip(prompts, responses, references, strict=True))
        keys = keys_of([text_key(p, r) + text_key(reference, "") for p, r, reference in texts])
        unique, first = np.unique(keys, return_index=True)
        missing = first[~self._store.contains(unique)]
        for start in range(0, len(missing), _AT_A_TIME):
            some = missing[start : start + _AT_A_TIME]
            columns = [[texts[i][column] for i in some] for column in range(3)]
            scores = self._reward.score(*columns)
            if stop.is_asked():  # whoever signals all processes may have ended the ones that judge: no reward of 0
                stop.leave()
            self._append(keys[some], scores)
        found = self._store.read(keys).scalars
        return np.where(found["scored"], found["reward"], np.nan)

    def _append(self, keys: np.ndarray, scores: Sequence[float | None]) -> None:
        values = np.array([0.0 if score is None else float(score) for score in scores])
        if len(scores) != len(keys) or not np.isfinite(values).all():
            raise DataflexError(
                f"reward {self._reward.identity().get('type')}: found {len(scores)} values for {len(keys)} responses, "
                f"{int((~np.isfinite(values)).sum())} of them not finite; expected a finite number or None for each"
            )
        scored = np.array([score is not None for score in scores])
        status = np.full(len(keys), Status.OK, dtype=np.uint8)
        self._store.append(keys_digest(keys), Values(keys, status, {"reward": values, "scored": scored}))


def keys_of(parts: Sequence[bytes]) -> np.ndarray:
    """Return the 16-byte digest of each part, (N,) of `KEY_DTYPE`."""
    hashed = (hashlib.blake2b(part, digest_size=16, person=b"dataflex-resp-v1").digest() for part in parts)
    return keys_from(hashed)
