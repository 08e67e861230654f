"""The code of a user's component by content: where its class and its name are written, and what these import."""

from __future__ import annotations

import ast
import importlib.util
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Set
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from dataflex.components.registry import PLUGIN, fetched_by, found_by, plugin_name
from dataflex.errors import ConfigError
from dataflex.fingerprint import digest, file_digest

_IMPORTERS = ("import_plugin", "import_module", "__import__")


def code_digest(of: Any) -> str | None:
    """Name the code of a class, or of a module, by content; None for DataFlex's own, and for None.

    Read are the file that it stands in, the module that it was found by (`dataflex.components.registry.found_by`),
    which may have made or changed it, and from there on every file that is imported: all of their own packages, and
    beside them whatever lies outside the standard library and site-packages. Imports are found in the text, at any
    place in it; nothing is run. What is imported under a name that is computed, and what the code reads as data, is
    not seen, but for what a plugin fetched by `import_plugin`.

    Raises:
        ConfigError: it stands in no file.
    """
    if of is None:
        return None
    name = of.__name__ if isinstance(of, ModuleType) else of.__module__
    if _top(name) != "dataflex" and _place(name) is None:
        raise ConfigError(
            f"{getattr(of, '__qualname__', of)}: found no file that it is written in, so a change of it could not be "
            "noticed. Put it into a .py file, and name that under dataflex.plugins"
        )
    return modules_digest([name, *(found_by(of) if isinstance(of, type) else ())])


def modules_digest(names: Iterable[str]) -> str | None:
    """Name the code of imported modules, as `code_digest` does; None if all are DataFlex's own, or stand in no file."""
    roots = {name: path for name in names if _top(name) != "dataflex" and (path := _place(name)) is not None}
    own = {_top(name) for name in roots}
    found: dict[Path, str] = {}
    waiting = [*roots.items()]
    while waiting:
        name, path = waiting.pop(0)
        if path in found:
            continue
        # A plugin's module is called after its folder, and code is the same wherever it lies.
        found[path] = path.name if name in roots or name.startswith(PLUGIN) else name
        waiting += _imported(name, path, own)
        waiting += [(each, file) for each in fetched_by(name) if (file := _place(each)) is not None]
    files: dict[str, list[str]] = {}
    for path, called in found.items():
        files.setdefault(called, []).append(file_digest(path))
    return digest({called: sums[0] if len(sums) == 1 else sums for called, sums in files.items()}) if files else None


def _place(name: str) -> Path | None:
    """Return the file of an imported module; None where it has none, or is not imported."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file).resolve() if file is not None and Path(file).is_file() else None


def _imported(name: str, path: Path, own: Set[str]) -> Iterator[tuple[str, Path]]:
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
        elif (text := _called_with(node)) is not None and text.endswith(".py"):
            file = Path(text).expanduser().resolve()
            if file.is_file():
                yield plugin_name(str(file)), file
            continue
        elif text is not None and not text.startswith("."):
            names = [text]
        else:
            continue
        parts = [each.split(".") for each in names if each]
        for each in dict.fromkeys(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)):
            found = _file(each)
            if found is not None and _is_users(each, found, own):
                yield each, found.resolve()


def _called_with(node: ast.AST) -> str | None:
    """Return the text that a call of a function that imports is given, None for any other node."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    called = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
    given = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
    return given if called in _IMPORTERS and isinstance(given, str) else None


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


def _is_users(name: str, file: Path, own: Set[str]) -> bool:
    if _top(name) in sys.stdlib_module_names or _top(name) == "dataflex":
        return False
    return _top(name) in own or not any(file.is_relative_to(folder) for folder in _installed())


def _installed() -> list[str]:
    places = ("stdlib", "platstdlib", "purelib", "platlib")
    return [*(sysconfig.get_path(place) for place in places), *site.getsitepackages(), site.getusersitepackages()]


def _top(name: str) -> str:
    return name.partition(".")[0]
