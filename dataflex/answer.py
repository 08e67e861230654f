"""How a verb that looks at something answers: lines for people, or JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def answer(value: Any, as_json: bool, lines: Sequence[str]) -> None:
    """Print plain data as JSON, or the lines that say the same."""
    # Where the terminal cannot write every letter, JSON escapes them, and people see a sign in their place.
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    is_plain = not encoding.startswith("utf")
    text = json.dumps(value, indent=2, default=str, ensure_ascii=is_plain) if as_json else "\n".join(lines)
    print(text.encode(encoding, "replace").decode(encoding) if is_plain else text)
