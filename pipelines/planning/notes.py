"""What cannot be told before a run, said in words rather than guessed."""

from __future__ import annotations

from dataflex.config.settings import Settings
from dataflex.features.spec import PolicyGradientSpec
from dataflex.llamafactory.records import Sample
from dataflex.mixers.base import NativeMixer
from dataflex.pipelines.planning.naming import Naming
from dataflex.pipelines.run import Run
from dataflex.pipelines.selecting.pool import most_rows
from dataflex.selectors.base import NativeSelector


def notes_of(run: Run, naming: Naming, sample: Sample | None, settings: Settings) -> list[str]:
    """Return a sentence for each part of the plan that is not exact, or not part of it."""
    found = []
    if sample is not None:
        found.append(
            f"at most {sample.count} records of each dataset were looked at, drawn at random; all numbers are scaled, "
            "and kept states, which depend on every row, were not looked for"
        )
    for name, each in zip((settings.component_name, "weighter"), (run.method, run.weighter), strict=True):
        if each is not None and not each.declares_needs:
            found.append(f"{name} declares no features: what it asks for is known only while it runs")
        for spec in each.asked if each is not None else ():
            found.append(
                f"{name} asks for {spec.describe()} of some training rows that it finds while it chooses, at most "
                f"{most_rows(run)} at each update; they are in no number here"
            )
    for spec in dict.fromkeys(need.spec for need in run.needs):
        if isinstance(spec, PolicyGradientSpec):
            found.append(
                f"{spec.describe()}: {spec.mc_samples} responses to each row are written, judged and kept, as far as "
                "no store has them; their files are in no number, and their time is that of the longest they may be"
            )
    if settings.dataflex.prefilter is not None:
        found.append(
            f"prefilter {settings.dataflex.prefilter.method}: which rows go on follows from its scores; any so many "
            "stand for them, so their number is exact and their tokens are not"
        )
    if settings.dataflex.refresh.policy == "rotating" and len(run.updates) > 1 and run.live_needs:
        found.append("refresh policy rotating: which rows are computed follows from scores, so counts are approximate")
    if naming.is_nameless:
        found.append(
            f"the kept state {str(naming.lineage)[:8]} is of an older DataFlex, which did not note the names of its "
            "features: those that are there are counted as missing"
        )
    if isinstance(run.method, NativeSelector) and naming.lineage is None and naming.warm_step and run.is_live:
        found += [] if sample is not None else ["the state at the end of the warm-up cannot be kept: see docs/runs.md"]
    if isinstance(run.method, NativeMixer) and "expert_loads" in run.method.signals:
        found.append(f"{settings.component_name} sends held-out rows through the model at updates: in no number here")
    if any(each.reference_model_path is not None and not each.needs() for each in run.methods):
        found.append("the reference model stands beside the trained one: one forward pass more at every step")
    if run.tests and settings.dataflex.test_reward is not None:
        found.append("what writing and judging responses to test prompts takes is in no number here")
    if run.weighter is not None or settings.train_type == "dynamic_weight":
        weighter = run.weighter or run.method
        if weighter is not None and weighter.needs_targets:
            found.append("the weighter embeds the target rows anew while it trains, which is in no number here")
    return found
