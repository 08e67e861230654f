"""Names that LLaMA-Factory and Transformers accept for a key, read from the installed sources as its type is."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path

_ENUMS = {
    "transformers": ("training_args.py", "trainer_utils.py", "debug_utils.py"),
    "llamafactory": ("extras/constants.py",),
}
_ENUM = re.compile(r"^class (?P<name>\w+)\((?:str, )?\w*Enum\):\n(?:[ \t].*\n|\n)+", re.MULTILINE)
_MAPPING = r"^(?P<name>{}) = {{\n(?:[ \t].*\n)+}}"


def source(package: str, name: str) -> str:
    """Return the text of a file of an installed package; empty if it is not there."""
    spec = importlib.util.find_spec(package)
    path = Path(str(spec.origin)).parent / name if spec is not None else None
    return path.read_text("utf-8") if path is not None and path.is_file() else ""


@functools.cache
def enumerations() -> dict[str, tuple[str, ...]]:
    """Return the members' values of every Enum of texts, by the name of its class.

    The classes are cut out first: parsing the whole of the files would take ten times as long as all else.
    """
    found = {}
    for package, files in _ENUMS.items():
        for name in files:
            for match in _ENUM.finditer(source(package, name)):
                (node,) = ast.parse(match.group()).body
                assert isinstance(node, ast.ClassDef)
                values = [item.value for item in node.body if isinstance(item, ast.Assign)]
                texts = [value.value for value in values if isinstance(value, ast.Constant)]
                found[match["name"]] = tuple(str(text) for text in texts)
    return found


@functools.cache
def trackers() -> tuple[str, ...]:
    """Return the experiment trackers that `report_to` may name; none if the sources are laid out otherwise."""
    return _keys("integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK")


@functools.cache
def log_levels() -> tuple[str, ...]:
    """Return the levels that `log_level` may name; none if the sources are laid out otherwise."""
    levels = _keys("utils/logging.py", "log_levels")
    return (*levels, "passive") if levels else ()


def _keys(file: str, name: str) -> tuple[str, ...]:
    """Return the keys of a mapping that a file of Transformers writes out."""
    match = re.search(_MAPPING.format(name), source("transformers", file), re.MULTILINE)
    if match is None:
        return ()
    (node,) = ast.parse(match.group()).body
    assert isinstance(node, ast.Assign)
    assert isinstance(node.value, ast.Dict)
    return tuple(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
