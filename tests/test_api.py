"""`import dataflex` is light; run files are read with values of Python's; stores and runs are read as tables."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict

import dataflex
from dataflex.api import run as api_run
from dataflex.api.run import _as_before
from dataflex.config import load
from dataflex.errors import ConfigError, ConflictError, CoverageError, DataflexError, MismatchError
from dataflex.results import row_map
from dataflex.stores.files import LocalFiles
from dataflex.stores.root import folder_name
from tests.command import ROOT, python
from tests.roots import empty_root, make_store
from tests.run_folders import SOURCES, make_run, rows_of
from tests.test_store_format import FROZEN, KEYS, ROUNDED, SCALARS, STATUS, STORES, VECTORS, recipe

NAMES = {layout.storage: folder_name(kind, recipe(kind, layout)) for kind, layout in STORES if kind == "embedding"}


def test_nothing_is_imported_before_it_is_used(run_file: Path) -> None:
    code = """
import sys, dataflex
heavy = ("torch", "transformers", "llamafactory", "pydantic", "omegaconf", "numpy", "pyarrow", "datasets", "pandas")
print([name for name in heavy if name in sys.modules], set(dataflex.__all__) <= set(dir(dataflex)))
run = dataflex.load("run.yaml", seed=3)
print([name for name in ("torch", "transformers", "llamafactory", "datasets", "pandas") if name in sys.modules], run)
print(dataflex.open_store.__module__, dataflex.Run is type(run), hasattr(dataflex, "lode"))
"""
    done = python("-c", code)
    assert done.stdout.splitlines() == [
        "[] True",
        "[] Run('run.yaml', less, output_dir='out')",
        "dataflex.api.stores True False",
    ], done.stderr
    assert all(getattr(dataflex, name) is not None for name in dataflex.__all__)


def test_overrides_are_what_the_command_line_would_say(run_file: Path) -> None:
    said = load(
        "run.yaml",
        ["learning_rate=5e-5", "lora_target=[q_proj, v_proj]", "output_dir=other", "dataflex.params.proj_dim=64",
         "dataflex.params.seed=2", "dataflex.refresh={policy: rotating, refresh_fraction: 0.5}", "warmup_step="],
    )  # fmt: skip
    found = dataflex.load(
        Path("run.yaml"),
        learning_rate=np.float64(5e-5),
        lora_target=("q_proj", "v_proj"),
        output_dir=Path("other"),
        warmup_step=None,
        dataflex={"params": {"proj_dim": np.int64(64)}, "refresh": {"policy": "rotating", "refresh_fraction": 0.5}},
        **{"dataflex.params.seed": 2},
    ).settings
    assert found.llamafactory == said.llamafactory
    assert type(found.llamafactory["learning_rate"]) is float
    assert (found.keys, found.params, found.dataflex) == (said.keys, said.params, said.dataflex)
    assert type(found.params.proj_dim) is int


def test_a_mapping_of_ours_keeps_what_it_does_not_name(run_file: Path) -> None:
    text = run_file.read_text("utf-8")
    run_file.write_text(
        f"{text}dataflex:\n  store: kept\n  params: {{proj_dim: 128, seed: 5}}\n"
        "  refresh: {policy: rotating, refresh_fraction: 0.5}\n",
        "utf-8",
    )
    settings = dataflex.load(run_file, dataflex={"params": {"seed": 6}, "refresh": {"policy": "full"}}).settings
    assert settings.store_root == str(Path("kept").resolve())
    assert (settings.params.proj_dim, settings.params.seed) == (128, 6)
    assert settings.dataflex.refresh.policy == "full"
    assert dataflex.load(run_file, dataflex={"params": None}).settings.params.proj_dim == 8192


def test_everything_wrong_is_said_at_once_and_where(run_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        dataflex.load(
            run_file, learning_rat=1, seed=object(), template={"a": 2**60}, dataflex={"params": {"proj_dom": 3}}
        )
    text = str(caught.value)
    assert "dataflex.load: seed: found object; expected text, a number, true, false, a list, a mapping or None" in text
    assert "dataflex.load: template: found a whole number beyond" in text
    with pytest.raises(ConfigError) as caught:
        dataflex.load(run_file, learning_rat=1, dataflex={"params": {"proj_dom": 3}}, stage="dpo")
    text = str(caught.value)
    assert text.startswith("3 problems in the configuration:")
    assert "dataflex.load: learning_rat: found an unknown key" in text
    assert "did you mean 'proj_dim'?" in text
    assert "command line" not in text


@pytest.mark.parametrize(
    ("env", "keys", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, {}, "found a process of 2 (WORLD_SIZE)"),
        ({"FORCE_TORCHRUN": "1"}, {}, "found a launcher asked for by FORCE_TORCHRUN or USE_MCA"),
        ({}, {"deepspeed": "ds.json"}, "found deepspeed in the run file, which works under a launcher alone"),
        ({"LOCAL_RANK": "0", "RANK": "0"}, {}, "found LOCAL_RANK=0, RANK=0 without WORLD_SIZE"),
        ({"RANK": "no"}, {}, "environment variable RANK: found 'no'"),
    ],
    ids=["one of two", "forced", "deepspeed", "half a launcher", "no number"],
)
def test_several_processes_are_refused_with_the_way_out(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], keys: dict[str, str], said: str
) -> None:
    Path("ds.json").write_text('{"zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": "auto"}')
    run = dataflex.load(run_file, **keys)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        run.train()
    assert said in str(caught.value)
    if "environment" not in str(caught.value):
        assert "Use the command: dataflex train RUN.yaml" in str(caught.value)
    assert not Path("out").exists()


def test_one_verb_at_a_time(run_file: Path) -> None:
    run = dataflex.load(run_file)
    with api_run._busy, pytest.raises(ConflictError, match="featurize into out: another verb is at work"):
        run.featurize()
    assert not Path("out").exists()
    with pytest.raises(ConfigError, match="out: found no such folder"):
        _ = run.results


def test_a_store_is_opened_by_path_by_kind_or_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = FROZEN / "1"
    assert [store.kind for store in dataflex.list_stores(root)] == ["embedding"] * 5 + ["loss"]
    loss = dataflex.open_store(root, "loss")
    assert (loss.kind, loss.columns, loss.width, len(loss)) == ("loss", ["loss_sum", "tokens"], 0, 5)
    assert dataflex.open_store(f"{root}/{NAMES['float16']}").recipe["storage"] == "float16"
    assert "5 rows, norm, vectors of 4" in repr(dataflex.open_store(root, NAMES["float32"][:12]))
    with pytest.raises(
        ConfigError, match=f"found 5 stores whose name begins with 'embedding'; expected .*{NAMES['int8']}"
    ):
        dataflex.open_store(root, "embedding")
    with pytest.raises(ConfigError, match="found 6 stores; expected one of"):
        dataflex.open_store(root)
    with pytest.raises(ConfigError, match="root: found no such folder"):
        dataflex.list_stores(tmp_path / "none")
    monkeypatch.setenv("DATAFLEX_HOME", str(root))
    assert dataflex.open_store(name="loss").path == loss.path
    made = make_store(empty_root("memory", tmp_path), 1)
    alone = dataflex.open_store("memory://tested/root")
    assert (alone.name, alone.nbytes) == (made.folder, made.bytes)


@pytest.mark.parametrize("storage", NAMES)
def test_values_are_decoded_and_void_where_the_status_is_not_ok(storage: str) -> None:
    store = dataflex.open_store(FROZEN / "1" / NAMES[storage])
    ok = STATUS == 0
    found = store.to_numpy(rows=KEYS)
    assert found["vector"].dtype == np.float32
    np.testing.assert_allclose(found["vector"][ok], ROUNDED.get(storage, VECTORS)[ok], rtol=1e-3, atol=8e-3)
    assert np.isnan(found["vector"][~ok]).all()
    assert np.isnan(found["norm"][~ok]).all()
    assert found["status"].tolist() == ["ok", "ok", "no_labels", "nonfinite", "ok"]
    table = store.to_arrow(rows=KEYS)
    assert table["vector"].is_null().to_pylist() == (~ok).tolist()
    assert table["vector"].drop_null().to_pylist() == found["vector"][ok].tolist()
    assert table["norm"].null_count == 2
    assert table["row_key"].to_pylist() == [key.tobytes() for key in KEYS]
    assert store.to_pandas(rows=KEYS, vectors=True)["vector"][1].tolist() == found["vector"][1].tolist()
    assert list(store.to_pandas().columns) == ["row_key", "status", "norm"]
    assert store.to_arrow(columns=[], vectors=False).column_names == ["row_key", "status"]


def test_rows_come_in_the_order_and_number_asked_for_whatever_names_them() -> None:
    store = dataflex.open_store(FROZEN / "1", "loss")
    order = [4, 0, 4, 1]
    expected = SCALARS["loss_sum"][order].tolist()
    keys = [KEYS[i].tobytes() for i in order]
    column = pa.chunked_array([pa.array(keys[:1], pa.binary(16)), pa.array(keys[1:], pa.binary(16))])
    for rows in (KEYS[order], keys, column, column.cast(pa.binary()), pd.Series(keys), list(KEYS[order])):
        assert store.to_numpy(rows=rows)["loss_sum"].tolist() == expected
        assert store.to_arrow(rows=rows)["tokens"].to_pylist() == [1, 3, 1, 5]
    every = store.to_arrow()
    assert sorted(every["row_key"].to_pylist()) == sorted(key.tobytes() for key in KEYS)
    assert pa.concat_tables(store.batches(2)).combine_chunks() == every.combine_chunks()
    assert [len(part) for part in store.batches(2)] == [2, 2, 1]
    assert len(store.to_arrow(rows=[])) == 0
    for wrong in ([b"short"], ["text"], [16]):
        with pytest.raises(ConfigError, match="expected row keys of 16 bytes"):
            store.to_numpy(rows=wrong)


@pytest.mark.parametrize("null", [None, float("nan"), pd.NA])
def test_missing_rows_are_an_error_or_void(null: Any) -> None:
    store = dataflex.open_store(FROZEN / "1", "loss")
    rows = [KEYS[1].tobytes(), b"x" * 16, null, KEYS[3].tobytes()]
    with pytest.raises(CoverageError, match="rows: found 1 of 4 without a row key"):
        store.to_numpy(rows=rows)
    with pytest.raises(CoverageError, match="1 of 3 rows are not in"):
        store.to_numpy(rows=[row for row in rows if row is not null])
    with pytest.raises(ConfigError, match="missing: found 'zero'; expected error or nan"):
        store.to_numpy(rows=rows, missing="zero")  # type: ignore[arg-type]
    found = store.to_numpy(rows=rows, missing="nan")
    assert found["status"].tolist() == ["ok", "missing", "missing", "nonfinite"]
    np.testing.assert_array_equal(found["loss_sum"], [2.5, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(found["tokens"], [5, np.nan, np.nan, np.nan])
    assert store.to_arrow(rows=rows, missing="nan")["tokens"].to_pylist() == [5, None, None, None]
    assert store.has(rows).tolist() == [True, False, False, True]


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


def test_what_the_page_names_is_there() -> None:
    text = (ROOT / "docs" / "python.md").read_text("utf-8") + (ROOT / "README.md").read_text("utf-8")
    things = {
        "run": dataflex.Run, "results": dataflex.RunResults, "choice": dataflex.Choice, "store": dataflex.Store,
        "dataflex": dataflex,
    }  # fmt: skip
    found = set(re.findall(r"(?<![\w./])(run|results|choice|store|dataflex)\.(\w+)\(", text))
    assert len(found) > 12
    assert [(thing, name) for thing, name in found if not hasattr(things[thing], name)] == []
    what_was_left = text.split("## What a run left")[1].split("### Joined")[0]
    named = [
        name
        for cell in re.findall(r"^\| (`.+?) \|", what_was_left, re.MULTILINE)
        for name in re.findall(r"`(\w+)", cell)
    ]
    assert len(named) > 12
    assert [name for name in named if not hasattr(dataflex.RunResults, name)] == []


def test_packed_blocks_are_no_records(tmp_path: Path) -> None:
    run = made(tmp_path, {"stage": "pt"}, [("train", "a", 0, 0)])
    with pytest.raises(ConfigError, match="its rows are blocks packed from several records"):
        run.join(Dataset.from_dict({"n": [0]}))
    assert issubclass(ConfigError, DataflexError)


def test_switches_of_the_process_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that asks for TF32 or determinism sets them for the process; the next one has not asked."""
    monkeypatch.setenv("KEPT", "before")
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()

    def run() -> None:
        matmul.fp32_precision = "tf32"
        torch.use_deterministic_algorithms(True)
        os.environ.update(CUBLAS_WORKSPACE_CONFIG=":16:8", KEPT="after")
        raise ValueError("ended")

    with pytest.raises(ValueError, match="ended"), _as_before():
        run()
    assert (matmul.fp32_precision, torch.are_deterministic_algorithms_enabled()) == before
    assert os.environ["KEPT"] == "before"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_rows_that_came_tokenized_are_no_records(tmp_path: Path) -> None:
    """LLaMA-Factory's own tokenized sets say nothing of the records that they were made of."""
    folder = make_run(tmp_path / "run", replace(rows_of(20), truncated=None), chosen=4, tokenized_path="saves/tokens")
    read = dataflex.read_run(folder)
    with pytest.raises(ConfigError, match="came tokenized from saves/tokens"):
        read.join(Dataset.from_dict({"x": list(range(20))}))


def test_truth_values_of_numpy_are_taken(run_file: Path) -> None:
    assert dataflex.load(run_file, do_train=np.True_).settings.llamafactory["do_train"] is True


def test_a_store_is_read_by_at_least_a_row_at_a_time(tmp_path: Path) -> None:
    store = dataflex.open_store(tmp_path / "root", make_store(LocalFiles(tmp_path / "root"), 1).folder)
    assert sum(table.num_rows for table in store.batches(1)) == len(store)
    for size in (0, -1):
        with pytest.raises(ConfigError, match="at least 1"):
            list(store.batches(size))
