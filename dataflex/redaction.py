"""Values that people should not see: tokens, passwords, and what addresses carry of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(not shown)"
_SECRET = re.compile(
    r"(tokens?|keys?|secrets?|passw\w*|passphrase|credentials?|auth|authori[sz]ation|authentication|bearer|cookies?|"
    r"headers?|webhook_url)$",
    re.IGNORECASE,
)
_COUNTED = re.compile(
    r"(^|[._])(max|min|num|new|total|test|special|pad|eos|bos|unk)\w*_tokens?$|tokens_|row_key$|^tokens$"
)
"""Names of numbers and of words of a vocabulary, which are no secrets."""
_USER = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|signature|sig|password|credential)[\w.-]*=)[^&\s#]+", re.IGNORECASE
)


def is_secret(path: str) -> bool:
    """Say whether a key's value may be something that people should not see."""
    return _SECRET.search(path) is not None and _COUNTED.search(path) is None


def redacted(value: Any, name: str = "") -> Any:
    """Return plain data in which a word stands for whatever may be a secret, also in addresses."""
    if is_secret(name) and value not in (None, "", [], {}) and not isinstance(value, bool):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: redacted(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each, name) for each in value]
    return without_secrets(value) if isinstance(value, str) else value


def without_secrets(text: str) -> str:
    """Return a text whose addresses have neither user and password, nor secrets among their parameters."""
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))
