"""All that can be said of one method without a run: what it does, takes and asks for, and where more stands."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pydantic import ValidationError

from dataflex.components.adapter import written
from dataflex.components.registry import Registry, did_you_mean, import_plugin
from dataflex.config.examples import of_method
from dataflex.config.methods import KINDS, TRAIN_TYPES, entry_of, table
from dataflex.errors import ConfigError
from dataflex.features.spec import BASE

_PAGES = {"selector": "docs/methods.md", "mixer": "docs/mixing.md", "weighter": "docs/weighting.md"}
_LIVE = "of the model in training"
_STATES = {None: _LIVE, BASE: "of the base model"}
_ROWS = {"train": "training rows", "targets": "targets"}
_STARTERS: dict[str, dict[str, Any]] = {
    "selector.static": {"path": "chosen.parquet"},
    "selector.nice": {"reward": {"type": "exact_match"}},
    "mixer.doremi": {"reference_model_path": "saves/reference"},
    "weighter.feature": {"feature": {"kind": "loss"}},
}
"""Parameters that methods cannot do without, with what a run file may begin with."""


@dataclass(frozen=True)
class Described:
    """All that is known of one method without a run.

    Attributes:
        name: of the method.
        kind: selector, mixer or weighter.
        entry: what `methods` says of it.
        about: the whole of its description.
        features: what it asks for by default, or with its starter, as (feature, rows, state); None where that
            follows from files which its parameters name, or it is a class of the classic interface.
        compares: whether it holds rows against target sets.
        example: name of its example, empty if there is none.
        starter: parameters that it cannot do without, as a run file may begin with them.
    """

    name: str
    kind: str
    entry: dict[str, Any]
    about: str = ""
    features: tuple[tuple[str, str, str], ...] | None = ()
    compares: bool = False
    example: str = ""
    starter: Mapping[str, Any] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """Its name, by which no other method is meant."""
        return self.name if ":" in self.name else f"{self.kind}.{self.name}"

    @property
    def error(self) -> str:
        """Why it cannot be imported here, empty if it can."""
        return str(self.entry.get("error", ""))

    @property
    def description(self) -> str:
        """What it does, in a sentence."""
        return str(self.entry.get("description", ""))

    @property
    def params(self) -> list[dict[str, Any]]:
        """Its parameters."""
        return list(self.entry.get("params", ()))

    @property
    def is_live(self) -> bool:
        """Whether it asks for features of the model in training."""
        return any(state == _LIVE for _, _, state in self.features or ())

    @property
    def documented(self) -> str:
        """The page that has more, in a clone."""
        return _PAGES[self.kind]

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        keys = ("feature", "of", "state")
        features = None if self.features is None else [dict(zip(keys, each, strict=True)) for each in self.features]
        more = {"about": self.about, "features": features, "compares_with_targets": self.compares}
        return self.entry | more | {"example": self.example or None, "documented": self.documented}

    def lines(self) -> list[str]:
        """Return it for people."""
        head, says, *params = table([self.entry])
        about = [f"    {line}".rstrip() for line in self.about.splitlines()]
        features = [f"    {name} of the {of}, {state}" for name, of, state in self.features or ()]
        given = f"with {', '.join(self.starter)} as in a new run file" if self.starter else "by default"
        asks = "not known before a run" if self.features is None else given if features else "none"
        more = [f"dataflex init --method {self.full_name}", f"{self.documented}, in a clone of DataFlex"]
        return [
            head,
            *(about or [says]),
            "",
            *(["parameters", *params] if params else ["parameters: none"]),
            "",
            f"features: {asks}",
            *features,
            *(["target rows: needed (eval_dataset)"] if self.compares else []),
            "see also:",
            *(f"    {line}" for line in ([f"dataflex cp {self.example}"] if self.example else []) + more),
        ]


def described(name: str) -> list[Described]:
    """Return the methods of a name, one of each kind that has it; `KIND.NAME` and `module:Class` name one.

    Raises:
        ConfigError: there is none.
    """
    kind, _, rest = name.partition(".")
    only = next((registry for registry in KINDS if registry.kind == kind), None)
    if only is not None and rest:
        return [_described(only, rest)] if rest in only.places() else _refuse(name)
    if ":" in name:
        return [_described(registry, name) for registry in KINDS if _is_of(registry, name)] or _refuse(name)
    return [_described(registry, name) for registry in KINDS if name in registry.places()] or _refuse(name)


def _refuse(name: str) -> NoReturn:
    known = {method for registry in KINDS for method in registry.places()}
    raise ConfigError(
        f"found no method {name!r}; expected one of those that `dataflex ls` lists, KIND.NAME, or module:Class"
        f"{did_you_mean(name.rpartition('.')[2], sorted(known))}"
    )


def _is_of(registry: Registry[Any], name: str) -> bool:
    """Say whether a class is a method of this kind; it is of none that has no such verb."""
    module, _, path = name.rpartition(":")
    found: Any = import_plugin(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return any(callable(getattr(found, verb, None)) for verb in registry.verbs)


def _described(registry: Registry[Any], name: str) -> Described:
    entry = entry_of(registry, name, registry.places().get(name, name))
    if "error" in entry:
        return Described(name, registry.kind, entry)
    cls = registry.load(name)
    starter = _STARTERS.get(f"{registry.kind}.{name}", {}) if "in_place_of" not in entry else {}
    found = of_method(TRAIN_TYPES[registry.kind], name)
    features, compares = None, bool(cls.needs_targets)
    with contextlib.suppress(ValidationError):  # a starter may name a file that is not here
        needs = cls(cls.Params.model_validate(starter)).needs() if cls.declares_needs else None
        if needs is not None:
            asked = ((need.spec.describe(), _ROWS[need.of], _STATES.get(need.state, need.state)) for need in needs)
            features = tuple(asked)
            compares = compares or any(need.of == "targets" for need in needs)
    about = inspect.cleandoc(vars(written(cls)).get("__doc__") or "")
    return Described(name, registry.kind, entry, about, features, compares, found.name if found else "", starter)
