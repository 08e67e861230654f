"""LESS with target rows in turn chooses what plain loops choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dataflex.errors import CoverageError
from dataflex.features.spec import FeatureSpec
from dataflex.results.folder import RunFolder
from dataflex.rows import KEY_DTYPE, Rows, Status
from dataflex.selectors.base import Beginning
from dataflex.selectors.less import Less
from dataflex.stores.root import StoreRoot
from tests.held import Held, context, pool

SIZE, WIDTH = 40, 6
STATES = ("a", "b")
WEIGHTS = (0.75, 0.25)
Sets = Mapping[str, Sequence[Held]]


def plain(
    train: Sequence[Held], sets: Sets, weights: Sequence[float], rows: Rows, k: int, similarity: str
) -> list[int]:
    """Loop over turns: of what is left, the target row's best; by (similarity, key, position)."""

    def value(i: int, name: str, q: int) -> float:
        total = 0.0
        for state, weight in enumerate(weights):
            a = train[state].vectors[i].astype(np.float64)
            b = sets[name][state].vectors[q].astype(np.float64)
            product = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
            if similarity == "cosine":
                product /= float(np.sqrt((a * a).sum()) * np.sqrt((b * b).sum()))
            if similarity == "l2":
                product = -sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))
            total += weight * product
        return total

    def speaks(views: Sequence[Held], at: int) -> bool:
        return all(
            v.status[at] == Status.OK and np.isfinite(v.vectors[at]).all() and v.vectors[at].any() for v in views
        )

    turns = []
    for number, name in enumerate(sets):
        speakers = [q for q in range(len(sets[name][0].status)) if speaks(sets[name], q)]
        turns += [(place, number, name, q) for place, q in enumerate(speakers)]
    turns.sort()
    able = [i for i in range(len(rows)) if speaks(train, i)]
    chosen: list[int] = []
    while len(chosen) < k:
        _, _, name, q = turns[len(chosen) % len(turns)]
        left = [i for i in able if i not in chosen]
        chosen.append(min(left, key=lambda i: (-value(i, name, q), bytes(rows.keys[i]), i)))
    return chosen


def choose(train: Sequence[Held], sets: Sets, rows: Rows, k: int, **params: Any) -> Any:
    """Let LESS choose, of the live model or of as many checkpoints as there are weights."""
    states = STATES if len(train) > 1 else (None,)
    given = {"checkpoints": STATES, "weights": WEIGHTS} if len(train) > 1 else {}
    more = {"aggregation": "round_robin", "over": "rows"}
    less = Less(Less.Params.model_validate(more | given | params))

    def features(spec: FeatureSpec, target: str | None = None, state: str | None = None) -> Held:
        return (train if target is None else sets[target])[states.index(state)]

    return less.select(None, 4, k, context=context(rows, list(sets), features))


def broken(states: int, seed: int = 0) -> tuple[list[Held], dict[str, list[Held]]]:
    """A pool with duplicates, and on both sides rows of NaN, of zeros, and without labels; some at one state alone."""
    rng = np.random.default_rng(seed)
    train, x, y = [], [], []
    for state in range(states):
        vectors = rng.standard_normal((SIZE, WIDTH))
        vectors[1], vectors[2], vectors[3 + state] = np.nan, 0, 0
        vectors[30:33] = vectors[29]
        status = np.where(np.arange(SIZE) == 7, Status.NO_LABELS, Status.OK).astype(np.uint8)
        train.append(Held(vectors, status))
        queries = rng.standard_normal((5, WIDTH))
        queries[1 + state], queries[4] = 0, np.inf
        x.append(Held(queries))
        y.append(Held(rng.standard_normal((2, WIDTH))))
    return train, {"x": x, "y": y}


def with_duplicates() -> Rows:
    rows = pool(SIZE)
    keys = rows.keys.copy()
    keys[30:33] = keys[29]
    return replace(rows, keys=keys)


@pytest.mark.parametrize("similarity", ["cosine", "inner_product", "l2"])
@pytest.mark.parametrize("states", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 35])
def test_equals_a_plain_loop(similarity: str, states: int, k: int) -> None:
    train, sets = broken(states)
    rows, weights = with_duplicates(), WEIGHTS if states > 1 else (1.0,)
    found = choose(train, sets, rows, k, similarity=similarity)
    assert found.rows.tolist() == plain(train, sets, weights, rows, k, similarity)
    assert len(set(found.rows.tolist())) == k
    unable = {1, 2, 7, *(3 + state for state in range(states))}
    assert set(np.flatnonzero(~np.isfinite(found.pool))) == unable
    np.testing.assert_array_equal(found.scores, found.pool[found.rows])


def test_more_rows_than_can_be_chosen_are_refused() -> None:
    train, sets = broken(2)
    assert len(choose(train, sets, with_duplicates(), 35).rows) == 35
    with pytest.raises(CoverageError, match="36 rows wanted at one update, found 35 that can be chosen of 40"):
        choose(train, sets, with_duplicates(), 36)
    silent = {**sets, "z": [Held(np.eye(2, WIDTH)[:, ::-1] * [[0], [1]]), Held(np.eye(2, WIDTH) * [[1], [0]])]}
    with pytest.raises(CoverageError, match=r"target set z: found no row .* at every one of 2 model states"):
        choose(train, silent, with_duplicates(), 1)


def test_the_sum_over_checkpoints_comes_before_the_turn() -> None:
    # Row 0 is best at one state, row 1 at the other, row 2 best in the sum.
    eye = np.eye(3)
    first, second = (
        np.array([[1, 0, 0], [-1, 0.1, 0], [0.9, 0.4, 0]]),
        np.array([[-1, 0.1, 0], [1, 0, 0], [0.9, 0.4, 0]]),
    )
    sets = {"x": [Held(eye[:1]), Held(eye[:1])]}
    assert choose([Held(first), Held(second)], sets, pool(3), 1, weights=(0.5, 0.5)).rows.tolist() == [2]


def test_ties_go_by_key_then_position() -> None:
    rows = pool(6)
    vectors = np.tile([2.0, 0, 0, 0], (6, 1)) * 2.0 ** np.arange(6)[:, None]  # one direction, exactly
    sets = {"x": [Held(np.eye(4)[:2])]}
    expected = sorted(range(6), key=lambda i: (bytes(rows.keys[i]), i))
    assert choose([Held(vectors)], sets, rows, 6).rows.tolist() == expected


def test_few_rows_are_heard_of_every_set() -> None:
    """With more targets than rows the first row of each set has its turn, not the first set alone."""
    eye = np.eye(6)
    sets = {"x": [Held(eye[:3])], "y": [Held(eye[3:])]}
    assert choose([Held(eye)], sets, pool(6), 2).rows.tolist() == [0, 3]
    assert choose([Held(eye)], sets, pool(6), 5).rows.tolist() == [0, 3, 1, 4, 2]


@pytest.mark.parametrize(("largest", "is_told"), [(4, True), (5, False), (0, False)])
def test_targets_that_never_have_a_turn_are_told(caplog: Any, largest: int, is_told: bool) -> None:
    less = Less(Less.Params.model_validate({"aggregation": "round_robin", "over": "rows"}))
    less.prepare(Beginning(pool(9), {"x": pool(2), "y": pool(3)}, largest, lambda spec: 4))
    assert ("5 target rows, and at most 4 rows at one update" in caplog.text) == is_told


def test_a_taken_row_costs_its_target_no_turn() -> None:
    """Both target rows like row 0 best; the second takes its next best at once."""
    train = Held(np.array([[1, 1, 0], [0.1, 1, 0.5], [1, 0.1, 0.5], [0, 0, 1]]))
    sets = {"x": [Held(np.array([[1.0, 0.9, 0], [0.9, 1.0, 0]]))]}
    assert choose([train], sets, pool(4), 3).rows.tolist() == [0, 1, 2]


def test_rows_and_sets_in_turn_differ() -> None:
    train, sets = broken(1)
    assert (
        choose(train, sets, pool(SIZE), 8, over="sets").rows.tolist()
        != choose(train, sets, pool(SIZE), 8).rows.tolist()
    )
    one = {"x": [sets["y"][0].take(np.array([0]))], "y": [sets["y"][0].take(np.array([1]))]}  # sets of a row each
    assert (
        choose(train, one, pool(SIZE), 8, over="sets").rows.tolist() == choose(train, one, pool(SIZE), 8).rows.tolist()
    )


def test_few_candidates_are_held_and_none_is_lost() -> None:
    """Every prefix is the choice for a smaller k, so what is forgotten beyond the k best was never needed."""
    train, sets = broken(1, seed=4)
    whole = choose(train, sets, pool(SIZE), 36).rows.tolist()
    for k in (1, 2, 5, 11, 20):
        assert choose(train, sets, pool(SIZE), k).rows.tolist() == whole[:k]


def test_whitened_rows_take_turns_by_the_whitened_cosine() -> None:
    train, sets = broken(1)
    vectors = train[0].vectors.astype(np.float64)
    able = [i for i in range(SIZE) if i not in (1, 2, 3, 7)]
    mean = vectors[able].mean(axis=0)
    covariance = sum(np.outer(v - mean, v - mean) for v in vectors[able]) / len(able)
    factor = np.linalg.cholesky(covariance + 0.5 * np.trace(covariance) / WIDTH * np.eye(WIDTH))

    def mapped(held: Held) -> Held:
        fine = np.asarray(np.isfinite(held.vectors).all(axis=1) & held.vectors.any(axis=1))
        moved = np.linalg.solve(factor, (held.vectors.astype(np.float64) - mean).T).T
        return Held(np.where(fine[:, None], moved, 0), held.status)

    clear = {name: [mapped(held) for held in views] for name, views in sets.items()}
    expected = plain([mapped(train[0])], clear, (1.0,), pool(SIZE), 20, "cosine")
    assert (
        choose(train, sets, pool(SIZE), 20, similarity="whitened_cosine", ridge=0.5, proj_dim=64).rows.tolist()
        == expected
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_over_checkpoints_chooses_what_its_stores_say(workspace: Any, whole: Any) -> None:
    """Two sets, two checkpoints, each with the moments of its own; targets stepped without momentum."""
    from dataflex.features.adam import Moments

    folders = [whole.folder / "out" / "whole" / f"checkpoint-{step}" for step in (3, 7)]
    params = {"proj_dim": 256, "aggregation": "round_robin", "over": "rows", "target_direction": "precond_only"}
    params |= {"checkpoints": [str(folder) for folder in folders], "weights": list(WEIGHTS)}
    section = {"store": str(workspace.folder / "store"), "params": params}
    names = workspace.tiny.targets[:2]
    keys = {"save_strategy": "no", "update_times": 1, "eval_dataset": ",".join(names)}
    workspace.run("train", workspace.write("run", dataflex=section, **keys))
    recipes = {store: store.recipe for store in StoreRoot(workspace.folder / "store").stores()}
    stores = {(r["feature"]["adam_variant"], r["optimizer"]["adam"]): store for store, r in recipes.items()}
    digests = [Moments.load(folder / "dataflex" / "moments.safetensors").digest() for folder in folders]
    recorded = RunFolder(workspace.folder / "out" / "run").rows
    assert recorded is not None
    able = [row for row in recorded.to_pylist() if row["status"] == "ok"]

    def keys_of(name: str | None) -> np.ndarray:
        return np.frombuffer(b"".join(row["row_key"] for row in able if row["set"] == name), KEY_DTYPE)

    def read(variant: str, name: str | None) -> list[Held]:
        values = [stores[variant, digest].read(keys_of(name)) for digest in digests]
        return [Held(each.vectors, each.status) for each in values]

    train, sets = read("pytorch", None), {name: read("precond_only", name) for name in names}
    expected = plain(train, sets, WEIGHTS, replace(pool(len(keys_of(None))), keys=keys_of(None)), 8, "cosine")
    positions = [row["index"] for row in able if row["set"] is None]
    assert sorted(workspace.rounds("run")[1]) == sorted(positions[i] for i in expected)
