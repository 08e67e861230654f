"""Fit the law to a table of runs, find the best proportions, and warn of what speaks against trusting them.

R runs, K domains, J metrics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.fitting.goal import Goal
from dataflex.fitting.law import LogLinear, directions, fit_law
from dataflex.fitting.optimum import best_mixture
from dataflex.fitting.quality import held_out, r_squared, rank_correlation
from dataflex.fitting.table import Runs
from dataflex.whole import replacing


def fit_mixture(runs: Runs, goal: Goal) -> dict[str, Any]:
    """Fit the law to every metric and solve for the mixture.

    Returns:
        `proportions` by name, `unit`, and `fit`: laws, their quality on runs left out, the goal, and warnings.
    """
    laws = [fit_law(runs.mixtures, values) for values in runs.values.T]
    slopes = np.stack([law.slopes for law in laws])
    best = best_mixture(slopes, goal.weights, goal.prior, goal.kl, goal.caps)
    predicted, means = held_out(runs)
    metrics = {
        name: {
            "weight": float(goal.weights[j]),
            "floor": laws[j].floor,
            "slopes": _by_name(runs.domains, slopes[j]),
            "r2": r_squared(runs.values[:, j], laws[j](runs.mixtures), runs.values[:, j].mean()),
            "held_out_r2": r_squared(runs.values[:, j], predicted[:, j], means[:, j]),
            "held_out_rank_correlation": rank_correlation(runs.values[:, j], predicted[:, j]),
            "predicted": float(laws[j](best)),
            "predicted_at_prior": None if goal.prior is None else float(laws[j](goal.prior)),
            "best_run": float(runs.values[:, j].min()),
        }
        for j, name in enumerate(runs.metrics)
    }
    error = float(np.sqrt((((predicted - runs.values) @ goal.weights) ** 2).mean()))
    return {
        "proportions": _by_name(runs.domains, best),
        "unit": "tokens",
        "fit": {
            "law": "log-linear",
            "runs": len(runs.mixtures),
            "mixtures": int(runs.group.max() + 1),
            "metrics": metrics,
            "held_out_error": error,
            "prior": None if goal.prior is None else _by_name(runs.domains, goal.prior),
            "kl": goal.kl,
            "tokens": goal.tokens,
            "cap": goal.repetition,
            "epochs": None if goal.tokens is None else _by_name(runs.domains, _epochs(best, goal)),
            "warnings": [*_on_runs(runs), *_on_laws(metrics), *_on_mixture(runs, goal, laws, best, error)],
        },
    }


def write(found: Mapping[str, Any], table: Path, output: Path) -> None:
    """Write the proportions, whole or not at all, with the digest of the table that they come from."""
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    whole = {**found, "fit": {"table": table.name, "table_sha256": digest, **found["fit"]}}
    with replacing(output) as temporary:
        temporary.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "utf-8")


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """Describe a fit in lines for people."""
    fit = found["fit"]
    lines = [f"{fit['runs']} runs, {fit['mixtures']} mixtures; on runs left out of the fit:"]
    lines.append(f"{'R2':>8} {'rank':>6} {'predicted':>10} {'at prior':>9} {'best run':>9} {'weight':>7}  metric")
    for name, about in fit["metrics"].items():
        rank, prior = about["held_out_rank_correlation"], about["predicted_at_prior"]
        lines.append(
            f"{about['held_out_r2']:8.3f} {'-' if rank is None else f'{rank:.3f}':>6} {about['predicted']:10.4f} "
            f"{'-' if prior is None else f'{prior:.4f}':>9} {about['best_run']:9.4f} {about['weight']:7.3f}  {name}"
        )
    lines += ["", f"{'share':>8} {'prior':>8} {'epochs':>7}  domain"]
    for name, share in found["proportions"].items():
        prior = "-" if fit["prior"] is None else f"{fit['prior'][name]:.4f}"
        epochs = "-" if fit["epochs"] is None or fit["epochs"][name] is None else f"{fit['epochs'][name]:.2f}"
        lines.append(f"{share:8.4f} {prior:>8} {epochs:>7}  {name}")
    return lines


def _on_runs(runs: Runs) -> list[str]:
    """Warn of what the table has too few runs to tell."""
    parameters = len(runs.domains) + 1
    known = len(directions(runs.mixtures))
    warnings = []
    if (mixtures := int(runs.group.max() + 1)) < parameters:
        warnings.append(f"{mixtures} mixtures for {parameters} parameters of each law: it can fit whatever they say")
    if known < len(runs.domains) - 1:
        warnings.append(
            f"the runs vary in {known} of {len(runs.domains) - 1} directions: nothing is known of the others, "
            "which are taken to have no effect"
        )
    return warnings


def _on_laws(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Warn of laws that do not predict runs which they were not fitted to."""
    return [
        f"metric {name}: on runs left out the law is no better than their mean (R2 {about['held_out_r2']:.2f}); "
        "more runs, or runs that differ more, are needed"
        for name, about in metrics.items()
        if about["weight"] > 0 and about["held_out_r2"] <= 0
    ]


def _on_mixture(runs: Runs, goal: Goal, laws: list[LogLinear], best: np.ndarray, error: float) -> list[str]:
    """Warn of shares outside of what was run, and of a gain that is within the error."""
    warnings = []
    low, high = runs.mixtures.min(axis=0), runs.mixtures.max(axis=0)
    for name, share, least, most in zip(runs.domains, best, low, high, strict=True):
        if not least - 1e-6 <= share <= most + 1e-6:
            warnings.append(f"domain {name}: {share:.4f} lies outside of what was run, {least:.4f} to {most:.4f}")
    if goal.prior is not None:
        gain = float(sum(w * (law(goal.prior) - law(best)) for w, law in zip(goal.weights, laws, strict=True)))
        if gain <= error:
            warnings.append(f"the gain predicted over the prior, {gain:.4g}, is within the error on runs, {error:.4g}")
    return warnings


def _epochs(best: np.ndarray, goal: Goal) -> np.ndarray:
    """Return the epochs over each domain, (K,); NaN for a domain without tokens."""
    assert goal.sizes is not None
    assert goal.tokens is not None
    return np.divide(best * goal.tokens, goal.sizes, out=np.full(len(best), np.nan), where=goal.sizes > 0)


def _by_name(names: tuple[str, ...], values: np.ndarray) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else float(value) for name, value in zip(names, values, strict=True)}
