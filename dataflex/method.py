"""What selectors, mixers and weighters have in common."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from dataflex.components.params import Parameters
from dataflex.features.need import Need
from dataflex.features.spec import FeatureSpec

if TYPE_CHECKING:
    default = property
else:

    class default:
        """A property that a subclass may also give as a plain attribute, of the class or set in its constructor."""

        def __init__(self, get):
            self._get, self.__doc__ = get, get.__doc__

        def __get__(self, made, owner=None):
            return self if made is None else self._get(made)


class Method(ABC):  # noqa: B024 - each kind has the one that must be overridden
    """Base of `NativeSelector`, `NativeMixer` and `NativeWeighter`: what a run asks of each of them.

    It is made from its parameters alone, also where a run file is only checked: nothing heavy in `__init__`.

    Attributes:
        Params: its parameters, a frozen model.
        declares_needs: whether `needs` and `asked` tell every feature that it will ask for.
        needs_targets: whether it holds rows against the target sets, so that there must be some.
        watches: whether it lives on the losses of the training, of which there are none before the first step.
        acts_at_start: whether what it answers before the first step is an answer, though it has seen no loss yet.
        idle_by: the parameters that `idle_steps` follows from.
    """

    Params: ClassVar[type[BaseModel]] = Parameters
    declares_needs: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    watches: ClassVar[bool] = False
    acts_at_start: ClassVar[bool] = False
    idle_by: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: Any = None):
        self.params = params

    def _bind(self, runtime: Mapping[str, Any]) -> None:  # noqa: B027 - for those that want objects of the run
        """Take the objects of the run, once, before anything else is asked.

        Args:
            runtime: `dataflex.components.classic.RUNTIME`, as far as the run has them, and `cache_dir`.
        """

    def needs(self) -> Sequence[Need]:
        """Return the features of all training rows, or of all targets, that it will ask for."""
        return ()

    @default
    def asked(self) -> Sequence[FeatureSpec]:
        """Features of some training rows that it asks for while it works."""
        return ()

    @default
    def reference_model_path(self) -> str | None:
        """Folder of a model of the run's tokenizer that the trained one is compared with, or None."""
        return None

    @default
    def idle_steps(self) -> int:
        """Optimizer steps at a run's head for which it has no effect, whatever it sees."""
        return 0
