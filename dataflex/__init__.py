"""Data-centric training of language models on LLaMA-Factory: featurize once, select while training.

In Python and in notebooks: `load` a run file and call its verbs, `read_run` what a run left as tables, `open_store`
what was computed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dataflex.components.registry import register_selector

if TYPE_CHECKING:
    from dataflex.api.choice import Choice
    from dataflex.api.results import RunResults, read_run
    from dataflex.api.run import Run, load
    from dataflex.api.stores import Store, list_stores, open_store

__all__ = [
    "Choice",
    "Run",
    "RunResults",
    "Store",
    "__version__",
    "list_stores",
    "load",
    "open_store",
    "read_run",
    "register_selector",
]

__version__ = "0.1.0"

_PLACES = {
    "Choice": "choice",
    "Run": "run",
    "RunResults": "results",
    "Store": "stores",
    "list_stores": "stores",
    "load": "run",
    "open_store": "stores",
    "read_run": "results",
}
"""Name -> the module of `dataflex.api` that has it; pyarrow, pydantic and the like are imported with that one."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'dataflex' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"dataflex.api.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
