"""LESS chooses what a plain reference chooses, and its choice changes with nothing that it should not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dataflex.errors import ConfigError, CoverageError
from dataflex.features.spec import FeatureSpec, GradientSpec
from dataflex.rows import Status
from dataflex.selectors.less import Less
from dataflex.selectors.parts.checkpoints import checkpoint_weights
from tests.held import Held, context, pool


def chosen(
    train: Mapping[Any, Held], targets: Mapping[str, Mapping[Any, Held]], k: int, **params: object
) -> tuple[list[int], np.ndarray]:
    less = Less(Less.Params.model_validate({"gradient_type": "adam"} | params))
    size = len(next(iter(train.values())).status)

    def features(spec: FeatureSpec, target: str | None = None, state: str | None = None) -> Held:
        assert (spec.direction == "adam") == (target is None)  # type: ignore[union-attr]
        return train[state] if target is None else targets[target][state]

    rows = pool(size)
    selection = less.select(None, 4, k, context=context(rows, list(targets), features))
    assert selection.pool is not None
    return selection.rows.tolist(), selection.pool


def plain(train: list[np.ndarray], targets: list[list[np.ndarray]], weights: list[float]) -> np.ndarray:
    """Loop over rows, sets, target rows and checkpoints, as the paper writes it."""
    scores = []
    for i in range(len(train[0])):
        per_set = []
        for j in range(len(targets[0])):
            means = []
            for q in range(len(targets[0][j])):
                total = 0.0
                for c, weight in enumerate(weights):
                    a, b = train[c][i], targets[c][j][q]
                    total += weight * float(a @ b) / (np.sqrt(float(a @ a)) * np.sqrt(float(b @ b)))
                means.append(total)
            per_set.append(sum(means) / len(means))
        scores.append(max(per_set))
    return np.array(scores)


def test_scores_equal_the_plain_reference_over_checkpoints_and_ragged_sets() -> None:
    rng = np.random.default_rng(0)
    names = ["a", "b"]
    train = {c: Held(rng.normal(size=(17, 6))) for c in names}
    targets = {t: {c: Held(rng.normal(size=(n, 6))) for c in names} for t, n in (("x", 3), ("y", 5))}
    rows, scores = chosen(train, targets, 5, checkpoints=("a", "b"), weights=(3.0, 1.0))
    expected = plain(
        [train[c].vectors for c in names], [[targets[t][c].vectors for t in targets] for c in names], [0.75, 0.25]
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-7)
    assert rows == sorted(range(17), key=lambda i: -expected[i])[:5]


def test_best_set_mean_of_sets_and_best_row_choose_differently() -> None:
    # One axis per target row; a row's cosine to it is its coordinate.
    eye = np.eye(5)
    sets = {"x": {None: Held(eye[:2])}, "y": {None: Held(eye[2:4])}}

    def row(*c: float) -> list[float]:
        return [*c, float(np.sqrt(1 - sum(v * v for v in c)))]

    pool_ = Held(np.array([row(0.6, 0.6, 0, 0), row(0.45, 0.45, 0.45, 0.45), row(0.95, 0, 0.1, 0)]))
    assert chosen({None: pool_}, sets, 1, aggregation="max")[0] == [0]
    assert chosen({None: pool_}, sets, 1, aggregation="mean")[0] == [1]
    assert chosen({None: pool_}, sets, 3, aggregation="round_robin")[0] == [0, 1, 2]


def test_unusable_rows_are_never_chosen() -> None:
    vectors = np.tile([1.0, 0.0], (6, 1))
    vectors[1] = 0  # of zero length: its cosine would outrank every negative one
    vectors[4:] = [-1.0, 0.1]
    status = np.array([Status.NO_LABELS, Status.OK, Status.NONFINITE, Status.OK, Status.OK, Status.OK], np.uint8)
    targets = {"x": {None: Held(np.array([[1.0, 0.0]]))}}
    rows, scores = chosen({None: Held(vectors, status)}, targets, 3)
    assert rows[0] == 3
    assert set(rows[1:]) == {4, 5}
    assert not np.isfinite(scores[:3]).any()
    with pytest.raises(CoverageError):
        chosen({None: Held(vectors, status)}, targets, 4)


def test_scale_order_and_constant_weights_do_not_matter() -> None:
    rng = np.random.default_rng(3)
    train, target = rng.normal(size=(30, 8)), rng.normal(size=(4, 8))
    base = chosen({"c": Held(train)}, {"x": {"c": Held(target)}}, 7, checkpoints=("c",), weights=(1.0,))[0]
    scaled = target * np.array([[1.0], [50.0], [1e-3], [2.0]])
    assert chosen({"c": Held(train)}, {"x": {"c": Held(scaled)}}, 7, checkpoints=("c",), weights=(9.0,))[0] == base
    assert (
        chosen({"c": Held(train)}, {"x": {"c": Held(target[::-1])}}, 7, checkpoints=("c",), weights=(1.0,))[0] == base
    )


def test_a_target_set_without_usable_rows_and_no_target_are_errors() -> None:
    train = {None: Held(np.ones((3, 2)))}
    with pytest.raises(CoverageError, match="target set x"):
        chosen(train, {"x": {None: Held(np.zeros((2, 2)))}}, 1)
    with pytest.raises(ConfigError, match="eval_dataset"):
        chosen(train, {}, 1)


def test_weights_are_mean_learning_rates_of_each_span(tmp_path: Path) -> None:
    for step, rates in ((2, [4.0, 2.0]), (4, [1.0, 1.0])):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        history = [{"step": s, "learning_rate": r} for s, r in zip(range(1, 5), [4.0, 2.0, *rates], strict=False)]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history[:step]}))
    folders = [str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-4")]
    np.testing.assert_allclose(checkpoint_weights(folders, None), [0.75, 0.25])
    with pytest.raises(ConfigError, match="in the order of their steps"):
        checkpoint_weights(folders[::-1], None)
    with pytest.raises(ValidationError, match="as many weights as checkpoints"):
        Less.Params.model_validate({"checkpoints": folders, "weights": [1.0]})


def test_unknown_parameters_are_errors() -> None:
    with pytest.raises(ValidationError, match="proj_dimm"):
        Less.Params.model_validate({"proj_dimm": 3})


def test_the_targets_direction_is_adams_without_momentum() -> None:
    specs = {
        name: Less.Params.model_validate({"projection": "rademacher", "proj_dim": 64, **params})
        for name, params in {
            "default": {},
            "both": {"target_direction": "precond_only"},
            "targets": {"target_direction": "precond_only", "gradient_type": "sgd"},
        }.items()
    }
    projection = specs["default"].target_spec.projection
    stepped = GradientSpec(direction="adam", adam_variant="precond_only", projection=projection)
    assert specs["default"].target_spec == GradientSpec(direction="sgd", projection=projection)
    assert specs["both"].target_spec == specs["targets"].target_spec == stepped
    assert specs["both"].train_spec == specs["default"].train_spec
    assert specs["targets"].train_spec == GradientSpec(direction="sgd", projection=projection)
    needs = Less(specs["targets"]).needs()
    assert [(need.of, need.spec.needs_moments) for need in needs] == [("train", False), ("targets", True)]
