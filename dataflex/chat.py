"""A client of servers that speak OpenAI's chat interface: vLLM, SGLang, llama.cpp, OpenAI's own and others."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dataflex.errors import ConfigError, UnavailableError

_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
"""HTTP statuses after which the same request may succeed."""


@dataclass(frozen=True)
class ChatServer:
    """A server and how patiently it is asked.

    Attributes:
        base_url: its address, up to but not including /chat/completions.
        api_key_env: environment variable that holds the key; None sends none.
        timeout: seconds for one request.
        retries: further attempts, after 1, 2, 4, ... seconds, 60 at most.
        workers: requests at a time.
    """

    base_url: str
    api_key_env: str | None = None
    timeout: float = 120.0
    retries: int = 5
    workers: int = 8

    def complete(self, payloads: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
        """Return (text, finish reason) of each request, in order.

        Raises:
            ConfigError: the server refuses a request, or the variable with the key is not set.
            UnavailableError: it does not answer, after all attempts.
        """
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env)
            if not key:
                raise ConfigError(f"api_key_env: found no {self.api_key_env} in the environment; expected the key of "
                                  f"{self.base_url}")  # fmt: skip
            headers["Authorization"] = f"Bearer {key}"
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._complete, dict(payload), headers) for payload in payloads]
            try:
                return [future.result() for future in futures]
            except BaseException:  # Ctrl-C too: else the pool would first send every request that is waiting
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _complete(self, payload: dict[str, Any], headers: dict[str, str]) -> tuple[str, str | None]:
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(payload).encode(), headers)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(60.0, 2.0 ** (attempt - 1)))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    choice = json.load(answer)["choices"][0]
                return choice["message"]["content"] or "", choice.get("finish_reason")
            except urllib.error.HTTPError as error:  # before OSError, of which it is one
                said = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code not in _PASSING:
                    raise ConfigError(f"{url} refused a request for {payload.get('model')}: {said}") from error
            except (OSError, http.client.HTTPException) as error:
                said = str(error) or type(error).__name__
            except (ValueError, LookupError, TypeError) as error:
                said = f"found an answer without choices[0].message.content ({error!r})"
        raise UnavailableError(
            f"{url} gave no answer in {self.retries + 1} attempts, the last: {said}. What it has answered before is "
            "kept; when it is up again, the same command goes on from there"
        )
