"""No parameter is NaN or infinite, whoever has it and however deep it stands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from dataflex.components.params import Parameters
from dataflex.components.registry import MIXERS, SELECTORS, WEIGHTERS
from dataflex.config import load
from dataflex.config.keys import DataflexKeys, FlatKeys
from dataflex.errors import ConfigError
from dataflex.features import spec
from dataflex.rewards import REWARDS

OWNERS = [
    (registry, name)
    for registry in (SELECTORS, MIXERS, WEIGHTERS, REWARDS)
    for name, place in registry.places().items()
    if place.startswith("dataflex.")  # other tests register classes of their own
]


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield a model and those of its fields, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models(field.annotation)
    for part in get_args(annotation):
        yield from models(part)


def floats(annotation: Any) -> bool:
    return annotation is float or any(floats(part) for part in get_args(annotation))


@pytest.mark.parametrize(("registry", "name"), OWNERS, ids=lambda value: getattr(value, "kind", value))
def test_parameters_of_every_method_are_finite(registry: Any, name: str) -> None:
    found = set(models(registry.load(name).Params))
    assert found
    for model in found:
        assert issubclass(model, Parameters), model


def test_no_field_takes_nan_or_infinity() -> None:
    owners = [registry.load(name).Params for registry, name in OWNERS] + [DataflexKeys, FlatKeys]
    found = {model for owner in owners for model in models(owner)}
    found |= {cls for cls in vars(spec).values() if isinstance(cls, type) and issubclass(cls, BaseModel)}
    tried = 0
    for model in found:
        for name, field in model.model_fields.items():
            if not floats(field.annotation):
                continue
            for value in (math.inf, -math.inf, math.nan):
                for given in (value, [value, value], [value], {"a": value}):
                    with pytest.raises(ValidationError) as caught:
                        model(**{name: given})
                    assert any(e["loc"][0] == name for e in caught.value.errors()), (model, name, given)
            tried += 1
    assert tried > 40


def test_parameters_of_a_class_without_a_model_are_finite(tmp_path: Any) -> None:
    """They are part of a run's identity, which is JSON."""
    path = tmp_path / "mine.py"
    path.write_text(
        "class Mine:\n    def __init__(self, weights, cache_dir=None):\n        self.weights = weights\n"
        "    def select(self, model, step_id, num_samples, **kwargs): ...\n"
    )
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        f"train_type: dynamic_select\ncomponent_name: '{path}:Mine'\ndataflex: {{params: {{weights: [1.0, .inf]}}}}\n"
    )
    with pytest.raises(ConfigError, match=r"dataflex\.params\.weights: found \[1\.0, inf\]; expected finite numbers"):
        load(run_file)
