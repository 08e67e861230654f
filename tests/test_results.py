"""What a run leaves for people: the map of its rows, the texts that are kept, and its folder read as tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from dataflex.errors import ConfigError, CorruptionError
from dataflex.features.spec import EmbeddingSpec, GradientSpec, LossSpec, Projection
from dataflex.fingerprint import difference
from dataflex.pipelines.selecting.kept_texts import nearest_targets
from dataflex.redaction import redacted
from dataflex.results import opening, row_map, texts, warned
from dataflex.results.folder import RunFolder
from dataflex.results.names import ABOUT
from tests.run_folders import SOURCES, make_run, rows_of


def test_the_map_has_every_record_once(tmp_path: Path) -> None:
    train, target = rows_of(40), rows_of(5, ("train",), seed=1)
    row_map.write(tmp_path / "rows.parquet", row_map.table(train, {"train": target}, {"held": target}))
    found = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert len(found) == 41 + 6 + 6
    for line, row in zip(found[:40], range(40), strict=True):
        assert line == {
            "role": "train", "set": None, "index": row, "dataset": SOURCES[row % 3], "record": row // 3,
            "row_key": train.keys[row].tobytes(), "tokens": train.length[row], "supervised": train.supervised[row],
            "truncated": bool(train.length[row] > 380), "status": "no_labels" if row % 17 == 16 else "ok",
        }  # fmt: skip
    dropped = {name: None for name in row_map.SCHEMA.names}
    assert found[40] == {**dropped, "role": "train", "dataset": "letters", "record": 40, "status": "dropped"}
    assert [line["role"] for line in found[41:]] == ["target"] * 6 + ["test"] * 6
    assert {line["set"] for line in found[41:]} == {"train", "held"}


def test_all_that_was_chosen_is_kept_where_it_is_little() -> None:
    sources, scores = np.zeros(10, np.int32), np.arange(6.0)
    kept = texts.worth_keeping(9, sources, np.array([3, 1, 3, 7, 2, 1]), scores, None)
    assert kept.tolist() == [1, 2, 3, 7]
    assert texts.worth_keeping(0, sources, np.array([3]), np.zeros(1), np.zeros(10)).tolist() == []


def test_of_many_rows_every_source_and_the_best_and_the_worst_are_kept() -> None:
    draw = np.random.default_rng(0)
    sources = np.repeat([0, 1, 2], [900, 80, 20]).astype(np.int32)
    chosen = draw.permutation(1000)[:800]
    pool = draw.normal(size=1000)
    pool[5] = np.nan
    kept = texts.worth_keeping(60, sources, chosen, pool[chosen], pool)
    assert len(kept) == len(set(kept.tolist())) <= 60 + 25
    for source in range(3):
        own = chosen[sources[chosen] == source]
        best = own[np.argsort(-pool[own])][:10]
        assert set(best.tolist()) & set(kept.tolist())
    best = chosen[np.argsort(-np.nan_to_num(pool[chosen], nan=-np.inf), kind="stable")][:25]
    assert set(best.tolist()) <= set(kept.tolist())
    worst = np.argsort(pool)[:25]  # NaN last
    assert set(worst.tolist()) <= set(kept.tolist())
    assert 5 not in kept or 5 in chosen
    many = np.arange(1000, dtype=np.int32) % 70  # more sources than rows to be kept
    assert len(texts.worth_keeping(20, many, chosen, pool[chosen], None)) == 20
    assert len(texts.worth_keeping(20, many, chosen, pool[chosen], np.full(1000, np.nan))) == 20


def test_a_text_is_cut_and_says_so(tmp_path: Path) -> None:
    rows = rows_of(3)
    long = rows.text(0)._replace(prompt="x" * 5000)
    texts.write(tmp_path / "t.parquet", replace(rows, text=lambda row: long), {}, np.array([1]), None)
    (line,) = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert len(line["prompt"]) == texts.LONGEST
    assert line["prompt"].startswith("be brief\nxxx")
    assert line["prompt"].endswith("x…")
    assert line["nearest"] is None


@dataclass
class Given:
    """A feature of rows, given as vectors; NaN where a row is not usable."""

    vectors: np.ndarray

    def take(self, rows: np.ndarray) -> Any:
        return Given(self.vectors[rows])

    def blocks(self, size: int = 3, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        usable = np.flatnonzero(np.isfinite(self.vectors).all(axis=1))[::-1]
        for begin in range(0, len(usable), size):
            yield usable[begin : begin + size], self.vectors[usable[begin : begin + size]]


def test_the_nearest_targets_are_those_of_a_loop() -> None:
    draw = np.random.default_rng(3)
    train = draw.normal(size=(12, 5)).astype(np.float32)
    train[4], train[7] = 0, np.nan
    sets = {"one": draw.normal(size=(4, 5)).astype(np.float32), "two": draw.normal(size=(7, 5)).astype(np.float32)}
    sets["two"][2], sets["two"][3] = 0, sets["two"][1]  # without a direction; twins
    step, plain = GradientSpec(direction="adam"), GradientSpec()
    views: Any = {(step, None, None): Given(train)}
    views |= {(plain, name, None): Given(vectors) for name, vectors in sets.items()}
    views |= {(LossSpec(), None, None): Given(train), (plain, "one", "elsewhere"): Given(train)}
    kept = np.array([0, 3, 4, 7, 11])
    near = nearest_targets(kept, views)
    assert near is not None
    assert sorted(near.rows.tolist()) == [0, 3, 11]
    for row, lines in near.of().items():
        expected = []
        for number, (name, vectors) in enumerate(sets.items()):
            for index, vector in enumerate(vectors.astype(np.float64)):
                if vector.any():
                    own = train[row].astype(np.float64)
                    cosine = own @ vector / np.sqrt(own @ own) / np.sqrt(vector @ vector)
                    expected.append((-cosine, number, index, name))
        best = [(name, index) for _, _, index, name in sorted(expected)[:3]]
        assert [(line["set"], line["index"]) for line in lines] == best
        assert [line["cosine"] for line in lines] == pytest.approx([-c for c, *_ in sorted(expected)[:3]], abs=1e-6)


def test_what_cannot_be_compared_has_no_nearest_target() -> None:
    some: Any = Given(np.ones((3, 2), np.float32))
    one, other = EmbeddingSpec(), GradientSpec(projection=Projection(dim=64))
    rows = np.arange(3)
    assert nearest_targets(rows, {(one, None, None): some}) is None
    assert nearest_targets(rows, {(one, None, None): some, (other, "t", None): some}) is None
    assert nearest_targets(rows, {(other, None, "a"): some, (other, "t", "b"): some}) is None
    assert nearest_targets(rows, {(other, None, None): some, (GradientSpec(), "t", None): some}) is None
    nothing: Any = Given(np.full((3, 2), np.nan, np.float32))
    assert nearest_targets(rows, {(one, None, None): nothing, (one, "t", None): some}) is None
    assert nearest_targets(rows, {(one, None, None): some, (one, "t", None): nothing}) is None


def test_a_folder_is_read_as_tables(tmp_path: Path) -> None:
    rows = rows_of(60)
    run = RunFolder(make_run(tmp_path / "run", rows))
    table = run.rounds()
    assert len(table) == 4 * 24
    assert table.column_names[:4] == ["round", "kind", "first_step", "position"]
    assert pc.unique(table["kind"]).to_pylist() == ["warmup", "update"]
    assert run.losses().to_pylist()[-1] == {"step": 16, "loss": 0.75, "eval_loss": 2.0, "learning_rate": 1e-4}
    assert [each.name for each in run.recorded] == ["warm-up", "update 1", "update 2", "update 3"]
    assert run.rows is not None
    of_round = run.round(2).rows.to_pylist()
    index = {line["index"]: line for line in run.rows.to_pylist() if line["role"] == "train"}
    for line in of_round:
        assert all(line[name] == index[line["index"]][name] for name in ("dataset", "record", "row_key", "tokens"))
    said = run.texts(2).to_pylist()
    assert {line["index"] for line in of_round} <= {line["index"] for line in said if line["set"] is None}
    assert {(line["set"], line["index"]) for line in said if line["set"]} == {("target", 4), ("target", 1)}


def test_what_was_done_again_counts_once(tmp_path: Path) -> None:
    """A training that went on from a checkpoint has logged some steps, and set some shares, twice."""
    (tmp_path / "trainer_log.jsonl").write_text(
        '{"current_steps": 1, "loss": 3.0}\n{"current_steps": 2, "loss": 9.0}\n{"current_steps": 2, "loss": 2.0}\n'
        '{"current_steps": 2, "dataflex/overlap": 0.5}\n{"current_steps": 3, "lo'
    )
    lines: list[dict[str, Any]] = [
        {"step": 0, "proportions": {"a": 0.5, "b": 0.5}}, {"step": 2, "proportions": {"a": 0.9, "b": 0.1}},
        {"step": 4, "proportions": {"a": 1.0, "b": 0.0}}, {"resumed": 2},
        {"step": 2, "proportions": {"a": 0.8, "b": 0.2}, "loss": {"a": None, "b": 1}},
    ]  # fmt: skip
    (tmp_path / "mixture.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = RunFolder(tmp_path)
    assert run.losses()["loss"].to_pylist() == [3.0, 2.0]
    assert run.log[1]["dataflex/overlap"] == 0.5
    found = [(line["step"], line["domain"], line["name"], line["value"]) for line in run.shares().to_pylist()]
    assert found == [
        (0, "a", "proportions", 0.5), (0, "b", "proportions", 0.5),
        (2, "a", "proportions", 0.8), (2, "b", "proportions", 0.2), (2, "b", "loss", 1.0),
    ]  # fmt: skip


def test_what_is_no_run_or_is_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; expected the output_dir"):
        RunFolder(tmp_path / "none")
    with pytest.raises(ConfigError, match="a folder without a run"):
        RunFolder(tmp_path)
    folder = make_run(tmp_path / "run", rows_of(20), chosen=4)
    with pytest.raises(ConfigError, match="no round 9; expected one of: 0, 1, 2, 3"):
        RunFolder(folder).round(9)
    path = folder / "rounds" / "round-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    (folder / ABOUT).write_text("{")
    for read in (lambda run: run.round(1), lambda run: run.about):
        with pytest.raises(CorruptionError, match="not readable"):
            read(RunFolder(folder))


def test_warnings_are_kept_each_once(tmp_path: Path) -> None:
    log = logging.getLogger("dataflex.some.part")
    (tmp_path / "rounds").mkdir()
    for said, step in (("first", 0), ("second", 3), ("refused", None)):
        with opening.beginning(), warned.kept(tmp_path):
            log.info("nothing")
            log.warning("%s of https://me:word@host/?api_key=123&page=2\nof two lines", said)
            log.warning("%s of https://me:word@host/?api_key=123&page=2\nof two lines", said)
            if step is not None:
                opening.step_begins(step)
                log.warning("later")
        log.warning("outside")
    address = "https://(not shown)@host/?api_key=(not shown)&page=2"
    assert RunFolder(tmp_path).warnings == [f"second of {address}\nof two lines", "later"]


def test_what_may_be_a_secret_is_hidden_whatever_its_form() -> None:
    given = {
        "api_key": "sk", "password": 12345, "credentials": {"user": "me", "word": "x"}, "api_keys": ["a", "b"],
        "headers": {"Authorization": "Bearer x"}, "auth": "x", "hf_hub_token": "hf", "passwd": "x",
        "store": "s3://KEY:SECRET@bucket/x", "base_url": "https://h/v1?api_key=123&a=b", "max_new_tokens": 512,
        "test_tokens": 3, "pad_token": "<pad>", "tokens": 7, "row_key": "00", "empty_token": "", "use_auth": True,
        "list": [{"token": "x"}],
    }  # fmt: skip
    found = redacted(given)
    hidden = "(not shown)"
    assert {name for name, value in found.items() if value == hidden} == {
        "api_key", "password", "credentials", "headers", "auth", "hf_hub_token", "passwd", "api_keys",
    }  # fmt: skip
    assert found["store"] == f"s3://{hidden}@bucket/x"
    assert found["base_url"] == f"https://h/v1?api_key={hidden}&a=b"
    same = ("max_new_tokens", "test_tokens", "pad_token", "tokens", "row_key", "empty_token", "use_auth")
    assert all(found[name] == given[name] for name in same)
    assert found["list"] == [{"token": hidden}]
    said = difference({"params": {"api_key": "new"}}, {"params": {"api_key": "old"}})
    assert said == [f"params.api_key: {hidden} → {hidden}"]
