"""Error of cosines and CPU time per row of every projection, on real gradients of a small Llama's LoRA adapter.

The error is the root mean square, over all pairs of rows, of the projected minus the exact cosine; 1/sqrt(K) is what
theory says for unit vectors that are nearly orthogonal. Times are those of the projection alone, one thread.

python -m benchmarks.projection --dim 1024 8192
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.featurize import build
from benchmarks.passes import CPU, Bench
from dataflex.features.projection import build_projector
from dataflex.features.spec import GradientSpec, Projection

ROWS = 64
"""Rows projected at a time, as a batch of the engine would be."""


def cosines(vectors: np.ndarray) -> np.ndarray:
    """Return the cosines of all pairs of rows, (R (R - 1) / 2,)."""
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


def features(bench: Bench, spec: GradientSpec) -> np.ndarray:
    (values,) = bench.engine.compute(bench.rows, [spec])
    if values.vectors is None:
        raise AssertionError("a gradient has vectors")
    return values.vectors


def projection_time(bench: Bench, projection: Projection, whole: np.ndarray) -> float:
    """Return CPU-seconds per row to project gradients that are already there."""
    parameters = sorted(bench.engine.parameters, key=lambda p: p.key)
    projector = build_projector(projection, {p.key: p.size for p in parameters})
    blocks = torch.split(torch.from_numpy(whole[:ROWS]), [p.size for p in parameters], dim=1)
    best = math.inf
    for repeat in range(3):
        begun, y = time.process_time(), projector.zeros(len(blocks[0]), CPU)
        for p, block in zip(parameters, blocks, strict=True):
            projector.add(y, p.key, 0, block)
        projector.values(y)
        if repeat:  # the first fills the tables
            best = min(best, time.process_time() - begun)
    return best / len(blocks[0])


def candidates(dim: int) -> Sequence[Projection]:
    sparse = [Projection(dim=dim, sparsity=s) for s in (1, 2, 4, 8)]
    return [*sparse, *(Projection(type=kind, dim=dim) for kind in ("srht", "rademacher"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="mean tokens per row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = build(args.tokens, args.rows, token_budget=2048)
    identity = Projection(type="identity")
    whole = {d: features(bench, GradientSpec(direction=d, projection=identity)) for d in ("sgd", "adam")}
    exact = {d: cosines(vectors) for d, vectors in whole.items()}
    means = ", ".join(f"{direction} {cosine.mean():.3f}" for direction, cosine in exact.items())
    print(f"{args.rows} rows, {whole['sgd'].shape[1]} parameters; mean cosine {means}")
    for dim in args.dim:
        print(f"\nK = {dim}, 1/sqrt(K) = {1 / math.sqrt(dim):.4f}\n  {'':22s} RMSE sgd  RMSE adam   ms/row")
        for projection in candidates(dim):
            errors = [
                np.sqrt(((cosines(features(bench, GradientSpec(direction=d, projection=projection))) - e) ** 2).mean())
                for d, e in exact.items()
            ]
            seconds = projection_time(bench, projection, whole["sgd"])
            name = projection.type + (f" s={projection.sparsity}" if projection.type == "sjlt" else "")
            print(f"  {name:22s} {errors[0]:8.4f}   {errors[1]:8.4f} {seconds * 1e3:8.2f}")


if __name__ == "__main__":
    main()
