"""JSON objects that runs and comparisons have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dataflex.errors import CorruptionError


def json_object(path: Path) -> dict[str, Any]:
    """Read a file.

    Raises:
        CorruptionError: it holds no JSON object.
    """
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CorruptionError(f"{path}: not readable ({error}); remove it and what is beside it") from error
