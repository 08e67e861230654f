"""The settings of a run: a run file that has been checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dataflex.config.keys import DataflexKeys, FlatKeys
from dataflex.features.need import Need
from dataflex.method import Method
from dataflex.schedule import Schedule
from dataflex.selectors.base import NativeSelector
from dataflex.weighters.base import NativeWeighter


class Settings(BaseModel):
    """A run file that has been checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    path: Path = Field(description="the run file")
    llamafactory: dict[str, Any] = Field(description="LLaMA-Factory's keys as written; `stage` is said in any case")
    keys: FlatKeys = Field(description="DataFlex's keys at the top level")
    component_name: str | None = Field(description="the method's name; None with train_type static")
    component: type[Method] | None = Field(description="its class, with all that the base of its kind declares")
    params: Any = Field(description="an instance of its Params; each class has a model of its own")
    weighter: type[NativeWeighter] | None = Field(None, description="the class of a weighter beside a mixer")
    weighter_params: Any = Field(None, description="its parameters")
    prefilter: type[NativeSelector] | None = Field(None, description="the class of a prefilter before a selector")
    prefilter_params: Any = Field(None, description="its parameters")
    needs: tuple[Need, ...] = Field(description="features they declare")
    schedule: Schedule
    dataflex: DataflexKeys = Field(description="the `dataflex:` mapping")
    store_root: str = Field(description="path or URL under which the stores lie")
    notes: tuple[str, ...] = Field(description="what is allowed but probably not meant")

    def new_method(self) -> Method | None:
        """Return a new instance of the method, which knows no run yet."""
        return self.component(self.params) if self.component is not None else None

    def new_weighter(self) -> NativeWeighter | None:
        """Return a new instance of the weighter beside the mixer."""
        return self.weighter(self.weighter_params) if self.weighter is not None else None

    def new_prefilter(self) -> NativeSelector | None:
        """Return a new instance of the prefilter before the selector."""
        return self.prefilter(self.prefilter_params) if self.prefilter is not None else None

    @property
    def train_type(self) -> str:
        """Which of the four ways of training this is."""
        return self.keys.train_type


def store_root(store: str | None, cache_dir: str | None = None) -> str:
    """Return where the stores lie: the run file, DATAFLEX_HOME, the method's `cache_dir`, or a cache of this user."""
    if store is None:
        store = os.environ.get("DATAFLEX_HOME") or cache_dir
    if store is None:
        assets = os.environ.get("HF_ASSETS_CACHE")
        if not assets and (home := os.environ.get("HF_HOME")):
            assets = os.path.join(home, "assets")
        if assets:
            store = os.path.join(assets, "dataflex")
        else:
            import platformdirs  # only where nothing else names a place

            store = platformdirs.user_cache_dir("dataflex")
    return store if "://" in store else os.path.abspath(os.path.expanduser(store))
