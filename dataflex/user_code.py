"""The code of a user's component by content: the file of its class, and the files of the user's that it imports."""

from __future__ import annotations

import ast
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from dataflex.errors import ConfigError
from dataflex.fingerprint import digest, file_digest


def code_digest(of: Any) -> str | None:
    """Name the code of a class, or of a module, by content; None for DataFlex's own, and for None.

    Read are the file that it stands in and, from there on, every file that is imported: all of its own package, and
    beside it whatever lies outside the standard library and site-packages. Imports are found in the text, at any
    place in it; nothing is run. What is imported under a name that is computed, and what the code reads as data, is not
    seen.

    Raises:
        ConfigError: it stands in no file.
    """
    module = of if isinstance(of, ModuleType) or of is None else sys.modules.get(of.__module__)
    if of is None or (module is not None and _top(module.__name__) == "dataflex"):
        return None
    file = getattr(module, "__file__", None)
    if module is None or file is None or not Path(file).is_file():
        raise ConfigError(
            f"{getattr(of, '__qualname__', of)}: found no file that it is written in, so a change of it could not be "
            "noticed. Put it into a .py file, and name that under dataflex.plugins"
        )
    found: dict[str, Path] = {}
    waiting = [(module.__name__, Path(file))]
    while waiting:
        name, path = waiting.pop()
        if name not in found:
            found[name] = path
            waiting += _imported(name, path, _top(module.__name__))
    # A plugin's module is called after its folder, and code is the same wherever it lies.
    files = {Path(file).name if name == module.__name__ else name: file_digest(path) for name, path in found.items()}
    return digest(files)


def _imported(name: str, path: Path, own: str) -> Iterator[tuple[str, Path]]:
    """List the user's modules that a file imports, with the packages that they lie in."""
    try:
        tree = ast.parse(path.read_bytes()) if path.suffix == ".py" else None
    except (SyntaxError, ValueError):  # imported only when something asks for it, and then refused
        tree = None
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [source, *(f"{source}.{alias.name}" for alias in node.names)]  # a name may be that of a module
        else:
            continue
        parts = [each.split(".") for each in names if each]
        for each in dict.fromkeys(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)):
            file = _file(each)
            if file is not None and _is_users(each, file, own):
                yield each, file


def _file(name: str) -> Path | None:
    """Return a module's file without importing anything; None where there is no such module, or it has no file."""
    if name in sys.modules:
        found = getattr(sys.modules[name], "__file__", None)
    else:
        top, *rest = name.split(".")
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
        for end in range(1, len(rest) + 1) if spec is not None else ():
            spec = PathFinder.find_spec(".".join([top, *rest[:end]]), spec.submodule_search_locations if spec else None)
            if spec is None:
                return None
        found = spec.origin if spec is not None else None
    return Path(found) if found is not None and Path(found).is_file() else None


def _is_users(name: str, file: Path, own: str) -> bool:
    if _top(name) in sys.stdlib_module_names or _top(name) == "dataflex":
        return False
    return _top(name) == own or not any(file.is_relative_to(folder) for folder in _installed())


def _installed() -> list[str]:
    places = ("stdlib", "platstdlib", "purelib", "platlib")
    return [*(sysconfig.get_path(place) for place in places), *site.getsitepackages(), site.getusersitepackages()]


def _top(name: str) -> str:
    return name.partition(".")[0]
