"""What a run file under examples/ says of itself, as text: its head, and the keys that it gives LLaMA-Factory."""

from __future__ import annotations

import re
from pathlib import Path

MODELINE = "# yaml-language-server: $schema="
EXAMPLES = Path(__file__).parents[1] / "examples"
HEADER = "### LLaMA-Factory: from the repository's root; `python -m examples.quickstart.build` makes model and data"
REAL = "### LLaMA-Factory: from the repository's root; `python -m examples.real.model` makes the model, data/ is here"


def head(path: Path) -> list[str]:
    """Return the comment lines that a file begins with, up to the blank one, but for the editor's."""
    lines = path.read_text("utf-8").partition("\n\n")[0].splitlines()
    return [line.removeprefix("# ") for line in lines if not line.startswith(MODELINE)]


def given(path: Path) -> dict[str, str]:
    """Return LLaMA-Factory's keys in their order, each value as it is written."""
    header = REAL if path.parent.name == "real" else HEADER
    _, header, rest = path.read_text("utf-8").partition(f"\n{header}\n")
    part, ours, _ = rest.partition("\n### DataFlex")
    assert header
    assert ours
    lines = [re.fullmatch(r"(\w+): (.+?)(?: +#.*)?", line) for line in part.strip().splitlines()]
    assert all(lines), path
    return {line[1]: line[2] for line in lines if line}


def assert_there(path: Path, output: Path) -> None:
    """A run left every file that the head of its run file says to look at."""
    named = re.findall(r"[\w*/-]+\.(?:jsonl?|parquet)", head(path)[2])
    assert named
    assert not [name for name in named if not list(output.glob(name))]
