"""Instruction sources that are read from the Python standard library on this machine, without importing it."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from examples.quickstart.tasks import Task

PACKAGES = (
    "",
    "asyncio",
    "collections",
    "concurrent/futures",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "urllib",
)
"""Folders of the library that are read; the empty name is its top level."""

MAX_CHARACTERS = 320
"""Longest docstring paragraph or function body taken: longer ones do not fit the model's window with their question."""


@cache
def _functions() -> tuple[tuple[str, str, ast.FunctionDef], ...]:
    """Return (module, source text of the function, its syntax tree) for each function, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).glob("*.py")):
            module = ".".join((*package.split("/"), path.stem)).strip(".").removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            lines = text.split("\n")  # as Python counts them: a form feed ends no line
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                    own = lines[node.lineno - 1 : node.end_lineno]
                    if any(line[: node.col_offset].strip() for line in own):
                        continue  # a text in it stands to the left of it, so it cannot be moved there
                    found.append((module, "\n".join(line[node.col_offset :] for line in own), node))
    return tuple(found)


def docstrings() -> Iterator[Task]:
    """Yield what each documented function does, in the words of its docstring's first paragraph."""
    for module, _, node in _functions():
        paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if 20 <= len(paragraph) <= MAX_CHARACTERS:
            yield f"What does the function {node.name} of the Python module {module} do?", "", paragraph


def code() -> Iterator[Task]:
    """Yield short undocumented functions, cut after their first lines."""
    for module, body, node in _functions():
        lines = body.splitlines()
        if 4 <= len(lines) <= 14 and len(body) <= MAX_CHARACTERS and ast.get_docstring(node) is None:
            head = len(lines) // 2
            yield (
                f"Complete this Python function from {module}.",
                "\n".join(lines[:head]),
                "\n".join(lines[head:]),
            )
