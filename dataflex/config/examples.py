"""The example run files, which come with the package: in a wheel as its data, in a clone as `examples/` beside it."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import dataflex
from dataflex.components.registry import did_you_mean
from dataflex.config.outputs import refuse_unwritable
from dataflex.errors import ConfigError, DataflexError

SCHEMA = "run.schema.json"
_OF_METHODS = ("selectors", "mixers", "weighters")
"""Folders with a run file for each method."""
_MODELINE = "# yaml-language-server: $schema="


@dataclass(frozen=True)
class Example:
    """A run file.

    Attributes:
        name: its path within the examples, without the suffix, as in `selectors/less`.
        path: where it lies.
        says: what it shows, in a sentence.
        train_type: as it is written.
        method: its `component_name`, empty where there is none.
    """

    name: str
    path: Path
    says: str
    train_type: str
    method: str


def folder() -> Path:
    """Return where the examples lie.

    Raises:
        DataflexError: nowhere, because the installation is not whole.
    """
    package = Path(str(dataflex.__file__)).parent
    for found in (package / "examples", package.parent / "examples"):
        if (found / SCHEMA).is_file():
            return found
    raise DataflexError(
        f"found no examples in {package} or beside it; expected them in a wheel or a clone of DataFlex; install it anew"
    )


@functools.cache
def examples() -> tuple[Example, ...]:
    """Return all examples, sorted by name."""
    root = folder()
    return tuple(_read(path, root) for path in sorted(root.rglob("*.yaml")))


def example(name: str) -> Example:
    """Return one by its name, or by the last part of it where only one has that: of a method's and a demo's the former.

    Raises:
        ConfigError: there is none, or several.
    """
    wanted, known = name.removesuffix(".yaml"), {each.name: each for each in examples()}
    if wanted in known:
        return known[wanted]
    ending = [full for full in known if full.endswith(f"/{wanted}")]
    of_methods = [full for full in ending if full.partition("/")[0] in _OF_METHODS]
    for found in (ending, of_methods):
        if len(found) == 1:
            return known[found[0]]
    if ending:
        raise ConfigError(f"found several examples called {name!r}; expected one of {', '.join(ending)}")
    raise ConfigError(
        f"found no example {name!r}; expected one of those that `dataflex ls examples` lists{did_you_mean(name, known)}"
    )


def of_method(train_type: str, method: str) -> Example | None:
    """Return the example of a method, None if there is none; of several the one that is called as it is."""
    found = [each for each in examples() if (each.train_type, each.method) == (train_type, method)]
    return min(found, key=lambda each: (each.name.rpartition("/")[2] != method, each.name != f"selectors/{method}"),
               default=None)  # fmt: skip


def modeline() -> str:
    """Return the comment by which an editor finds the schema that came with the package, from any folder."""
    return _MODELINE + (folder().resolve() / SCHEMA).as_uri()


def copied(found: Example, target: Path | None) -> Path:
    """Write an example's text, its schema found from there, into a new file; return the file.

    Args:
        found: which.
        target: a file, or a folder that exists; default: the example's own file name, in the working folder.

    Raises:
        ConfigError: the file is there already, or cannot be written.
    """
    file = found.path.name if target is None else target / found.path.name if target.is_dir() else target
    text = found.path.read_text("utf-8")
    lines = text.splitlines(keepends=True)
    assert lines[0].startswith(_MODELINE)
    return written("".join([f"{modeline()}\n", *lines[1:]]), Path(file))


def written(text: str, file: Path) -> Path:
    """Write a new file.

    Raises:
        ConfigError: it is there already, or cannot be written.
    """
    if os.path.lexists(file):
        raise ConfigError(f"found {file}; expected a name that is free, as nothing is written over; name another file")
    refuse_unwritable("file to write", file)
    with open(file, "x", encoding="utf-8") as new:
        new.write(text)
    return file


def _read(path: Path, root: Path) -> Example:
    text = path.read_text("utf-8")
    lines = text.splitlines()
    keys = dict(re.findall(r"^(train_type|component_name): (\S+)", text, re.MULTILINE))
    name = path.relative_to(root).with_suffix("").as_posix()
    return Example(name, path, lines[1].removeprefix("# "), keys["train_type"], keys.get("component_name", ""))
