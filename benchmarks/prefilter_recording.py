"""The run whose updates are recorded: LESS with a full refresh, and the scores of cheap methods beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from benchmarks.prefilter_replay import ALL, Setting, Update
from dataflex.config.keys import Refresh
from dataflex.selectors.base import Context, NativeSelector, Need, Selection
from dataflex.selectors.embedding import Embedding, RdsPlus
from dataflex.selectors.less import Less
from dataflex.selectors.loss import ByLoss, Ifd

CHEAP: dict[str, tuple[type[NativeSelector], dict[str, Any]]] = {
    "rds_plus": (RdsPlus, {}),
    "embedding": (Embedding, {}),
    "embedding, whitened": (Embedding, {"similarity": "whitened_cosine"}),
    "embedding, position weighted": (Embedding, {"pooling": "position_weighted"}),
    "embedding, position weighted, whitened": (
        Embedding,
        {"pooling": "position_weighted", "similarity": "whitened_cosine"},
    ),
    "loss of the base": (ByLoss, {"mode": "topk_high", "model": "base"}),
    "low loss of the base": (ByLoss, {"mode": "topk_low", "model": "base"}),
    "loss": (ByLoss, {"mode": "topk_high"}),
    "low loss": (ByLoss, {"mode": "topk_low"}),
    "ifd": (Ifd, {}),
}
"""Methods that need no gradient."""


def method(name: str) -> NativeSelector:
    """Return a cheap method."""
    made, params = CHEAP[name]
    return made(made.Params(**params))


class Recorded(Less):
    """LESS that keeps what each update had."""

    class Params(Less.Params):
        """Parameters of the recording."""

        output: str = Field(description="folder for a file per update")
        cheap: tuple[str, ...] = Field(tuple(CHEAP), description="cheap methods whose scores are kept")
        drive: tuple[str, float, float, float] | None = Field(
            None, description="method, keep, tail and rotating share whose choice is trained on; default: full refresh"
        )

    def needs(self) -> list[Need]:
        """Need what LESS does, and what the cheap methods do, so that it is computed in the same passes."""
        return list(dict.fromkeys([*super().needs(), *(n for name in self.params.cheap for n in method(name).needs())]))

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Return the choice of a full refresh, or of what drives."""
        found = super().select(model, step_id, num_samples, context=context, **kwargs)
        term = self.parts.representation.terms()[0]  # type: ignore[union-attr]
        view: Any = context.features(term.train)
        values = {"vectors": view.dense().astype(np.float16), "status": view.status, "rows": found.rows}
        values |= {f"target {n}": _dense(context.features(term.target, n)) for n in context.targets}
        for name in self.params.cheap:
            scored = method(name).select(model, step_id, 1, context=replace(context, history=()), **kwargs)
            assert isinstance(scored, Selection)
            assert scored.pool is not None
            values[f"score {name}"] = scored.pool
        values |= {"keys": np.stack([np.frombuffer(key.tobytes(), np.uint8) for key in context.rows.keys])}
        values |= {"supervised": context.rows.supervised, "length": context.rows.length}
        folder = Path(self.params.output)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"update_{context.update}.npz"
        np.savez(path.with_suffix(".part.npz"), **values)
        path.with_suffix(".part.npz").rename(path)
        return found if self.params.drive is None else self._driven(folder, context.update)

    def _driven(self, folder: Path, update: int) -> Selection:
        """Return the choice of the setting that drives, out of what was recorded so far."""
        name, keep, tail, share = self.params.drive
        setting = Setting(name, keep, tail, Refresh(policy="rotating", refresh_fraction=share))
        history = [Update.read(folder / f"update_{number}.npz") for number in range(update + 1)]
        for number in range(update + 1):
            rows, _, _ = setting.choose(history[: number + 1], ALL)
        return Selection(rows)


def _dense(view: Any) -> np.ndarray:
    found: np.ndarray = view.dense()
    return found.astype(np.float16)
