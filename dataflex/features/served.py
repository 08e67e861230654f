"""Responses written by another model, behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dataflex.chat import ChatServer
from dataflex.features.generation import Job, Responses, uniform
from dataflex.features.spec import PolicyGradientSpec

_ASKED = 4  # requests for each worker, whose answers are handed on together


class ServerGenerator:
    """Another model, on an OpenAI-compatible server: off-policy.

    The server is sent the prompt's text and puts it into its own template. Its answer is turned into tokens by the
    training tokenizer, which need not be those that it wrote, and ended by `stop` where the server says that it
    stopped by itself. The seed is sent; whether the server honours it is its own affair.

    Args:
        spec: says where the server is.
        tokenizer: the training tokenizer.
        stop: token that ends a response, or None where there is none.
    """

    def __init__(self, spec: PolicyGradientSpec, tokenizer: Any, stop: int | None) -> None:
        g = spec.generator
        assert g.base_url is not None
        self._server = ChatServer(g.base_url, g.api_key_env, g.timeout, g.retries, g.workers)
        self._tokenizer, self._stop = tokenizer, stop

    def __call__(self, jobs: Sequence[Job], spec: PolicyGradientSpec) -> Responses:
        """Yield the responses in groups.

        Raises:
            UnavailableError: the server does not answer; the groups before were handed on.
        """
        size = _ASKED * self._server.workers
        for start in range(0, len(jobs), size):
            some = jobs[start : start + size]
            answers = self._server.complete([self._payload(job, spec) for job in some])
            yield [(start + i, self._ids(*answer, spec.max_new_tokens)) for i, answer in enumerate(answers)]

    def _payload(self, job: Job, spec: PolicyGradientSpec) -> dict[str, Any]:
        payload = {
            "model": spec.generator.model,
            "messages": [{"role": "user", "content": job.text}],
            "max_tokens": spec.max_new_tokens,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            "seed": int(uniform(spec.seed, job.key, job.sample, 0) * (1 << 31)),
        }
        return payload | ({"top_k": spec.top_k} if spec.top_k else {})

    def _ids(self, text: str, reason: str | None, limit: int) -> np.ndarray:
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if reason == "stop" and self._stop is not None:
            ids.append(self._stop)
        return np.array(ids[:limit], dtype=np.int64)
