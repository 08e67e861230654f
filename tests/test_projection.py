"""Projections have exact values that depend on their arguments alone, and the error that theory promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dataflex.errors import ConfigError
from dataflex.features.entries import canonical_name, stream, words
from dataflex.features.projection import Projector, build_projector
from dataflex.features.spec import Projection
from dataflex.features.srht import Srht

CPU = torch.device("cpu")
SIZES = {"b.weight": 70, "a.weight": 130, "c.bias": 5}
RANDOM = ["sjlt", "rademacher", "srht"]
LINEAR = [*RANDOM, "identity"]


def project(projector: Projector, sizes: dict[str, int], g: Tensor, block: int = 10**9) -> Tensor:
    """Project rows g (n, P), parameters in the order of `sizes`, in blocks of at most `block` elements."""
    y, at = projector.zeros(len(g), CPU, g.dtype), 0
    for name, size in sizes.items():
        for start in range(0, size, block):
            stop = min(start + block, size)
            projector.add(y, name, start, g[:, at + start : at + stop].clone())
        at += size
    return projector.values(y)


def matrix(projector: Projector, sizes: dict[str, int]) -> Tensor:
    """Return R^T (P, K) in float64, by projecting the unit vectors."""
    return project(projector, sizes, torch.eye(sum(sizes.values()), dtype=torch.float64))


def test_words_are_splitmix64() -> None:
    """The reference sequence for seed 1234567 that implementations of SplitMix64 are checked with."""
    found = [int(w) & 0xFFFFFFFFFFFFFFFF for w in words(1234567, torch.arange(5))]
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_streams_differ_by_seed_role_and_name() -> None:
    starts = {stream(seed, role, name) for seed in (0, 1) for role in ("a", "b") for name in ("x", "y")}
    assert len(starts) == 8


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.q_proj.lora_A.less.weight",
        "module.base_model.model.model.layers.0.q_proj.lora_A.default.weight",
        "_orig_mod.model.layers.0.q_proj.lora_A.default.weight",
    ],
)
def test_canonical_name_of_an_adapter(name: str) -> None:
    assert canonical_name(name) == "model.layers.0.q_proj.lora_A.weight"


def test_canonical_name_of_a_base_layer() -> None:
    assert canonical_name("base_model.model.lm_head.modules_to_save.default.weight") == "lm_head.modules_to_save.weight"
    assert canonical_name("base_model.model.q_proj.base_layer.bias") == "q_proj.bias"


GOLDEN = {
    "sjlt": [83.50931, 90.43896, -55.01291, 102.7426, -86.54987, -51.54808, 134.6331, -31.25412],
    "rademacher": [-68.69542, 5.76292, -107.5156, 5.267946, -64.16994, 77.25142, -38.21912, -128.3045],
    "srht": [10.85409, -47.83577, -88.21157, 8.237794, 73.64517, 53.20979, 47.27009, 58.79593],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_values(kind: str) -> None:
    """Stored features are comparable only as long as these numbers stay."""
    projection = Projection(type=kind, dim=8, seed=3, sparsity=2)
    g = torch.arange(1, sum(SIZES.values()) + 1, dtype=torch.float64)[None] / 10
    found = project(build_projector(projection, SIZES), SIZES, g)[0]
    np.testing.assert_allclose(found[:8].numpy(), GOLDEN[kind], rtol=1e-6)


@pytest.mark.parametrize("kind", LINEAR)
def test_equals_its_matrix(kind: str) -> None:
    projector = build_projector(Projection(type=kind, dim=48, sparsity=3), SIZES)
    g = torch.randn(4, sum(SIZES.values()), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(project(projector, SIZES, g), g @ matrix(projector, SIZES), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, kind: str, block: int) -> None:
    monkeypatch.setattr(Srht, "tile", 32)
    projection = Projection(type=kind, dim=48, sparsity=2)
    g = torch.randn(3, sum(SIZES.values()), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = project(build_projector(projection, SIZES), SIZES, g)
    torch.testing.assert_close(
        project(build_projector(projection, SIZES), SIZES, g, block), whole, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", LINEAR)
def test_parameter_order_does_not_matter(kind: str) -> None:
    projection = Projection(type=kind, dim=48)
    reverse = dict(reversed(SIZES.items()))
    parts = torch.split(torch.randn(3, sum(SIZES.values()), dtype=torch.float64), list(SIZES.values()), dim=1)
    forth = project(build_projector(projection, SIZES), SIZES, torch.cat(parts, dim=1))
    back = project(build_projector(projection, reverse), reverse, torch.cat(parts[::-1], dim=1))
    torch.testing.assert_close(forth, back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "sparsity"), [("sjlt", 1), ("sjlt", 4), *((kind, 1) for kind in RANDOM[1:])])
@pytest.mark.parametrize("dim", [16, 96])
def test_unbiased(monkeypatch: pytest.MonkeyPatch, kind: str, sparsity: int, dim: int) -> None:
    """The mean of R^T R over seeds is the identity, within five standard errors."""
    monkeypatch.setattr(Srht, "tile", 32)
    sizes, seeds = {"w": 40, "v": 20}, 400
    grams = torch.stack(
        [
            (r @ r.t())
            for seed in range(seeds)
            for r in [
                matrix(build_projector(Projection(type=kind, dim=dim, sparsity=sparsity, seed=seed), sizes), sizes)
            ]
        ]
    )
    standard_error = grams.std(dim=0) / math.sqrt(seeds)
    assert ((grams.mean(dim=0) - torch.eye(60)).abs() <= 5 * standard_error + 1e-6).all()


@pytest.mark.parametrize("kind", RANDOM)
def test_error_is_what_theory_says(kind: str) -> None:
    """RMSE of the cosine of random pairs, against 1 / sqrt(K)."""
    size, dim = 20_000, 512
    sizes = {"w": size // 2, "v": size // 2}
    g = torch.randn(60, size, generator=torch.Generator().manual_seed(1)) + torch.randn(1, size) * 0.3
    projector = build_projector(Projection(type=kind, dim=dim, seed=5), sizes)
    exact, found = (torch.nn.functional.normalize(x, dim=1) for x in (g, project(projector, sizes, g)))
    pairs = torch.triu_indices(60, 60, offset=1)
    difference = ((found @ found.t()) - (exact @ exact.t()))[pairs[0], pairs[1]]
    assert float(difference.square().mean().sqrt()) == pytest.approx(1 / math.sqrt(dim), rel=0.15)


def test_sjlt_columns_have_one_entry_in_each_band() -> None:
    entries = matrix(build_projector(Projection(dim=40, sparsity=4), SIZES), SIZES)
    bands = entries.view(-1, 4, 10)
    assert (bands.count_nonzero(dim=2) == 1).all()
    torch.testing.assert_close(bands.abs().amax(dim=2), torch.full((205, 4), 0.5, dtype=torch.float64))


def test_sjlt_folds_into_half_its_dimension() -> None:
    wide, narrow = (matrix(build_projector(Projection(dim=k, seed=7), SIZES), SIZES) for k in (64, 32))
    assert torch.equal(wide.view(-1, 32, 2).sum(dim=2).abs(), narrow.abs())
    assert torch.equal(wide.view(-1, 32, 2).sum(dim=2), narrow)


def test_dense_columns_do_not_depend_on_their_number() -> None:
    wide, narrow = (matrix(build_projector(Projection(type="rademacher", dim=k), SIZES), SIZES) for k in (130, 50))
    torch.testing.assert_close(wide[:, :50] * math.sqrt(130), narrow * math.sqrt(50), rtol=1e-12, atol=0)


def test_srht_keeps_everything_that_fits() -> None:
    r = matrix(build_projector(Projection(type="srht", dim=256), {"w": 100}), {"w": 100})
    torch.testing.assert_close(r @ r.t(), torch.eye(100, dtype=torch.float64))


def test_identity_orders_parameters_by_name() -> None:
    g = torch.arange(205.0)[None]
    found = project(build_projector(Projection(type="identity"), SIZES), SIZES, g)
    assert torch.equal(found, torch.cat([g[:, 70:200], g[:, :70], g[:, 200:]], dim=1))


def test_refuses_impossible_dimensions() -> None:
    with pytest.raises(ConfigError, match="sparsity is 9"):
        build_projector(Projection(dim=8, sparsity=9), SIZES)
    with pytest.raises(ConfigError, match="at most 2097152"):
        build_projector(Projection(dim=1 << 22), SIZES)
