"""What a real training writes down of itself, held against its data and its stores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from dataflex.config import load
from dataflex.errors import CorruptionError, CoverageError, MismatchError
from dataflex.pipelines.recording import shown_settings
from dataflex.results import opening
from dataflex.results.folder import RunFolder
from dataflex.rows import keys_from
from dataflex.stores.root import StoreRoot


@pytest.fixture(scope="module")
def space(tiny: Any, tmp_path_factory: pytest.TempPathFactory, workspace_class: Any) -> Any:
    """Featurized, then trained with LESS on two datasets towards two target sets; no token of a hub is in its files."""
    space = workspace_class(tmp_path_factory.mktemp("recorded"), tiny)
    section = {"store": str(space.folder / "store"), "params": {"proj_dim": 128, "gradient_type": "sgd"}}
    sets = {"dataset": "pool,target_records", "eval_dataset": ",".join(tiny.targets[:2])}
    path = space.write("run", **sets, dataflex=section, hf_hub_token="hf_secret", save_strategy="no")
    space.run("featurize", path)
    space.run("train", path)
    return space


def test_a_run_says_what_it_is(space: Any) -> None:
    out = space.folder / "out" / "run"
    about = RunFolder(out).about
    assert (about["verb"], about["method"], about["global_batch"]) == ("train", "less", 4)
    assert about["settings"]["learning_rate"] == 3e-3
    assert about["settings"]["hf_hub_token"] == "(not shown)"
    assert "hf_secret" not in "".join(path.read_text("utf-8") for path in out.glob("dataflex_*.json"))
    assert about["data"]["train"]["rows"] == 62 + 8
    assert {name: each["rows"] for name, each in about["data"]["targets"].items()} == dict.fromkeys(
        space.tiny.targets[:2], 8
    )
    assert len(about["launches"]) == 1
    assert about["model"]["parameters"] > about["model"]["trained"] > 0
    featurized = json.loads((out / "dataflex_run_featurize.json").read_text("utf-8"))
    assert featurized["verb"] == "featurize"
    assert featurized["identity"]["rows"] == about["identity"]["rows"]
    assert (out / "dataflex_rows_featurize.parquet").read_bytes() == (out / "dataflex_rows.parquet").read_bytes()


def test_any_store_can_be_joined_with_the_data(space: Any) -> None:
    known = RunFolder(space.folder / "out" / "run").rows
    assert known is not None
    lines = known.to_pylist()
    places = [(line["role"], line["dataset"], line["record"]) for line in lines]
    assert len(set(places)) == len(places)
    data = {
        name: json.loads((space.tiny.dataset_dir / f"{name}.json").read_text()) for name in ("pool", "target_records")
    }
    assert {(d, r) for role, d, r in places if role == "train"} == {
        (n, i) for n, rows in data.items() for i in range(len(rows))
    }
    (dropped,) = [line for line in lines if line["status"] == "dropped"]
    assert data["pool"][dropped["record"]]["id"] == "no output"
    by_place = {(line["dataset"], line["record"]): line["row_key"] for line in lines}
    ids = [row["id"] for row in data["pool"]]
    assert by_place["pool", ids.index("duplicate")] == by_place["pool", 0]
    stores = StoreRoot(space.folder / "store").stores()
    wanted = {line["row_key"] for line in lines if line["row_key"]}
    assert {key.tobytes() for store in stores for block in store.scan() for key in block.keys} <= wanted
    usable = [line["row_key"] for line in lines if line["role"] == "train" and line["status"] == "ok"]
    assert any(store.contains(keys_from(usable)).all() for store in stores)


def test_the_text_that_is_kept_is_the_datas(space: Any) -> None:
    run = RunFolder(space.folder / "out" / "run")
    data = {
        name: json.loads((space.tiny.dataset_dir / f"{name}.json").read_text()) for name in ("pool", "target_records")
    }
    assert run.rows is not None
    place = {
        line["index"]: (line["dataset"], line["record"]) for line in run.rows.to_pylist() if line["role"] == "train"
    }
    for each in run.recorded:  # the warm-up's too, whose end state was kept by featurize
        said = {line["index"]: line for line in run.texts(each.number).to_pylist() if line["set"] is None}
        assert set(each.rows["index"].to_pylist()) <= set(said)
        for index, line in said.items():
            name, record = place[index]
            row = data[name][record]
            assert line["prompt"] == "\n".join(part for part in (row["instruction"], row["input"]) if part)
            assert line["response"] == row["output"]


def test_no_text_of_the_data_is_in_a_store(space: Any) -> None:
    """The state at the end of the warm-up was kept there, by featurize."""
    root = space.folder / "store"
    assert list(root.glob("states/*/*/dataflex/rounds/round-*"))
    assert list(root.rglob("texts-*")) == []


def test_a_checkpoint_takes_the_texts_along(space: Any) -> None:
    section = {"store": str(space.folder / "store"), "params": {"proj_dim": 128, "gradient_type": "sgd"}}
    space.run("train", space.write("first", dataflex=section, save_steps=5))
    out = space.folder / "out"
    space.run("train", space.write("on", dataflex=section, resume_from_checkpoint=str(out / "first" / "checkpoint-5")))
    for number in (0, 1, 2):
        first, on = (RunFolder(out / name).texts(number).to_pylist() for name in ("first", "on"))
        assert first == on
        assert any(line["nearest"] for line in on) is (number > 0)


def test_the_nearest_targets_are_those_of_the_stores(space: Any) -> None:
    run = RunFolder(space.folder / "out" / "run")
    assert run.rows is not None
    lines = run.rows.to_pylist()
    keys = {
        (line["set"], line["index"]): line["row_key"] for line in lines if line["row_key"] and line["role"] != "test"
    }
    for number in (1, 2):
        recipes = run.round(number).info["recipes"]
        stores = [StoreRoot(space.folder / "store").find("gradient", recipe) for recipe in recipes]
        store = stores[0]
        assert store is not None
        targets = [(name, i) for name in space.tiny.targets[:2] for i in range(8)]
        vectors = np.stack([vector(store, keys[each]) for each in targets])
        for line in run.texts(number).to_pylist():
            if line["set"] is None:
                own = vector(store, keys[None, line["index"]])
                cosines = vectors @ own / np.linalg.norm(vectors, axis=1) / np.linalg.norm(own)
                assert [near["cosine"] for near in line["nearest"]] == pytest.approx(
                    np.sort(cosines)[::-1][:3].tolist(), abs=1e-5
                )
                for near in line["nearest"]:
                    at = targets.index((near["set"], near["index"]))
                    assert near["cosine"] == pytest.approx(cosines[at], abs=1e-5)


def test_norms_stand_beside_scores(space: Any) -> None:
    run = RunFolder(space.folder / "out" / "run")
    pool = run.pool(1)
    assert pool is not None
    assert pool.column_names == ["score", "updated", "judged", "norm"]
    assert [n is None for n in pool["norm"].to_pylist()] == [s is None for s in pool["score"].to_pylist()]
    store = StoreRoot(space.folder / "store").find("gradient", run.round(1).info["recipes"][0])
    assert store is not None
    assert run.rows is not None
    key = {line["index"]: line["row_key"] for line in run.rows.to_pylist() if line["role"] == "train"}
    found = store.read(keys_from([key[3]]), columns=["norm"], vectors=False).scalars["norm"][0]
    assert pool["norm"][3].as_py() == pytest.approx(found)


def test_a_second_start_is_told_and_nothing_is_in_the_way(space: Any) -> None:
    path = space.folder / "run.yaml"
    space.run("train", path, "overwrite_output_dir=true", "dataflex.keep_texts=0")
    run = RunFolder(space.folder / "out" / "run")
    assert len(run.about["launches"]) == 2
    assert list((run.path / "rounds").glob("texts-*")) == []
    space.run("train", path, "overwrite_output_dir=true", "learning_rate=1e-3")
    assert len(RunFolder(space.folder / "out" / "run").about["launches"]) == 1


def vector(store: Any, key: bytes) -> np.ndarray:
    found: np.ndarray = store.read(keys_from([key])).vectors[0].astype(np.float64)
    return found


def test_what_cannot_be_written_ends_no_training(space: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dataflex.results.texts.write", full)
    space.run("train", space.folder / "run.yaml", "overwrite_output_dir=true")
    assert "so `dataflex show` has no texts of this round" in caplog.text
    assert len(RunFolder(space.folder / "out" / "run").round_numbers) == 3


def test_a_start_that_is_refused_leaves_what_is_there(space: Any) -> None:
    out = space.folder / "out" / "kept"
    path = space.write("kept", component_name="random", dataflex={"store": str(space.folder / "store")}, save_steps=3)
    space.run("train", path)
    before = {each: each.read_bytes() for each in (*out.glob("dataflex_*"), *(out / "rounds").iterdir())}
    with pytest.raises(MismatchError, match="its rows are not the rows of this training set"):
        space.run("train", path, "dataset=target_words")
    assert {each: each.read_bytes() for each in before} == before


def test_a_training_that_begins_anew_is_not_taken_for_the_one_before(space: Any) -> None:
    """Of another kind in the same folder: nothing of the first one's is shown as its own."""
    section = {"store": str(space.folder / "store")}
    out = space.folder / "out" / "again"
    keys: dict[str, Any] = {"dataset": "pool,target_records", "overwrite_output_dir": True, "save_strategy": "no"}
    space.run("train", space.write("again", component_name="random", dataflex=section, **keys))
    assert (out / "rounds").is_dir()
    keys |= {"component_name": None, "warmup_step": None, "update_step": None, "update_times": None}
    mixed = {**keys, "train_type": "dynamic_mix", "component_name": "uniform", "train_step": 2}
    space.run("train", space.write("again", dataflex=section, **mixed))
    assert RunFolder(out).round_numbers == []
    assert len(RunFolder(out).shares())
    space.run("train", space.write("again", train_type="static", dataflex=None, max_steps=1, **keys))
    run = RunFolder(out)
    assert (len(run.shares()), run.rows, run.summary, run.about["train_type"]) == (0, None, {}, "static")


def test_a_weighter_beside_a_mixer_is_told_with_its_parameters(space: Any) -> None:
    section = {"store": str(space.folder / "store"), "weighter": {"name": "loss", "params": {"temperature": 7.0}}}
    keys = {"train_type": "dynamic_mix", "component_name": "uniform", "dataset": "pool,target_records"}
    path = space.write(
        "weighed", **keys, warmup_step=None, update_step=None, update_times=None, train_step=2, dataflex=section
    )
    assert shown_settings(load(path))["dataflex"]["weighter"]["params"]["temperature"] == 7.0


PLUGIN = """
from dataflex.selectors import NativeSelector, Parameters, register_selector

@register_selector("asking")
class Asking(NativeSelector):
    class Params(Parameters):
        api_key: str = ""

    def select(self, model, step_id, num_samples, *, context, **kwargs):
        return list(range(num_samples))
"""


def test_no_secret_of_a_component_is_written_down(space: Any) -> None:
    (space.folder / "asking.py").write_text(PLUGIN)
    section = {
        "store": str(space.folder / "store"),
        "plugins": [str(space.folder / "asking.py")],
        "params": {"api_key": "sk-1234"},
    }
    space.run("train", space.write("asking", component_name="asking", dataflex=section, save_strategy="no"))
    out = space.folder / "out" / "asking"
    assert RunFolder(out).about["settings"]["dataflex"]["params"] == {"api_key": "(not shown)"}
    for path in (*out.glob("*.json*"), *(out / "rounds").iterdir()):
        assert b"sk-1234" not in path.read_bytes(), path


def test_what_was_set_aside_comes_back_unless_a_step_is_taken(tmp_path: Path) -> None:
    rounds = tmp_path / "rounds"

    def earlier() -> None:
        rounds.mkdir(exist_ok=True)
        (rounds / "old").write_text("old")

    def refused() -> None:
        opening.set_aside(rounds)
        rounds.mkdir()
        (rounds / "new").write_text("new")
        raise ValueError("refused")

    earlier()
    with pytest.raises(ValueError, match="refused"), opening.beginning(), opening.beginning():
        refused()
    assert [each.name for each in rounds.iterdir()] == ["old"]
    with opening.beginning():
        opening.set_aside(rounds)
        rounds.mkdir()
        (rounds / "new").write_text("new")
        opening.step_begins(0)
    assert [each.name for each in rounds.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [rounds]
    # Killed before its first step: the next start finds the older one's as it was.
    rounds.rename(tmp_path / ".rounds.earlier")
    earlier()
    with opening.beginning():
        opening.set_aside(rounds)
        assert not rounds.exists()
    assert [each.name for each in rounds.iterdir()] == ["new"]
    waited: list[int] = []
    opening.at_first_step(waited.append)  # outside: nobody waits
    with opening.beginning():
        opening.step_begins(3)
    assert waited == []


def test_a_start_that_fails_before_its_first_step_leaves_the_rounds(space: Any) -> None:
    out = space.folder / "out" / "before"
    path = space.write(
        "before", save_strategy="no", dataflex={"store": str(space.folder / "store"), "params": {"proj_dim": 64}}
    )
    space.run("train", path)
    rounds = {each.name: each.read_bytes() for each in (out / "rounds").iterdir()}
    with pytest.raises(CoverageError):
        space.run("train", path, "overwrite_output_dir=true", "seed=9", "dataflex.on_missing=error", "warmup_step=0")
    assert {each.name: each.read_bytes() for each in (out / "rounds").iterdir()} == rounds
    assert not (out / ".rounds.earlier").exists()
    assert len(RunFolder(out).rounds()) == sum(len(each.rows) for each in RunFolder(out).recorded)


def test_rounds_of_another_training_are_not_shown_under_this_map(space: Any, tmp_path: Path) -> None:
    out = shutil.copytree(space.folder / "out" / "run", tmp_path / "run")
    table = pq.read_table(out / "dataflex_rows.parquet")
    train = table.filter(pc.equal(table["role"], "train"))
    keys = train["row_key"].to_pylist()
    turned = pa.array([keys[1], keys[0], *keys[2:]], pa.binary(16))
    for number in RunFolder(out).round_numbers:
        assert len(RunFolder(out).round(number).rows)
    pq.write_table(
        train.set_column(train.column_names.index("row_key"), "row_key", turned), out / "dataflex_rows.parquet"
    )
    rows = [RunFolder(space.folder / "out" / "run").round(n).rows["index"].to_pylist() for n in (0, 1, 2)]
    number = next(n for n, some in enumerate(rows) if {0, 1} & set(some))
    with pytest.raises(CorruptionError, match="found other rows than"):
        RunFolder(out).round(number)
