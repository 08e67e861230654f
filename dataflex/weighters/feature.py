"""Weights by a number per row that is known before training: a stored feature, or a column of a file.

R training rows, M examples of a group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from dataflex.components.params import ExistingFile
from dataflex.distributed import is_main
from dataflex.errors import ConfigError, MismatchError
from dataflex.features.need import Need, View
from dataflex.features.spec import BASE, FeatureSpec
from dataflex.rows import KEY_DTYPE, Rows, Status
from dataflex.weighters.base import Group, NativeWeighter, WeighterParams
from dataflex.weighters.relative import mean_one, softmax

if TYPE_CHECKING:  # a run file is checked without torch
    from torch import Tensor

log = logging.getLogger(__name__)


class ByFeature(NativeWeighter):
    """Weighs by a function of each row's number; a row without one has weight 0.

    With `excess` the number is the example's live loss less the stored one of a reference model, the reducible loss of
    RHO (arXiv 2206.07137), which takes the highest; here they are weighed.
    """

    class Params(WeighterParams):
        """Parameters of `feature`."""

        feature: FeatureSpec | None = Field(
            None, description="stored feature: loss is read per token; of the others, a number beside the vector"
        )
        path: ExistingFile | None = Field(
            None,
            description="Parquet with row_key (as `dataflex select` writes it) or index (row position), and column",
        )
        column: str | None = Field(
            None, description="of the file (default: score), or the feature's number (norm; of policy_gradient: reward)"
        )
        state: str = Field(BASE, description="feature: base, before any training; or a checkpoint folder")
        excess: bool = Field(
            False, description="live loss less the number, which is a reference's loss per token: feature loss, or file"
        )
        function: Literal["linear", "exp", "rank", "threshold"] = Field(
            "linear",
            description="linear: the number, 0 or more (with excess: below 0 counts as 0); exp: exp(number / "
            "temperature); rank: 1 for the lowest of the group, and so on; threshold: equal from it on, else 0",
        )
        favour: Literal["high", "low"] = Field("high", description="exp, rank, threshold: which numbers count more")
        temperature: float = Field(1.0, gt=0, description="exp: the smaller, the further weights are apart")
        threshold: float | None = Field(None, description="threshold: least number that counts; for low, the largest")

        @model_validator(mode="after")
        def _fits(self) -> ByFeature.Params:
            kind = self.feature.kind if self.feature else None
            found = self.feature
            plain_loss = found is not None and found.kind == "loss" and found.given == "prompt"
            wrong = {
                "one of feature and path": (self.feature is None) == (self.path is None),
                "no state without feature": self.feature is None and self.state != BASE,
                "no column with feature: {kind: loss}, of which the loss per token is read": kind == "loss"
                and self.column is not None,
                "column with this feature, of which no number stands for a row": found is not None
                and found.kind != "loss"
                and found.number is None
                and self.column is None,
                "feature: {kind: loss} or path with excess": self.excess
                and self.feature is not None
                and not plain_loss,
                "no temperature: it acts with function: exp alone": self.function != "exp" and self.temperature != 1,
                "threshold with function: threshold, and with no other": (self.function == "threshold")
                != (self.threshold is not None),
                "no favour with function: linear, which takes the number itself": self.function == "linear"
                and self.favour != "high",
            }
            if any(wrong.values()):
                raise ValueError("; ".join(text for text, is_wrong in wrong.items() if is_wrong))
            return self

    params: Params

    def __init__(self, params: Params):
        super().__init__(params)
        self._values: Tensor | None = None

    @property
    def compares(self) -> bool:
        """True except for a threshold, which leaves examples out one by one."""
        return self.params.function != "threshold"

    def needs(self) -> Sequence[Need]:
        """Need the feature, if it is not read from a file."""
        return [Need(self.params.feature, "train", self.params.state)] if self.params.feature else []

    def prepare(self, values: Mapping[Need, Any], *, rows: Rows) -> None:
        """Take each row's number.

        Raises:
            ConfigError: the file lacks a column or contradicts itself, or a number is below 0 under `linear`.
            MismatchError: no training row has a number.
        """
        if self.params.path:
            found = _from_file(self.params.path, self.params.column or "score", rows)
        else:
            need = self.needs()[0]
            found = _from_view(values[need], need.spec, self.params.column)
        place = self.params.path or f"feature {self.params.feature.kind if self.params.feature else ''}"
        lacking = int(np.isnan(found).sum())
        if lacking == len(found):
            raise MismatchError(
                f"weighter feature: none of the {len(found)} training rows has a number in {place}; expected it to be "
                "made from this dataset, with this template, tokenizer and cutoff_len"
            )
        if lacking and is_main():
            log.warning("weighter feature: %d of %d rows have no number and weigh 0 (%s)", lacking, len(found), place)
        if self.params.function == "linear" and not self.params.excess and np.nanmin(found) < 0:
            raise ConfigError(
                f"weighter feature: found {np.nanmin(found):g} in {place}; function: linear expects numbers of 0 or "
                "more; take exp, rank or threshold"
            )
        import torch

        self._values = torch.from_numpy(found)

    def weights(self, group: Group) -> Tensor:
        """Return the weights, (M,) float64, mean 1 over the usable examples; all 0 if none of them counts."""
        assert self._values is not None
        self._values = self._values.to(group.rows.device)
        score = self._values[group.rows]
        if self.params.excess:
            score = group.losses.double() - score
        usable = group.usable
        judged = usable & score.isfinite()
        sign = 1.0 if self.params.favour == "high" else -1.0
        score = (sign * score).where(judged, np.nan)  # NaN is neither below nor above anything, so it has no rank
        if self.params.function == "exp":
            return softmax(score / self.params.temperature, judged, usable)
        functions: dict[str, Callable[[], Tensor]] = {
            "linear": lambda: score.clamp(min=0),
            "rank": lambda: _ranks(score),
            "threshold": lambda: (score >= sign * (self.params.threshold or 0.0)).double(),
        }
        return mean_one(functions[self.params.function]().where(judged, 0.0), usable)


def _ranks(scores: Tensor) -> Tensor:
    """Return 1 for the lowest of (M,), ties their mean rank; NaN is below and above nothing."""
    below = (scores[None] < scores[:, None]).sum(dim=1)
    equal = (scores[None] == scores[:, None]).sum(dim=1)
    return below + (equal + 1).double() / 2


def _from_view(view: View, spec: FeatureSpec, column: str | None) -> np.ndarray:
    usable = view.status == Status.OK
    if spec.kind != "loss":
        found = view.scalar(str(column or spec.number)).astype(np.float64)
        return np.where(usable & np.isfinite(found), found, np.nan)
    total, tokens = view.scalar("loss_sum").astype(np.float64), view.scalar("tokens")
    usable = usable & (tokens > 0) & np.isfinite(total)
    return np.divide(total, tokens, out=np.full(len(total), np.nan), where=usable)


def _from_file(path: str, column: str, rows: Rows) -> np.ndarray:
    """Return the column's number for each row, (R,) float64, NaN for rows without one; identical rows share theirs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path}: no Parquet file that can be read ({error})") from error
    names = set(table.column_names)
    if column not in names or not names & {"row_key", "index"}:
        raise ConfigError(
            f"{path}: found columns {', '.join(table.column_names)}; expected {column} (parameter `column`), and "
            "row_key or index"
        )
    numbers = table[column].cast(pa.float64()).to_numpy(zero_copy_only=False)
    if "row_key" in names:
        keys = table["row_key"].to_pylist()
        if any(not isinstance(key, bytes) or len(key) != KEY_DTYPE.itemsize for key in keys):
            raise ConfigError(f"{path}: found row_key that is no binary of 16 bytes, as `dataflex select` writes it")
        wanted: Sequence[Any] = keys
        known: dict[Any, float] = {}
        places: Sequence[Any] = [key.tobytes() for key in rows.keys]
    else:
        wanted, known, places = table["index"].to_pylist(), {}, range(len(rows))
        outside = [i for i in wanted if i is None or not 0 <= i < len(rows)]
        if outside:
            raise MismatchError(
                f"{path}: found index {outside[0]}; the training set has rows 0 to {len(rows) - 1}; a file with "
                "row_key fits a dataset that was reordered or cut"
            )
    # A row may stand in the file several times, as in a pool with duplicates, if the numbers agree.
    for key, number in zip(wanted, numbers.tolist(), strict=True):
        if np.isfinite(number) and known.setdefault(key, number) != number:
            name = key.hex() if isinstance(key, bytes) else key
            raise ConfigError(f"{path}: found {known[key]:g} and {number:g} for the row {name}; expected one number")
    return np.array([known.get(place, np.nan) for place in places], dtype=np.float64)
