"""The benchmark of storage types measures what it says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.storage import agreement, chosen, errors, folded, speed

pytestmark = pytest.mark.usefixtures("unsynced")


def test_agreement_is_the_share_of_the_best_that_are_the_best_by_both() -> None:
    exact = np.arange(20.0)
    scores = exact.copy()
    scores[[18, 2]] = scores[[2, 18]]
    assert (agreement(scores, exact, 0.05), agreement(scores, exact, 0.1)) == (1, 0.5)


def test_a_common_factor_is_no_error() -> None:
    exact = {"a": np.random.default_rng(0).standard_normal((30, 4)), "b": np.ones((30, 2))}
    factor, error = errors({name: 0.8 * part for name, part in exact.items()}, exact)
    assert factor == pytest.approx(0.8)
    assert error == pytest.approx(0, abs=1e-12)


def test_folded_sketches_have_the_same_inner_products_but_for_noise() -> None:
    rng = np.random.default_rng(0)
    columns, signs = rng.integers(0, 4096, 20_000), rng.choice([-1, 1], 20_000)
    pair = rng.standard_normal((2, 20_000)) + rng.standard_normal(20_000)
    sketches = np.zeros((2, 4096))
    for row, sketch in zip(pair, sketches, strict=True):
        np.add.at(sketch, columns, signs * row)
    for width in (4096, 1024):
        a, b = folded(sketches, width)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert cosine == pytest.approx(0.5, abs=4 / np.sqrt(width))


def test_of_normal_numbers_a_bit_leaves_what_theory_says() -> None:
    rng = np.random.default_rng(0)
    target = rng.standard_normal((3, 8192), np.float32)
    pool = 0.3 * target[:1] + rng.standard_normal((60, 8192), np.float32) * np.linspace(0.5, 2, 60)[:, None]
    vectors = {"pool": pool.astype(np.float32), "target": target}
    assert chosen(vectors, "float32", 8192) == ["1.00 (1.00)"] * 4 + ["1.00", "0.000", "0.000"]
    *shares, factor, both, one = chosen(vectors, "int1", 8192)
    assert float(factor) == pytest.approx(np.sqrt(2 / np.pi), abs=0.02)
    assert 0 < float(one) < float(both)
    assert len(shares) == 4
    size, *rates = speed({name: part[:5] for name, part in vectors.items()}, "int1", 1024)
    assert size == pytest.approx(1024 / 8 + 4 + 17 + 4, abs=8)
    assert min(rates) > 1
