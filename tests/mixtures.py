"""Finished runs whose metrics follow a known law, and what a mixture costs under it, written out."""

from __future__ import annotations

import numpy as np

from dataflex.fitting.table import Runs


def drawn(seed: int, runs: int, domains: int, metrics: int = 1, noise: float = 0.0) -> tuple[Runs, np.ndarray]:
    """Runs whose metrics follow the law with floor 2, and its slopes (J, K)."""
    rng = np.random.default_rng(seed)
    mixtures = rng.dirichlet(np.ones(domains), runs)
    slopes = rng.normal(0, 1, (metrics, domains))
    values = 2 + np.exp(mixtures @ slopes.T) + noise * rng.standard_normal((runs, metrics))
    names = tuple(f"d{i}" for i in range(domains)), tuple(f"m{j}" for j in range(metrics))
    return Runs(*names, mixtures, values), slopes


def objective(x: np.ndarray, slopes: np.ndarray, weights: np.ndarray, prior: np.ndarray, kl: float) -> float:
    divergence = sum(float(a) * np.log(float(a) / float(b)) for a, b in zip(x, prior, strict=True) if a > 0)
    return float(sum(w * np.exp(row @ x) for w, row in zip(weights, slopes, strict=True)) + kl * divergence)
