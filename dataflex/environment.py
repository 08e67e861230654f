"""Switches in the environment, read as LLaMA-Factory reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping


def is_on(name: str, default: str = "0", env: Mapping[str, str] | None = None) -> bool:
    """Say whether a variable is `true`, `y` or `1`, in any case of letters; `env` stands for the process's own."""
    return (os.environ if env is None else env).get(name, default).lower() in ("true", "y", "1")


QUIET = {"LLAMAFACTORY_VERBOSITY": "WARNING", "TRANSFORMERS_VERBOSITY": "warning", "TQDM_DELAY": "5"}
"""Keeps the libraries below us quiet, if it is set before they are imported and nobody has set it otherwise."""
