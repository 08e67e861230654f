"""Docstrings of this project, as Sphinx takes them: Google's sections; of models, the fields with their meanings."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

from docs.reference import fields

_STYLE = Config(napoleon_use_ivar=True, napoleon_use_rtype=False)


def connect(app: Sphinx) -> None:
    """Read docstrings so from now on."""
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)


def _docstring(app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    # Of an attribute Napoleon takes what stands before a colon for its type; here it is a part of the sentence.
    what = "object" if what in ("attribute", "data", "property") else what
    lines[:] = GoogleDocstring(list(lines), _STYLE, app, what, name, found, options).lines()
    if _is_model(found):
        lines += ["", *fields(found), ""]


def _signature(
    app: Sphinx, what: str, name: str, found: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Leave out the signature of a model, which is its fields once more, without their meanings."""
    return ("", None) if _is_model(found) else None


def _is_model(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, BaseModel) and bool(found.model_fields)
