"""A user's class that inherits from none of ours is made ours where it is loaded, and stays as it was otherwise."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from dataflex.components.adapter import written
from dataflex.components.registry import MIXERS, SELECTORS, WEIGHTERS, use_plugins
from dataflex.config import load
from dataflex.config.methods import methods
from dataflex.errors import ConfigError
from dataflex.mixers.classic import adapted_mixer
from dataflex.rewards.base import adapted_reward
from dataflex.selectors.base import NativeSelector
from dataflex.selectors.classic import adapted_selector
from dataflex.weighters.classic import adapted_weighter
from tests.run_file import write

HERE = "tests.test_adapter"


class Plain:
    """A selector with parameters and without a base, which keeps them as it likes."""

    class Params(BaseModel):
        depth: int = 3

    def __init__(self, params: Any):
        super().__init__()
        self.depth = params.depth
        self.refreshes = ("full",)
        self.chooses_distinct = True

    def needs(self) -> list[Any]:
        return []

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        return [self.depth] * num_samples


class Without:
    """One without `needs`: it may leave gradients, as one of the classic interface."""

    class Params(BaseModel):
        pass

    def __init__(self, params: Any):
        self.params = {"mine": 1}

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        return []


class Old:
    def __init__(self, dataset: Any, depth: int = 3):
        self.depth = depth

    def select(self, model: Any, step_id: int, num_samples: int, **kwargs: Any) -> list[int]:
        return []


class Shares:
    class Params(BaseModel):
        power: float = 1.0

    def __init__(self, params: Any):
        self.power = params.power

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        return np.ones(2)


class Weight:
    class Params(BaseModel):
        pass

    def __init__(self, params: Any): ...

    def weights(self, group: Any) -> Any: ...


class Scored:
    class Params(BaseModel):
        pass

    def __init__(self, params: Any): ...

    def score(self, *texts: Any) -> list[float]:
        return [1.0]

    def identity(self) -> dict[str, Any]:
        return {}


WRONG = """
from dataflex.selectors import register_selector

@register_selector("params are a number")
class Wrong:
    Params = 3

    def select(self): ...
"""


class Other(type):
    pass


class Foreign(metaclass=Other):
    class Params(BaseModel):
        pass

    def select(self) -> None: ...


def test_parameters_and_attributes_are_the_classs_own() -> None:
    cls: Any = adapted_selector(Plain)
    assert cls is adapted_selector(Plain)
    assert issubclass(cls, NativeSelector)
    assert (written(cls), cls.__module__, cls.__qualname__) == (Plain, Plain.__module__, "Plain")
    made: Any = cls(Plain.Params(depth=5))
    assert (made.depth, made.refreshes, made.chooses_distinct, made.idle_steps) == (5, ("full",), True, 0)
    assert (made.leaves_gradients, made.may_choose_unlabelled) == (False, False)
    again: Any = pickle.loads(pickle.dumps(made))
    assert (type(again), again.depth) == (cls, 5)


def test_one_without_needs_is_treated_as_classic_ones_are() -> None:
    cls = adapted_selector(Without)
    assert (cls.leaves_gradients, cls.may_choose_unlabelled) == (True, True)


def test_a_mixer_without_a_base_is_asked_at_every_step_and_handed_the_batch() -> None:
    cls: Any = adapted_mixer(Shares)
    assert (cls.Params, cls.interval, cls.watches) == (Shares.Params, 1, True)
    made = cls(Shares.Params(power=2.0))
    assert made.signals
    made._bind({})  # as a run does when it is put together
    assert made._made.power == 2.0


def test_what_cannot_be_adapted_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="expected a class that inherits from NativeSelector"):
        adapted_selector(Foreign)
    with pytest.raises(ConfigError, match=r"expected a subclass of dataflex\.weighters\.WeighterParams"):
        adapted_weighter(Weight)
    assert adapted_reward(Scored)(Scored.Params()).score() == [1.0]  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["Plain", "Without", "Old"])
def test_a_run_file_takes_them(name: str, run_folder: Any) -> None:
    settings = load(write(f"component_name: {HERE}:{name}"))
    assert settings.params.model_dump() == ({"depth": 3} if name == "Plain" else {})
    assert settings.component is not None
    assert settings.new_method() is not None


def test_a_class_with_params_that_are_none_is_listed_with_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    use_plugins([str(tmp_path / "wrong.py")])
    found = {entry["name"]: entry for entry in methods()}
    use_plugins([])
    assert "found Params = 3 in" in found["params are a number"]["error"]
    assert "description" in found["less"]


def test_every_built_in_is_of_its_kind() -> None:
    for registry in (SELECTORS, MIXERS, WEIGHTERS):
        for name in registry.builtins:
            cls = registry.load(name)
            assert written(cls) is cls
