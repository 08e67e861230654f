"""Named components: built-in ones loaded on demand; users' own by decorator, entry point or `module:Class`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from dataflex.errors import ConfigError

T = TypeVar("T")
C = TypeVar("C", bound=type)
log = logging.getLogger(__name__)


class Registry(Generic[T]):
    """Classes of one kind by name; a class is imported when it is asked for, and no other with it.

    Args:
        kind: what is registered, for error texts.
        group: entry-point group in which other distributions announce theirs.
        builtins: name -> "module:Class"; no entry point can take these names.
    """

    def __init__(self, kind: str, group: str, builtins: Mapping[str, str]):
        self.kind = kind
        self.group = group
        self._places = dict(builtins)
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Return a class decorator that registers under `name`.

        Raises:
            ConfigError: another class has the name; both places are named.
        """

        def add(cls: C) -> C:
            place = f"{cls.__module__}:{cls.__qualname__}"
            known = self._places.get(name, place)
            if known != place:
                raise ConfigError(
                    f"{self.kind} {name!r}: found in {place} and in {known}; expected one; rename one of them"
                )
            self._places[name], self._classes[name] = place, cls
            return cls

        return add

    def places(self) -> dict[str, str]:
        """Return every name known now, entry points included, with its "module:Class"; nothing is imported."""
        found = dict(self._places)
        for name, place in self._entry_points():
            if found.setdefault(name, place) != place:
                log.warning(
                    "%s %r: entry point %s is ignored, the name is taken by %s", self.kind, name, place, found[name]
                )
        return found

    def load(self, name: str, plugins: Iterable[str] = ()) -> type[T]:
        """Return the class called `name`; `plugins` are imported if it is not known without them.

        Raises:
            ConfigError: there is none, or its module cannot be imported.
        """
        if name not in self._places and ":" not in name:
            for plugin in plugins:
                import_plugin(plugin)
        if name in self._classes:
            return self._classes[name]
        place = name if ":" in name else self._places.get(name) or self.places().get(name)
        if place is None:
            names = sorted(self.places())
            raise ConfigError(
                f"found {name!r}; expected a {self.kind} ({', '.join(names)}) or module:Class"
                f"{did_you_mean(name, names)}. A class of your own needs its module in dataflex.plugins"
            )
        self._classes[name] = self._import(name, place)
        return self._classes[name]

    def _import(self, name: str, place: str) -> type[T]:
        module_name, _, path = place.rpartition(":")
        found: Any = import_plugin(module_name)
        for part in path.split("."):
            if not hasattr(found, part):
                near = did_you_mean(part, [key for key in vars(found) if not key.startswith("_")])
                raise ConfigError(f"{self.kind} {name!r}: found no {path} in {module_name}; expected a class{near}")
            found = getattr(found, part)
        if not isinstance(found, type):
            raise ConfigError(f"{self.kind} {name!r}: found {type(found).__name__} at {place}; expected a class")
        return found

    def _entry_points(self) -> list[tuple[str, str]]:
        from importlib.metadata import entry_points  # 40 ms, needed only for unknown names and listings

        return [(point.name, point.value.replace(" ", "")) for point in entry_points(group=self.group)]


def import_plugin(name: str) -> Any:
    """Import a module by dotted name, or a file by a path ending in .py; a file is imported once.

    Raises:
        ConfigError: there is no such module or file, it is no Python, or one that it needs is missing.
    """
    try:
        if not name.endswith(".py"):
            if not all(part.isidentifier() for part in name.split(".")):
                raise ConfigError(f"found {name!r}; expected the dotted name of a module, or a path to a .py file")
            return importlib.import_module(name)
        path = Path(os.path.expanduser(name)).resolve()
        module_name = f"dataflex_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        if module_name in sys.modules:
            return sys.modules[module_name]
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ConfigError(
                f"found no file {path}; expected a Python file (named in dataflex.plugins or component_name)"
            )
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
        return module
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"importing {name} failed: {error}; expected an importable module or a path to a .py file"
        ) from error


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
)

WEIGHTERS: Registry[Any] = Registry(
    "weighter",
    "dataflex.weighters",
    {
        "loss": "dataflex.weighters.loss:ByLoss",
        "adapt": "dataflex.weighters.adapt:Adapt",
        "feature": "dataflex.weighters.feature:ByFeature",
    },
)

register_selector = SELECTORS.register
register_mixer = MIXERS.register
register_weighter = WEIGHTERS.register
