"""Rows by their loss under the live model, or under the base model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dataflex.components.compatibility import accepted
from dataflex.features.spec import BASE
from dataflex.selectors.composed import Composed, Composition
from dataflex.selectors.parts.choice import Bands, Choice, Middle, TopK, Window
from dataflex.selectors.parts.numbers import DeltaLoss, InstructionDifficulty, Loss
from dataflex.selectors.parts.representation import Acts, Part, part


class ByLoss(Composed):
    """Draws rows, those in one third of the losses more often; or takes the highest, the lowest, or the middle.

    Source: the selector `loss` of DataFlex (arXiv 2603.26164). Deviation: a row without a loss has weight 0, not 1e-12.
    """

    class Params(Part):
        """Parameters of `loss`."""

        only: ClassVar[Acts] = {
            "focus": ("mode", ("soft",)),
            "focus_weight": ("mode", ("soft",)),
            "temperature": ("mode", ("soft",)),
            "replacement": ("mode", ("soft", "middle_band")),
            "quantiles": ("mode", ("soft", "middle_band")),
        }

        mode: Literal["soft", "topk_high", "topk_low", "middle_band"] = Field(
            "soft",
            description="soft: draw by bands; topk_high, topk_low: an end; middle_band: draw between quantiles",
        )
        focus: Literal["low", "medium", "high"] = Field("high", description="soft: the band that is favoured")
        focus_weight: float = Field(5.0, gt=0, description="soft: weight of a row in it; 1 elsewhere")
        quantiles: tuple[float, float] = Field((0.33, 0.66), description="where bands meet; ends of middle_band")
        temperature: float = Field(1.0, gt=0, description="soft: weights are raised to 1 / temperature")
        replacement: bool = Field(False, description="soft, middle_band: a row may be drawn again within an update")
        measure: Literal["mean", "sum", "perplexity"] = Field("mean", description="loss per token, per row; exp(mean)")
        model: Literal["base", "live"] = Field("live", description="base: before any training; live: as it is now")
        score_batch_size: int = accepted("score_batch_size", 8, ge=1)
        score_num_workers: int = accepted("score_num_workers", 2, ge=0)
        cache_dir: str | None = Field(
            None, description="root of the stores where neither dataflex.store nor DATAFLEX_HOME is set"
        )

        @model_validator(mode="after")
        def _ascend(self) -> ByLoss.Params:
            low, high = self.quantiles
            if not 0 <= low <= high <= 1 or (self.mode == "middle_band" and low == high):
                raise ValueError("quantiles that ascend within 0 to 1")
            return self

    def composition(self, params: Params) -> Composition:
        """Return the parts."""
        rules: dict[str, Choice] = {
            "soft": part(Bands, params),
            "topk_high": TopK(),
            "topk_low": TopK(order="low"),
        }
        rule = part(Middle, params) if params.mode == "middle_band" else rules[params.mode]
        return Composition(representation=part(Loss, params), rule=rule)


class ByDeltaLoss(Composed):
    """Draws from a window over the rows ranked by how much they were learned: easy first, the hardest last.

    Source: the selector `delta_loss` of DataFlex (arXiv 2603.26164). Deviation: the baseline is the base model, whose
    losses lie in the store and survive a resumption; there it is the model at the first update, which is drawn evenly.
    """

    class Params(Part):
        """Parameters of `delta_loss`."""

        only: ClassVar[Acts] = {"window_size": ("rule", ("window",)), "outside": ("rule", ("window",))}

        window_size: float = Field(0.2, gt=0, le=1, description="width of the window, as a share of the usable rows")
        outside: float = Field(0.025, ge=0, description="weight of a row outside the window; 1 inside")
        rule: Literal["window", "top_k"] = Field("window", description="top_k: the highest scores at every update")
        baseline: str = Field(
            BASE, description="base: the model before any training; or a checkpoint folder, such as a reference model's"
        )
        score: Literal["delta", "relative_delta", "excess"] = Field(
            "delta", description="l0 - l; (l0 - l) / l0; or l - l0, the reducible loss of RHO (arXiv 2206.07137)"
        )
        score_batch_size: int = accepted("score_batch_size", 8, ge=1)
        cache_dir: str | None = Field(
            None, description="root of the stores where neither dataflex.store nor DATAFLEX_HOME is set"
        )

    def composition(self, params: Params) -> Composition:
        """Return the parts."""
        rule: Choice = Window(size=params.window_size, outside=params.outside) if params.rule == "window" else TopK()
        return Composition(representation=part(DeltaLoss, params), rule=rule)


class Ifd(Composed):
    """IFD: the rows whose response the prompt helps least, while it still helps.

    Source: arXiv 2308.12032 and 2402.00530 (Superfiltering). Looks at no target. Below random in the comparison of MIG
    (arXiv 2504.13835) on a large mixed pool.
    """

    class Params(Part):
        """Parameters of `ifd`."""

        model: Literal["base", "live"] = Field("base", description="base: before any training; live: as it is now")
        most: float = Field(1.0, gt=0, description="rows at or above are left out: the prompt does not help them")
        first_token: Literal["drop", "keep"] = Field(
            "drop",
            description="keep: the response's first token counts given the prompt alone, as in the official code",
        )

    def composition(self, params: Params) -> Composition:
        """Return the parts."""
        return Composition(representation=part(InstructionDifficulty, params), rule=TopK())
