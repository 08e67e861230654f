"""What selectors, mixers and weighters have in common, and how classes of the classic interface are made."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, RootModel

from dataflex.features.need import Need
from dataflex.features.spec import FeatureSpec
from dataflex.params import Parameters

RUNTIME = ("dataset", "eval_dataset", "accelerator", "data_collator", "mixture_manager")
"""Constructor arguments of a class of the classic interface that are objects of the run, never parameters."""


class Method(ABC):
    """Base of `NativeSelector`, `NativeMixer` and `NativeWeighter`: what a run asks of each of them.

    It is made from its parameters alone, also where a run file is only checked: nothing heavy in `__init__`.

    Attributes:
        Params: its parameters, a frozen model.
        declares_needs: whether `needs` and `asked` tell every feature that it will ask for.
        needs_targets: whether it holds rows against the target sets, so that there must be some.
        watches: whether it lives on the losses of the training, of which there are none before the first step.
        idle_by: the parameters that `idle_steps` follows from.
        wraps: the user's class that this one was made around; itself where there is none.
    """

    Params: ClassVar[type[BaseModel]] = Parameters
    declares_needs: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    watches: ClassVar[bool] = False
    idle_by: ClassVar[tuple[str, ...]] = ()
    wraps: ClassVar[type[Any]]

    def __init__(self, params: Any):
        self.params = params

    def bind(self, runtime: Mapping[str, Any]) -> None:  # noqa: B027 - for those that want objects of the run
        """Take the objects of the run, once, before anything else is asked.

        Args:
            runtime: `RUNTIME`, as far as the run has them, and `cache_dir`.
        """

    def needs(self) -> Sequence[Need]:
        """Return the features of all training rows, or of all targets, that it will ask for."""
        return ()

    @property
    def asked(self) -> Sequence[FeatureSpec]:
        """Features of some training rows that it asks for while it works."""
        return ()

    @property
    def reference_model_path(self) -> str | None:
        """Folder of a model that the trained one is compared with, if there is one."""
        return None

    @property
    def idle_steps(self) -> int:
        """Optimizer steps at a run's head for which it has no effect, whatever it sees."""
        return 0


class Arguments(RootModel[dict[str, Any]]):
    """Parameters of a class of the classic interface: constructor arguments by name."""


def constructor_params(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class of the classic interface: its constructor's arguments but those of the run."""
    return {
        name: parameter
        for name, parameter in inspect.signature(cls).parameters.items()
        if name not in RUNTIME and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def constructed(cls: type[Any], params: Arguments, runtime: Mapping[str, Any]) -> Any:
    """Construct a class of the classic interface from its parameters and those objects of the run that it asks for."""
    wanted = inspect.signature(cls).parameters
    return cls(**({name: value for name, value in runtime.items() if name in wanted} | params.root))
