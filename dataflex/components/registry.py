"""Named components: built-in ones loaded on demand; users' own by decorator, entry point or `module:Class`."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dataflex.errors import ConfigError, DataflexError, Interrupted
from dataflex.faults import USERS

T = TypeVar("T")
C = TypeVar("C", bound=type)
_IMPORTING: list[str] = []
"""Modules of the plugins that are being imported, the innermost last: what is registered meanwhile is theirs."""
_IN_USE: set[str] = set()
"""Modules of the plugins of the run file that was read last."""
_FOUND_BY: dict[type, str | None] = {}
"""Class -> the module that the name it was loaded by last leads to; None where nothing but the class tells."""
_FETCHED: dict[str, list[str]] = {}
"""Module of a plugin -> those that it fetched by `import_plugin` while it was imported."""

PLUGIN = "dataflex_plugin_"
"""What the name of a plugin's module begins with if it was imported from a file."""


@dataclass(frozen=True)
class _Registered:
    """A class that was registered by decorator; `plugin` is the one whose import did it, None for any other import."""

    cls: type
    plugin: str | None

    @property
    def place(self) -> str:
        return f"{self.cls.__module__}:{self.cls.__qualname__}"

    @property
    def source(self) -> tuple[str, str]:
        """Where the class is written: a file is one plugin, under whatever name it was imported."""
        module = sys.modules.get(self.cls.__module__)
        return str(getattr(module, "__file__", None) or self.cls.__module__), self.cls.__qualname__


class Registry(Generic[T]):
    """Classes of one kind by name; a class is imported when it is asked for, and no other with it.

    One rule says which class a name stands for: `module:Class` and `file.py:Class` that one; any other name the class
    that a plugin registers or an entry point announces under it, if there is one; else the built-in one.

    Args:
        kind: what is registered, for error texts.
        group: entry-point group in which other distributions announce theirs.
        builtins: name -> "module:Class".
        verbs: methods of which a class of this kind has at least one.
        adapter: "module:function" that makes any class of this kind one with all that its base declares; empty: they
            stay as they are.
    """

    def __init__(
        self, kind: str, group: str, builtins: Mapping[str, str], verbs: Sequence[str] = (), adapter: str = ""
    ):
        self.kind = kind
        self.group = group
        self.builtins = dict(builtins)
        self.verbs = tuple(verbs)
        self._adapter = adapter
        self._registered: dict[str, list[_Registered]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Return a class decorator that registers under `name`, a built-in's or not.

        Raises:
            ConfigError: another class of the same plugin has the name; both places are named.
        """
        if not isinstance(name, str) or not name or ":" in name or name.endswith(".py"):
            raise ConfigError(
                f"register_{self.kind}: found {name!r}; expected a name in parentheses, without a colon: "
                f'@register_{self.kind}("mine")'
            )

        def add(cls: C) -> C:
            USERS.add(cls.__module__)
            ours = _Registered(cls, _IMPORTING[-1] if _IMPORTING else None)
            others = self._registered.setdefault(name, [])
            for i, other in enumerate(others):
                if other.source == ours.source:  # a module imported twice registers the same class again
                    others[i] = ours
                    return cls
                if other.plugin == ours.plugin:
                    raise self._ambiguous(name, [other.place, ours.place])
            others.append(ours)
            return cls

        return add

    def places(self) -> dict[str, str]:
        """Return every name known now, entry points included, with its "module:Class"; nothing is imported."""
        names = [*self._registered, *(name for name, _ in self._entry_points())]
        users = {name: next(iter(self._users(name, _IN_USE)), "") for name in names}
        return self.builtins | {name: place for name, place in users.items() if place}

    def load(self, name: str, plugins: Iterable[str] = ()) -> type[T]:
        """Return the class that `name` stands for, with these plugins beside those of the run file.

        Raises:
            ConfigError: there is none, or several, it is of another kind, or its module cannot be imported.
        """
        seen = _IN_USE | {import_plugin(plugin).__name__ for plugin in plugins}
        if ":" in name:
            return self._import(name, name)
        users = self._users(name, seen)
        if len(users) > 1:
            raise self._ambiguous(name, users)
        for place, (cls, plugin) in users.items():
            return self._checked(name, place, cls, plugin) if cls is not None else self._import(name, place)
        if name not in self.builtins:
            names = sorted(self.places())
            raise ConfigError(
                f"found {name!r}; expected a {self.kind} ({', '.join(names)}) or module:Class"
                f"{did_you_mean(name, names) or '.'} A class of your own is named as file.py:Class, or needs "
                "its module or file in dataflex.plugins"
            )
        return self._import(name, self.builtins[name])

    def override(self, name: str, cls: type) -> str | None:
        """Return a line that says which built-in class `cls` takes the place of under this name, or None."""
        place = f"{cls.__module__}:{cls.__qualname__}"
        if self.builtins.get(name, place) == place:
            return None
        file = getattr(sys.modules.get(cls.__module__), "__file__", None) or "?"
        return f"{self.kind} {name!r} is {place} ({file}), in place of the built-in {self.builtins[name]}"

    def _users(self, name: str, plugins: set[str]) -> dict[str, tuple[type | None, str | None]]:
        """Return the places of what is registered or announced under a name.

        With each, the class where it is imported, and the plugin that registered it.
        """
        found: dict[str, tuple[type | None, str | None]] = {
            each.place: (each.cls, each.plugin)
            for each in self._registered.get(name, ())
            if each.plugin is None or each.plugin in plugins or each.cls.__module__ in plugins
        }
        for announced, place in self._entry_points():
            if announced == name:
                found.setdefault(place, (None, None))
        return found

    def _ambiguous(self, name: str, places: Iterable[str]) -> ConfigError:
        return ConfigError(
            f"{self.kind} {name!r}: found in {' and in '.join(places)}; expected one; rename one of them, or name the "
            "class itself, as module:Class"
        )

    def _import(self, name: str, place: str) -> type[T]:
        module_name, _, path = place.rpartition(":")
        if not module_name or not path:
            raise ConfigError(f"found {name!r}; expected a {self.kind} by its name, as module:Class or file.py:Class")
        module = found = import_plugin(module_name)
        for part in path.split("."):
            if not hasattr(found, part):
                near = did_you_mean(part, [key for key in vars(found) if not key.startswith("_")])
                raise ConfigError(f"{self.kind} {name!r}: found no {path} in {module_name}; expected a class{near}")
            found = getattr(found, part)
        return self._checked(name, place, found, module.__name__)

    def _checked(self, name: str, place: str, found: Any, module: str | None) -> type[T]:
        if not isinstance(found, type):
            raise ConfigError(f"{self.kind} {name!r}: found {type(found).__name__} at {place}; expected a class")
        if self.verbs and not any(callable(getattr(found, verb, None)) for verb in self.verbs):
            raise ConfigError(
                f"{self.kind} {name!r}: found a class without {' or '.join(self.verbs)} at {place}; expected a "
                f"{self.kind}, which has such a method"
            )
        module_name, _, function = self._adapter.partition(":")
        adapted: type[T] = getattr(importlib.import_module(module_name), function)(found) if function else found
        if missing := sorted(
            {*getattr(found, "__abstractmethods__", ()), *getattr(adapted, "__abstractmethods__", ())}
        ):
            raise ConfigError(f"{self.kind} {name!r}: {place} does not define {', '.join(missing)}; expected it to")
        _FOUND_BY[found] = _FOUND_BY[adapted] = module
        return adapted

    def _entry_points(self) -> list[tuple[str, str]]:
        from importlib.metadata import entry_points  # 40 ms, which `--help` is spared

        return [(point.name, point.value.replace(" ", "")) for point in entry_points(group=self.group)]


def use_plugins(names: Iterable[str]) -> None:
    """Import the plugins of a run file; what those of an earlier one registered does not count any more.

    Raises:
        ConfigError: one cannot be imported.
    """
    modules = {import_plugin(name).__name__ for name in names}
    _IN_USE.clear()
    _IN_USE.update(modules)


def import_plugin(name: str) -> Any:
    """Import a module by dotted name, or a file by a path ending in .py; a file is imported once.

    Raises:
        ConfigError: there is no such module or file, or running it raises an error.
    """
    if name.endswith(".py"):
        module = _import_file(name)
    elif all(part.isidentifier() for part in name.split(".")):
        with _importing(name, name):
            module = importlib.import_module(name)
    else:
        raise ConfigError(f"found {name!r}; expected the dotted name of a module, or a path to a .py file")
    if _IMPORTING and module.__name__ not in _FETCHED.setdefault(_IMPORTING[-1], []):
        _FETCHED[_IMPORTING[-1]].append(module.__name__)
    return module


def found_by(cls: type) -> list[str]:
    """Return the module that led to a class when it was last loaded by name: the one named, or that registers it."""
    module = _FOUND_BY.get(cls)
    return [] if module is None else [module]


def fetched_by(module: str) -> list[str]:
    """Return the modules that a plugin fetched by `import_plugin` while it was imported."""
    return list(_FETCHED.get(module, ()))


def plugin_name(path: str) -> str:
    """Return what the module of a plugin is called that lies in this file, whose real path is given."""
    return f"{PLUGIN}{Path(path).stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _import_file(name: str) -> Any:
    path = os.path.expanduser(name)
    if not os.path.isfile(path):
        path = os.path.abspath(path)
        raise ConfigError(f"found no file {path}; expected a Python file (named in dataflex.plugins or component_name)")
    path = os.path.realpath(path)
    module_name = plugin_name(path)
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with _importing(name, module_name):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


@contextlib.contextmanager
def _importing(name: str, module_name: str) -> Iterator[None]:
    """Count what is registered meanwhile as this plugin's, and say in a line what its own code raises."""
    _IMPORTING.append(module_name)
    try:
        yield
        USERS.add(module_name)
        ours, theirs = logging.getLogger("dataflex"), logging.getLogger(module_name)
        if ours.level and not theirs.level:
            theirs.setLevel(ours.level)  # heard as far as we are
    except (DataflexError, Interrupted, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # whatever code may raise: a script without a guard ends with SystemExit
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, ImportError | SyntaxError) else f" ({last.filename}, line {last.lineno})"
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"importing {name} failed: {kind}{error}{where}; expected an importable module or a path to a .py file"
        ) from error
    finally:
        _IMPORTING.pop()


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


SELECTORS: Registry[Any] = Registry(
    "selector",
    "dataflex.selectors",
    {
        "static": "dataflex.selectors.static:Static",
        "random": "dataflex.selectors.random:Random",
        "less": "dataflex.selectors.less:Less",
        "nice": "dataflex.selectors.nice:Nice",
        "loss": "dataflex.selectors.loss:ByLoss",
        "delta_loss": "dataflex.selectors.loss:ByDeltaLoss",
        "ifd": "dataflex.selectors.loss:Ifd",
        "embedding": "dataflex.selectors.embedding:Embedding",
        "rds_plus": "dataflex.selectors.embedding:RdsPlus",
        "near": "dataflex.selectors.near:Near",
        "tsds": "dataflex.selectors.tsds:Tsds",
        "cluster_less": "dataflex.selectors.cluster_less:ClusterLess",
        "influence_distillation": "dataflex.selectors.propagated:InfluenceDistillation",
        "composed": "dataflex.selectors.composed:Composed",
    },
    ("select",),
    "dataflex.selectors.classic:adapted_selector",
)

MIXERS: Registry[Any] = Registry(
    "mixer",
    "dataflex.mixers",
    {
        "static": "dataflex.mixers.static:Static",
        "uniform": "dataflex.mixers.static:Uniform",
        "stratified": "dataflex.mixers.static:Stratified",
        "temperature": "dataflex.mixers.static:Temperature",
        "unimax": "dataflex.mixers.static:Unimax",
        "random": "dataflex.mixers.random:Random",
        "odm": "dataflex.mixers.odm:Odm",
        "ado": "dataflex.mixers.ado:Ado",
        "doremi": "dataflex.mixers.doremi:Doremi",
        "dynamic_moe": "dataflex.mixers.dynamic_moe:DynamicMoe",
    },
    ("mix",),
    "dataflex.mixers.classic:adapted_mixer",
)

WEIGHTERS: Registry[Any] = Registry(
    "weighter",
    "dataflex.weighters",
    {
        "loss": "dataflex.weighters.loss:ByLoss",
        "adapt": "dataflex.weighters.adapt:Adapt",
        "feature": "dataflex.weighters.feature:ByFeature",
    },
    ("weights", "get_weighted_loss", "training_step"),
    "dataflex.weighters.classic:adapted_weighter",
)

register_selector = SELECTORS.register
register_mixer = MIXERS.register
register_weighter = WEIGHTERS.register
