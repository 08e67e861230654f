"""What a run file names is looked for and named where it is missing: files, folders, datasets, packages, stores."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from dataflex.config import load, store_root
from dataflex.config.keys import DataflexKeys
from dataflex.config.outputs import check_store, refuse_misplaced, refuse_unwritable, why_unwritable
from dataflex.config.problems import Origin, Problems
from dataflex.errors import ConfigError
from dataflex.schedule import Schedule
from tests.command import run
from tests.run_file import refusal, write

pytestmark = pytest.mark.usefixtures("run_folder")


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            "component_name: random\nquantization_bit: 4\nquantization_method: eetq",
            "quantization_bit needs a package that is not installed here: found no eetq",
        ),
        ("flash_attn: fa2", "flash_attn: fa2 is not used here: found no flash_attn"),
        ("component_name: random\nuse_galore: true\nfinetuning_type: full", "use_galore needs a package"),
    ],
)
def test_a_package_that_is_not_here_may_be_where_the_run_is(changes, note):
    assert any(note in text for text in load(write(changes)).notes)


@pytest.mark.parametrize("file", ["model/config.json", "adapter/adapter_config.json", "ds.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "\0", "{'a': 1}"])
def test_a_damaged_configuration_is_named(file, text):
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("ds.json").write_text("{}")
    assert load(write("adapter_name_or_path: adapter\ndeepspeed: ds.json"))
    Path(file).write_text(text)
    found = refusal("adapter_name_or_path: adapter\ndeepspeed: ds.json")
    assert found.startswith("1 problem")
    assert f"  {file}" in found


def test_folders_that_may_not_be_written_to(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # one that whoever we turn into can reach
        os.chmod(folder, 0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)  # root may write anywhere
        try:
            assert why_unwritable(f"{folder}/out") == f"{folder} may not be written to"
            assert why_unwritable(folder) == f"{folder} may not be written to"
            with pytest.raises(ConfigError, match=r"--output: found .*; expected a file that can be written"):
                refuse_unwritable("--output", Path(folder, "chosen.json"))
            keys = DataflexKeys()
            for section, updates, writes in [
                (keys, Schedule(3, 2, 2), True),
                (keys, Schedule(3, 2, 1), False),
                (keys, Schedule(3, 2, 1, 0, 2.0), True),
                (DataflexKeys(on_missing="error"), Schedule(3, 2, 2), False),
                (DataflexKeys.model_validate({"refresh": {"policy": "static"}}), Schedule(3, 2, 2), False),
            ]:
                problems = Problems()
                check_store(folder, folder, section.must_write(updates, True), Origin(Path("run.yaml")), problems)
                with pytest.raises(ConfigError, match="every update computes") if writes else contextlib.nullcontext():
                    problems.raise_if_any()
        finally:
            if is_root:
                os.seteuid(0)
    with pytest.raises(ConfigError, match="found the folder"):
        refuse_unwritable("--output", tmp_path)
    with pytest.raises(ConfigError, match="found the device /dev/null"):
        refuse_unwritable("--output", Path("/dev/null"))
    (tmp_path / "chosen.json").write_text("[]")
    refuse_unwritable("--output", tmp_path / "chosen.json")  # the same choice made again replaces it
    assert "bytes" in str(why_unwritable("x" * 300))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that root may write to and cannot")
def test_what_may_be_written_is_tried(tmp_path):
    for file in ("/proc/x.json", "/proc/x/y.json", "/sys/x.json"):
        with pytest.raises(ConfigError, match=f"--output: found {file}; expected a file that can be written; "):
            refuse_unwritable("--output", Path(file))
    refuse_unwritable("--output", tmp_path / "new" / "chosen.json")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-4/",
        "checkpoint-4/dataflex/",
        "rounds/",
        "selector_cache/",
        "checkpoint-4/dataflex/complete.json",
        "checkpoint-4/dataflex/rounds/round-00000.parquet",
        "checkpoint-4/adapter_model.safetensors",
        "checkpoint-4/trainer_state.json",
        "adapter_model.safetensors",
        "dataflex_summary.json",
        "trainer_log.jsonl",
        "training_args.bin",
        "rounds/round-00001.parquet",
    ],
)
@pytest.mark.parametrize("kind", ["the other", "FIFO", "link"])
def test_what_a_run_could_not_write_over_is_refused_before_it(name, kind, tmp_path):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    refuse_misplaced(tmp_path / "out")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path.touch() if name.endswith("/") else path.mkdir()
    with pytest.raises(ConfigError, match=r"output_dir: found what .*; move it away\n  .*; expected ") as caught:
        refuse_misplaced(tmp_path / "out")
    assert str(path) in str(caught.value)


def test_an_output_folder_as_a_run_leaves_it_is_taken(tmp_path):
    for name in ("checkpoint-4/dataflex/rounds/round-00000.parquet", "checkpoint-4/global_step4/x.pt", "runs/a/events"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "status.json").touch()
    (tmp_path / "dataflex").touch()
    refuse_misplaced(tmp_path)
    refuse_misplaced(tmp_path / "none")


def test_the_command_refuses_it_before_anything(capsys):
    path = write("component_name: random")
    for verb in ("train", "featurize"):
        Path("out/checkpoint-4").parent.mkdir(exist_ok=True)
        Path("out/checkpoint-4").touch()
        code, _, err = run(capsys, verb, str(path), "output_dir=out")
        assert code == 2
        assert "out/checkpoint-4 is no folder; expected a folder" in err


def test_datasets_named_twice_are_said():
    notes = load(write("dataset: pool, pool")).notes
    assert "dataset: names pool 2 times; each of its rows is there as often" in notes
    assert not any("times" in note for note in load(write("dataset: pool")).notes)


def test_remote_names_are_left_alone():
    assert (
        load(write("model_name_or_path: owner/model\ndataset: hub\neval_dataset: hub")).llamafactory["dataset"] == "hub"
    )
    assert load(write("dataset_dir: ONLINE\ndataset: a/b\neval_dataset: c"))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (3, "data/dataset_info.json: x: found 3; expected a mapping with file_name"),
        ({}, "x.file_name: found nothing (null); expected a file, relative to data"),
        ({"file_name": "gone.json"}, "x.file_name: found 'gone.json'; expected a file that exists; data/gone.json"),
        ({"file_name": "pool.gz"}, "x.file_name: found files ending in gz at data/pool.gz"),
        ({"file_name": "../model"}, "x.file_name: found"),
        ({"file_name": "mixed"}, "x.file_name: found files of several types in data/mixed (csv, json)"),
        ({"file_name": "empty"}, "x.file_name: found 'empty'; expected a folder with data files"),
        (
            {"file_name": "pool.json", "formatting": "alpacca"},
            "x.formatting: found 'alpacca'; expected one of alpaca, ",
        ),
        (
            {"file_name": "pool.json", "columns": {"prompt": "q"}},
            "x.columns.prompt: found 'q'; expected a key of the records",
        ),
        ({"file_name": "pool.json", "ranking": True}, "x.ranking: found true; expected no preference pairs"),
        (
            {"file_name": "pool.json", "columns": {"kto_tag": "good"}},
            "x.columns.kto_tag: found 'good'; expected no such column in stage sft or pt",
        ),
    ],
)
def test_bad_registration(entry, expected):
    for name in ("empty", "mixed"):
        Path("data", name).mkdir()
    for name in ("pool.gz", "mixed/a.csv", "mixed/b.json"):
        Path("data", name).touch()
    info = json.loads(Path("data/dataset_info.json").read_text())
    Path("data/dataset_info.json").write_text(json.dumps(info | {"x": entry}))
    if entry == {"file_name": "../model"}:
        Path("model/merges").touch()
    assert expected in refusal("dataset: x")


def test_a_registration_that_is_no_json():
    Path("data/dataset_info.json").write_text('{"pool": }')
    assert "data/dataset_info.json:1: found text that is not JSON" in refusal("dataset: pool")


def test_store_root_order(monkeypatch):
    for store, env, expected in [
        (None, {"HF_HOME": "/h"}, "/h/assets/dataflex"),
        (None, {"HF_HOME": "/h", "HF_ASSETS_CACHE": "/a"}, "/a/dataflex"),
        (None, {"HF_ASSETS_CACHE": "/a", "DATAFLEX_HOME": "/d"}, "/d"),
        ("s", {"DATAFLEX_HOME": "/d"}, str(Path("s").absolute())),
        ("s3://bucket/x", {}, "s3://bucket/x"),
    ]:
        with monkeypatch.context() as patched:
            for name, value in env.items():
                patched.setenv(name, value)
            assert store_root(store) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert store_root(None) == "/c/dataflex"


def test_an_encoder_whose_package_is_not_installed(monkeypatch):
    changes = "component_name: embedding\ndataflex: {params: {embedding_model_name_or_path: sentences}}"
    Path("sentences").mkdir()
    Path("sentences/modules.json").write_text("[]")
    assert load(write(changes))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert "found sentences, a sentence-transformers model; expected its package to be installed" in refusal(changes)


@pytest.mark.parametrize("name", ["USE_RAY", "USE_MCA", "USE_KT"])
def test_other_backends_are_refused(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert f"environment variable {name}: found 1; expected it to be unset" in refusal()
