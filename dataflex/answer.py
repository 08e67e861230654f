"""How a verb that looks at something answers: lines for people, or JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def answer(value: Any, as_json: bool, lines: Sequence[str]) -> None:
    """Print plain data as JSON, or the lines that say the same."""
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False) if as_json else "\n".join(lines))
