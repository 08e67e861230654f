"""`dataflex.read_run` gives what a run chose as tables and data sets, joined with the user's own records."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

import dataflex
from dataflex.errors import ConfigError, DataflexError, MismatchError
from dataflex.results import row_map
from tests.run_folders import SOURCES, make_run, rows_of


@pytest.fixture(scope="module")
def pool(tiny: Any) -> Dataset:
    return Dataset.from_list(json.loads((tiny.dataset_dir / "pool.json").read_text("utf-8")))


@pytest.fixture(scope="module")
def read(whole: Any) -> dataflex.RunResults:
    return dataflex.read_run(whole.folder / "out" / "whole")


def raw(read: dataflex.RunResults, number: int) -> pa.Table:
    return pq.read_table(read.path / "rounds" / f"round-{number:05d}.parquet")


def test_scores_are_those_of_the_round_for_every_row(read: dataflex.RunResults) -> None:
    assert "less, " in repr(read)
    assert repr(read).endswith("3 rounds)")
    for number in (1, 2):
        found, chosen = read.scores(number), raw(read, number)
        assert found["index"].to_pylist() == list(range(62))
        assert found["record"].to_pylist() == [*range(61), 62]  # 61 was dropped
        assert found["score"].null_count == 0
        by_index = dict(zip(found["index"].to_pylist(), found["score"].to_pylist(), strict=True))
        assert [by_index[i] for i in chosen["index"].to_pylist()] == chosen["score"].to_pylist()
        counts = np.bincount(chosen["index"].to_numpy(), minlength=62)
        assert found["chosen"].to_pylist() == counts.tolist()
        threshold = min(chosen["score"].to_pylist())
        left = found["score"].to_numpy()[counts == 0]
        assert (left <= threshold + 1e-6).all()  # LESS takes the best
    assert read.scores() == read.scores(2)
    warm = read.scores(0)
    assert warm["score"].null_count == 62
    assert sum(warm["chosen"].to_pylist()) == 12
    with pytest.raises(ConfigError, match="found no round 9; expected one of: 0, 1, 2"):
        read.scores(9)


def test_a_data_set_gets_what_the_run_knows_of_each_record(read: dataflex.RunResults, pool: Dataset) -> None:
    joined = read.join(pool, "pool")
    assert joined.column_names == [*pool.column_names, "row_key", "status", "score", "chosen"]
    assert joined.select_columns(pool.column_names).to_list() == pool.to_list()
    trained = [row for number in (0, 1, 2) for row in raw(read, number)["record"].to_pylist()]
    assert joined["chosen"][:] == np.bincount(trained, minlength=63).tolist()
    assert joined["status"][60:] == ["ok", "dropped", "ok"]
    assert (joined[61]["row_key"], joined[61]["score"]) == (None, None)
    scores = read.scores()
    assert joined["score"][:61] == scores["score"].to_pylist()[:61]
    assert joined["row_key"][62] == scores["row_key"][61].as_py()
    assert joined[60]["row_key"] == joined[0]["row_key"]  # the duplicate
    one = read.join(pool, round=1, prefix="df_")
    assert one["df_chosen"][:] == np.bincount(raw(read, 1)["record"].to_pylist(), minlength=63).tolist()
    targets = Dataset.from_dict({"n": list(range(8))})
    known = read.join(targets, "target_arithmetic", role="target")
    assert known.column_names == ["n", "row_key", "status"]
    assert known["status"][:] == ["ok"] * 8
    longer = read.join(Dataset.from_list([*pool.to_list(), pool[0]]))
    assert (longer[63]["status"], longer[63]["chosen"]) == (None, 0)


def test_the_choice_is_a_data_set_in_the_order_of_training(
    read: dataflex.RunResults, pool: Dataset, tmp_path: Path
) -> None:
    found = read.chosen(pool, parquet=tmp_path / "new" / "chosen.parquet")
    parts = [raw(read, 1), raw(read, 2)]
    records = [row for part in parts for row in part["record"].to_pylist()]
    assert found["id"][:] == [pool[row]["id"] for row in records]
    assert found["round"][:] == [1] * 8 + [2] * 8
    assert found["score"][:] == [score for part in parts for score in part["score"].to_pylist()]
    assert pq.read_table(tmp_path / "new" / "chosen.parquet")["id"].to_pylist() == found["id"][:]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["chosen.parquet"]
    assert read.chosen(pool, round=0)["id"][:] == [pool[row]["id"] for row in raw(read, 0)["record"].to_pylist()]


def test_a_store_is_joined_with_the_data(read: dataflex.RunResults, whole: Any) -> None:
    assert {store.name for store in read.stores()} == {
        path.name for path in (whole.folder / "store").iterdir() if (path / "recipe.json").is_file()
    }
    train, target = read.stores(round=2)
    assert (train.recipe["feature"]["direction"], target.recipe["feature"]["direction"]) == ("adam", "sgd")
    assert (len(train), len(target)) == (61, 8)
    rows = read.rows
    assert rows is not None
    found = train.to_numpy(rows=rows["row_key"], missing="nan")["status"].tolist()
    assert found == ["ok"] * 62 + ["missing"] * 9  # the one dropped, and eight targets
    keys = read.scores()["row_key"]
    vectors, targets = train.to_numpy(rows=keys)["vector"], target.to_numpy()["vector"]
    cosine = (vectors / np.linalg.norm(vectors, axis=1)[:, None]) @ (
        targets / np.linalg.norm(targets, axis=1)[:, None]
    ).mean(axis=0)
    # As LESS scored them at the same update, up to the direction of the targets' mean.
    assert np.corrcoef(cosine, read.scores(2)["score"].to_numpy())[0, 1] > 0.9


def test_what_does_not_fit_is_refused(read: dataflex.RunResults, pool: Dataset, tmp_path: Path) -> None:
    short = pool.select(range(40))
    for call in (read.join, read.chosen):
        with pytest.raises(MismatchError, match="data set pool: found 40 records; expected at least 63"):
            call(short)
        with pytest.raises(ConfigError, match="name: found 'pol'; expected one of the run's train data: pool"):
            call(pool, "pol")
        with pytest.raises(ConfigError, match=r"found datasets\.DatasetDict; expected a datasets\.Dataset"):
            call(DatasetDict({"train": pool}))
        with pytest.raises(ConfigError, match="found columns score, which would be added"):
            call(pool.rename_column("source", "score"))
    with pytest.raises(ConfigError, match="role: found 'eval'; expected one of train, target, test"):
        read.join(pool, role="eval")
    with pytest.raises(ConfigError, match="a folder without a run"):
        dataflex.read_run(tmp_path)
    copy = Path(shutil.copytree(read.path, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*")))
    for number in (1, 2):
        (copy / "rounds" / f"round-{number:05d}.parquet").unlink()
    begun = dataflex.read_run(copy)
    assert begun.join(pool)["score"][:] == [None] * 63
    with pytest.raises(ConfigError, match="found no update among its 1 rounds"):
        begun.chosen(pool)
    (copy / "dataflex_rows.parquet").unlink()
    with pytest.raises(ConfigError, match=r"found no dataflex_rows\.parquet; expected the map of its rows"):
        dataflex.read_run(copy).join(pool)


def test_several_data_sets_are_joined_each_for_itself(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    rows = rows_of(60)
    run = dataflex.read_run(make_run(tmp_path / "run", rows, updates=2, chosen=24))
    data = Dataset.from_dict({"n": list(range(20))})
    every = run.rounds()
    counted = 0
    for number, name in enumerate(SOURCES):
        given = Dataset.from_dict({"n": list(range(61))}) if name == "letters" else data  # of which one was dropped
        joined, chosen = run.join(given, name), run.chosen(data if name != "letters" else given, name)
        ours = every.filter(pc.equal(every["dataset"], name))
        assert joined["chosen"][:20] == np.bincount(ours["record"].to_numpy(), minlength=20).tolist()
        expected = ours.filter(pc.equal(ours["kind"], "update"))
        assert chosen["n"][:] == expected["record"].to_pylist()
        assert chosen["row_key"][:] == [rows.keys[i].tobytes() for i in expected["index"].to_pylist()]
        silent = rows.supervised[number::3] == 0
        assert [score is None for score in joined["score"][:20]] == silent.tolist()
        assert joined["status"][:20] == np.where(silent, "no_labels", "ok").tolist()
        counted += sum(joined["chosen"][:])
    assert counted == len(every) == 72
    with pytest.raises(ConfigError, match="found no record of where its stores are"):
        run.stores()


def made(folder: Path, settings: dict[str, Any], lines: list[tuple[str, str, int, int]]) -> dataflex.RunResults:
    """Write the folder of a run without rounds: of each row its role, data set, index and record."""
    (folder / "dataflex_run.json").write_text(json.dumps({"settings": settings}))
    rows: list[dict[str, Any]] = [
        {
            "role": role, "dataset": name, "index": index, "record": record, "status": "ok",
            "row_key": f"{name}{record:016d}".encode()[-16:],
        }
        for role, name, index, record in lines
    ]  # fmt: skip
    plain = pa.schema(
        [(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in row_map.SCHEMA]
    )
    row_map.write(folder / "dataflex_rows.parquet", pa.Table.from_pylist(rows, schema=plain).cast(row_map.SCHEMA))
    return dataflex.read_run(folder)


def test_records_that_are_repeated_or_were_not_loaded(tmp_path: Path) -> None:
    lines = [("train", "a", 0, 3), ("train", "b", 1, 0), ("train", "a", 2, 3), ("train", "a", 3, 1)]
    run = made(tmp_path, {"stage": "sft"}, lines)
    four = Dataset.from_dict({"n": [0, 1, 2, 3]})
    joined = run.join(four, "a")
    assert joined["status"][:] == [None, "ok", None, "ok"]
    assert joined["chosen"][:] == [None] * 4  # no round is recorded, so it is not known
    assert joined["row_key"][3] == b"a0000000000000003"[-16:]
    with pytest.raises(ConfigError, match="name: found no name; expected one of the run's train data: a, b"):
        run.join(four)


def test_packed_blocks_are_no_records(tmp_path: Path) -> None:
    run = made(tmp_path, {"stage": "pt"}, [("train", "a", 0, 0)])
    with pytest.raises(ConfigError, match="its rows are blocks packed from several records"):
        run.join(Dataset.from_dict({"n": [0]}))
    assert issubclass(ConfigError, DataflexError)


def test_rows_that_came_tokenized_are_no_records(tmp_path: Path) -> None:
    """LLaMA-Factory's own tokenized sets say nothing of the records that they were made of."""
    folder = make_run(tmp_path / "run", replace(rows_of(20), truncated=None), chosen=4, tokenized_path="saves/tokens")
    read = dataflex.read_run(folder)
    with pytest.raises(ConfigError, match="came tokenized from saves/tokens"):
        read.join(Dataset.from_dict({"x": list(range(20))}))
