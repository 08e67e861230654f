"""Python files that belong together: a file, and the files that it imports relatively."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def with_relative_imports(files: Iterable[Path]) -> list[Path]:
    """Return files together with the files that they import relatively, directly or through others, sorted.

    A file that is not there, or is no Python, imports nothing: whoever runs it will say so.
    """
    found: set[Path] = set()
    waiting = [file for file in files if file.is_file()]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += [other for other in _imported(file) if other.is_file()]
    return sorted(found)


def named_classes(config: Any) -> Iterator[tuple[str, str]]:
    """Yield (repository, module) of every class that the `auto_map` of a model's configuration names, at any depth.

    The repository is empty for a module that lies in the model's own folder.
    """
    parts = config.values() if isinstance(config, Mapping) else config if isinstance(config, list) else ()
    for part in parts:
        yield from named_classes(part)
    named = config.get("auto_map") if isinstance(config, Mapping) else None
    for reference in _texts(named):
        repository, _, path = reference.rpartition("--")
        yield repository, path.rpartition(".")[0]


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value: an `auto_map` gives a tokenizer two classes, one of which may be None."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def _imported(file: Path) -> Iterator[Path]:
    """Yield where the modules may lie that a file imports relatively."""
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[min(node.level, len(file.parents)) - 1]
            parts = (node.module or "").split(".") if node.module else []
            for name in [[], *([alias.name] for alias in node.names)]:  # a name may itself be a module
                path = folder.joinpath(*parts, *name)
                yield from (path.with_suffix(".py"), path / "__init__.py")
            yield from (folder.joinpath(*parts[:depth]) / "__init__.py" for depth in range(len(parts)))
