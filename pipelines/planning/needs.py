"""What a run asks of the stores, feature by feature, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dataflex.features.spec import FeatureSpec


@dataclass
class Need:
    """One feature of some rows at one state, as it stands before the run.

    Attributes:
        feature: for people.
        spec: what determines its values, but for the state.
        of: the training rows, or a target set by name.
        state: base, initial, the folder of a checkpoint, or live.
        update: numbers of the updates that ask for it, from 1; empty: before the first step.
        store: the folder that it has, or will have, under the root; None where that depends on a state nobody knows.
        rows: distinct rows asked for, over all updates.
        present: of them, those that a store has, or that an earlier ask of this run will have brought about.
        missing: the others, which are computed.
        bytes: of the values that are written.
        files: bytes of the files that they are written to.
    """

    feature: str
    spec: dict[str, Any]
    of: str
    state: str
    store: str | None
    update: list[int] = field(default_factory=list)
    rows: int = 0
    present: int = 0
    missing: int = 0
    bytes: int = 0
    files: int = 0


@dataclass
class Pass:
    """Rows that go through a model once, for the features that they lack.

    Attributes:
        specs: these features.
        of: the training rows, or a target set by name.
        update: from 1; None: before the first step.
        times: updates at which it is made, the first of them `update`.
        rows: forward passes.
        backward: backward passes.
        tokens: of the rows.
        batches: that they make.
        responses: that a policy gradient has written and judged, at most; each is one backward pass.
    """

    specs: tuple[FeatureSpec, ...]
    of: str
    update: int | None
    times: int = 1
    rows: int = 0
    backward: int = 0
    tokens: int = 0
    batches: int = 0
    responses: int = 0


@dataclass
class Count:
    """What asks come to, as `dataflex_summary.json` counts it after the run: distinct rows, summed over features."""

    needs: list[Need] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    computed: int = 0
    reused: int = 0
    bytes: int = 0
    files: int = 0
    gradients: int = 0
    tokens: int = 0
    batches: int = 0

    def totals(self) -> dict[str, int]:
        """Return the sums."""
        names = ("computed", "reused", "bytes", "files", "gradients", "tokens", "batches")
        forward = sum(each.rows for each in self.passes)
        return {**{name: getattr(self, name) for name in names}, "forward": forward}


def joined(needs: Sequence[Need]) -> list[Need]:
    """Join what is asked at several updates and stands alike: all of it is there, or nothing, or it is one store's."""
    found: dict[tuple[Any, ...], Need] = {}
    for need in needs:
        alike = "one" if need.present and need.missing else "there" if need.present else "missing"
        named = need.store if need.state != "live" else None
        key = (repr(need.spec), need.of, need.state, alike, named, *need.update[: alike == "one"])
        if key not in found:
            found[key] = need
            continue
        before = found[key]
        before.update += need.update
        before.store = before.store if before.store == need.store else None
        for name in ("rows", "present", "missing", "bytes", "files"):
            setattr(before, name, getattr(before, name) + getattr(need, name))
    return list(found.values())


def together(passes: Sequence[Pass]) -> list[Pass]:
    """Add up passes for the same features of the same rows."""
    found: dict[tuple[Any, ...], Pass] = {}
    for one in passes:
        before = found.get((one.specs, one.of))
        if before is None:
            found[one.specs, one.of] = replace(one)
            continue
        for name in ("times", "rows", "backward", "tokens", "batches", "responses"):
            setattr(before, name, getattr(before, name) + getattr(one, name))
    return list(found.values())
