"""Bad data: every file loads, or ends in a short message that names it; nothing ends in a traceback."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex import cli
from dataflex.errors import ConfigError, DataflexError

FOLDER = Path(__file__).parent / "nasty"
LINES = re.findall(r"^\| `([^`]+)` \| (.*) \| (.*) \|$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
TABLE = [(file, outcome) for file, _, outcome in LINES if not file.startswith(("mixture_", "dataset_info_"))]
MIXTURES = [line for line in LINES if line[0].startswith("mixture_")]
REGISTRATIONS = [(file, outcome) for file, _, outcome in LINES if file.startswith("dataset_info_")]
MADE = {
    "huge_sample_200k.json": [{"instruction": "Continue.", "input": "", "output": ("many friends " * 16000)[:200_000]}],
    "prompt_longer_than_cutoff.json": [{"instruction": ("to all " * 9000)[:60_000], "input": "", "output": "42"}],
    "one_very_long_line.jsonl": [{"instruction": "x" * 150_000, "input": "", "output": "y"}],
    "sorted_by_source.json": [],
    "pt_repetitive.jsonl": [{"text": "the " * 5000, "domain": "loop"}] * 3,
}
"""What is too large to be kept; the rows of GSM8K and Banking77 that are kept are put around it."""
LOADS = [file for file, outcome in TABLE if re.match(r"\d+ rows", outcome)]


def lay_out(folder: Path) -> None:
    """Put all of the files into a folder, those that are made among them."""
    for file in FOLDER.iterdir():
        (folder / file.name).symlink_to(file)
    sums, intents = json.loads((FOLDER / "three_rows.json").read_text()), []
    *intents, _ = json.loads((FOLDER / "extreme_imbalance.json").read_text())
    for name, odd in MADE.items():
        rows = odd if name.startswith("pt_") else [*sums[:2], *odd, *sums[2:]]
        if name == "sorted_by_source.json":
            rows = [*(sums * 34)[:100], *intents[:100]]
        (folder / name).write_text(json.dumps(rows) if name.endswith(".json") else lines(*rows))


def registration(file: str) -> dict[str, Any]:
    return {"file_name": file} | ({"columns": {"prompt": "text"}} if file.startswith("pt_") else {})


@pytest.fixture(scope="module")
def load(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that loads one dataset as a run would; arguments and tokenizer are read once."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from dataflex.llamafactory.row_sets import load_rows

    def prepared(**keys: Any) -> tuple[Any, ...]:
        arguments = {
            "model_name_or_path": str(tiny.model),
            "do_train": True,
            "dataset": "any",
            "output_dir": str(tmp_path_factory.mktemp("out")),
            "use_cpu": True,
            "report_to": "none",
            **keys,
        }
        model_args, data_args, training_args, _, _ = get_train_args(arguments)
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        return template, model_args, data_args, training_args, module

    known = {
        "sft": prepared(stage="sft", template="qwen3_nothink", cutoff_len=256),
        "pt": prepared(stage="pt", template="default", cutoff_len=16),
    }

    def load(folder: Path, name: str, stage: str = "sft", **data: Any) -> Any:
        template, model_args, data_args, training_args, module = known[stage]
        data_args = copy.copy(data_args)
        for key, value in ({"dataset": [name], "dataset_dir": str(folder)} | data).items():
            setattr(data_args, key, value)
        return load_rows(template, model_args, data_args, training_args, stage, **module)

    return load


def refusal(load: Callable[..., Any], folder: Path, name: str, **data: Any) -> str:
    """Return the text with which a dataset is refused: three lines at most, that name what is wrong with what."""
    with pytest.raises(DataflexError) as raised:
        load(folder, name, **data)
    text = str(raised.value)
    assert text.count("\n") < 3
    assert f"dataset {name} (" in text
    assert "Traceback" not in text
    return text


def test_every_file_has_its_line() -> None:
    kept = {file.partition(":")[0] for file, *_ in LINES} - set(MADE)
    assert kept == {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert set(MADE) <= {file for file, _ in TABLE}


def test_every_file_loads_or_is_refused_by_name(load: Callable[..., Any], tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps({file: registration(file) for file, _ in TABLE}))
    for file, outcome in TABLE:
        stage = "pt" if file.startswith("pt_") else "sft"
        if file not in LOADS:
            text = refusal(load, tmp_path, file, stage=stage)
            assert outcome in text, file
            assert str(tmp_path / file) in text
            continue
        rows = load(tmp_path, file, stage).train
        dropped = ", ".join(str(index) for _, index in rows.dropped) or "none"
        assert f"{len(rows)} rows, dropped {dropped}" == outcome, file


def short(text: str, name: str) -> str:
    """Return the problem that a refusal tells, in two lines."""
    head, problem = text.split("\n")
    assert head == "1 problem in the configuration:"
    assert name in problem
    return problem


@pytest.mark.parametrize(("file", "whole", "numbers"), MIXTURES)
def test_proportions_are_taken_or_refused_by_name(
    file: str, whole: str, numbers: str, workspace: Any, tmp_path: Path
) -> None:
    from dataflex.config import load
    from dataflex.mixers.base import normalised
    from dataflex.mixers.static import proportions_of

    (tmp_path / "x.json").write_text(json.dumps([GOOD]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({name: {"file_name": "x.json"} for name in ("web", "code")}))
    keys = {"train_type": "dynamic_mix", "dataset": "web,code", "eval_dataset": None, "dataset_dir": str(tmp_path)}
    values = list(json.loads((FOLDER / file).read_text()).values())
    mixer = {"params": {"proportions": str(FOLDER / file)}}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        (whole, str(FOLDER / file), {"component_name": "static", "dataflex": mixer}),
        (numbers, "init_mixture_proportions", {"init_mixture_proportions": values, "dataflex": None}),
    ]
    for outcome, name, more in asked:
        path = workspace.write("run", **keys, **{"component_name": "odm", **more})
        try:
            given = load(path).keys.init_mixture_proportions
        except ConfigError as error:
            text = str(error)
            assert outcome in text
            assert text.count("\n") < 3
            assert all(name in line for line in text.splitlines()[1:])
            continue
        found = proportions_of(str(FOLDER / file), ("web", "code"), "x") if given is None else normalised(given)
        assert ", ".join(f"{share:.3f}" for share in found) == outcome


@pytest.mark.parametrize(("entry", "outcome"), REGISTRATIONS)
def test_registrations_are_refused_by_name(entry: str, outcome: str, workspace: Any, tmp_path: Path) -> None:
    from dataflex.config import load

    lay_out(tmp_path)
    file, _, name = entry.partition(": ")
    (tmp_path / "dataset_info.json").symlink_to(FOLDER / file)
    with pytest.raises(ConfigError) as raised:
        load(workspace.write("run", dataset=name, eval_dataset=None, val_size=0.5, dataset_dir=str(tmp_path)))
    assert outcome in short(str(raised.value), str(tmp_path / "dataset_info.json"))


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "x.json")


def _circle(folder: Path) -> None:
    (folder / "x.json").symlink_to("y.json")
    (folder / "y.json").symlink_to("x.json")


def _nowhere(folder: Path) -> None:
    (folder / "x.json").symlink_to("gone.json")


def _closed(folder: Path) -> None:
    (folder / "x.json").write_text(json.dumps([GOOD]))
    (folder / "x.json").chmod(0)


def _stray(folder: Path) -> None:
    (folder / "x.json").mkdir()
    (folder / "x.json" / "rows.json").write_text(json.dumps([GOOD]))
    (folder / "x.json" / "README").write_text("rows")


def _within(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        (folder / "x.json").mkdir()
        make(folder / "x.json")

    return lay


def _locked(folder: Path) -> None:
    _within(_closed)(folder)
    (folder / "x.json").chmod(0o300)


ODD_PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (_pipe, "x.json: a pipe, socket or device"),
    "circle": (_circle, "x.json: Too many levels of symbolic links"),
    "nowhere": (_nowhere, "x.json: No such file or directory"),
    "closed": (_closed, "x.json: Permission denied"),
    "stray": (_stray, "found README in the folder"),
    "pipe in a folder": (_within(_pipe), "x.json/x.json: a pipe, socket or device"),
    "circle in a folder": (_within(_circle), "x.json/x.json: Too many levels"),
    "closed in a folder": (_within(_closed), "x.json/x.json: Permission denied"),
    "folder in a folder": (_within(_within(_nowhere)), "x.json/x.json: a folder within a folder"),
    "closed folder": (_locked, "a folder that can be read; "),
}


@pytest.fixture
def as_nobody() -> Any:
    """Be a user whom permissions bind, where tests run as one whom they do not."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)


def unread(folder: str) -> str:
    """Return the text with which the dataset x of a folder is refused before anything is loaded."""
    from dataflex.config.paths import check_files
    from dataflex.config.problems import Origin, Problems

    problems = Problems()
    check_files({"dataset": "x", "dataset_dir": folder}, Origin(Path("run.yaml")), problems)
    with pytest.raises(ConfigError) as raised:
        problems.raise_if_any()
    return str(raised.value)


@pytest.mark.parametrize("case", ODD_PLACES)
def test_what_cannot_be_read_as_a_file_is_refused_by_name(case: str, as_nobody: None) -> None:
    """`validate` says it: behind it a pipe would be waited for without end."""
    make, said = ODD_PLACES[case]
    with tempfile.TemporaryDirectory() as folder:  # one that whoever we are can reach
        info = Path(folder) / "dataset_info.json"
        info.write_text(json.dumps({"x": {"file_name": "x.json"}}))
        make(Path(folder))
        assert said in short(unread(folder), f"{info}: x.file_name")
        for path in Path(folder).glob("x.json"):
            path.chmod(0o700)


@pytest.mark.parametrize("make", [_pipe, _circle, _nowhere, _closed])
def test_a_file_of_registrations_that_cannot_be_read_is_refused(make: Callable[[Path], None], as_nobody: None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        (Path(folder) / "dataset_info.json").symlink_to("x.json")
        assert "found no readable" in short(unread(folder), f"{folder}/dataset_info.json")


def test_a_file_outside_the_folder_is_a_file_as_any(load: Callable[..., Any], workspace: Any, tmp_path: Path) -> None:
    from dataflex.config import load as checked

    (tmp_path / "data").mkdir()
    (tmp_path / "pool.json").symlink_to(FOLDER / "three_rows.json")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "../pool.json"}}))
    assert checked(workspace.write("run", dataset="x", eval_dataset="x", dataset_dir=str(tmp_path / "data")))
    assert len(load(tmp_path / "data", "x").train) == 3


GOOD = {"instruction": "a", "input": "", "output": "b"}


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


ASKED = turns(("human", "q"), ("gpt", "a"))
COLUMNS = {"prompt": "instruction", "response": "output"}
TOOLS = {"messages": "conversations", "tools": "t"}
SHAREGPT = {"formatting": "sharegpt"}
OPENAI = {
    "formatting": "openai",
    "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}


def messages(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


ODD: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "null first": ("json", "null", {}, "line 1: found null"),
    "null row": ("jsonl", lines(GOOD, None), {}, "line 2: found null"),
    "null element": ("json", [GOOD, None], {}, "record 1: found null"),
    "nested lists": ("json", [[GOOD]], {}, "found no field 'instruction'"),
    "deep": ("jsonl", '{"instruction": ' + "[" * 10**5 + "]" * 10**5 + "}", {}, "nested more than 100 deep"),
    "deep lines": ("json", "[\n" * 10**5 + "]\n" * 10**5, {}, "nested more than 100 deep"),
    "scalar": ("json", "5", {}, "found a number; expected a list"),
    "html": ("json", "<html>404</html>", {}, "line 1, column 1: found '<html>404"),
    "python": ("json", "[{'instruction': 1}]", {}, "line 1, column 3"),
    "control": ("jsonl", '{"instruction": "a\0b"}', {}, "Invalid control character"),
    "utf-16": ("json", json.dumps([GOOD]).encode("utf-16-le"), {}, "line 1, column 2"),
    "zip": ("json", b"PK\x03\x04 and so on", {}, "bytes of zip"),
    "big": ("json", [{**GOOD, "id": 10**30}], {}, "more than 64 bits in 'id'"),
    "digits": ("json", '[{"instruction": 1' + "0" * 5000 + "}]", {}, "no JSON value"),
    "number": ("json", [{**GOOD, "output": 5}], {}, "field 'output' (response) holds numbers"),
    "boolean": ("json", [{**GOOD, "output": True}], {}, "holds true and false"),
    "object": ("json", [{**GOOD, "output": {"a": 1}}], {}, "holds values of the type struct"),
    "date": ("jsonl", lines({**GOOD, "output": "2020-01-02"}), {}, "holds dates"),
    "no input": ("json", [{"instruction": "a", "output": "b"}], {}, "no field 'input'; the records have"),
    "history": ("json", [{**GOOD, "h": "x"}], {"columns": {**COLUMNS, "history": "h"}}, "expected lists of"),
    "three": (
        "json",
        [{**GOOD, "h": [["a"] * 3]}],
        {"columns": {**COLUMNS, "history": "h"}},
        "record 0: turn 0 of 'h'",
    ),
    "kto": ("json", [{**GOOD, "tag": True}], {"columns": {**COLUMNS, "kto_tag": "tag"}}, "no usable row"),
    "no media": ("json", [GOOD], {"columns": {**COLUMNS, "images": "images"}}, "no field 'images'"),
    "media": ("json", [{**GOOD, "m": ["x.png"]}], {"columns": {**COLUMNS, "images": "m"}}, "rows with images"),
    "ranking": ("json", [GOOD], {"ranking": True}, "not applicable"),
    "null turns": ("json", [ASKED, {"conversations": None}], SHAREGPT, "record 1: 'conversations' is null"),
    "null turn": ("json", [ASKED, {"conversations": [None]}], SHAREGPT, "record 1: turn 0 is null"),
    "null value": ("json", [ASKED, turns(("human", None), ("gpt", "a"))], SHAREGPT, "record 1: turn 0 has null"),
    "texts": ("json", [{"conversations": ["a", "b"]}], SHAREGPT, "expected lists of objects with 'from' and 'value'"),
    "values": ("json", [turns(("human", 1), ("gpt", 2))], SHAREGPT, "int64"),
    "tools": (
        "json",
        [{**ASKED, "t": "no"}],
        {**SHAREGPT, "columns": {"messages": "conversations", "tools": "t"}},
        "tool",
    ),
    "call": ("json", [turns(("human", "q"), ("function_call", "no"))], SHAREGPT, "record 0: found a record"),
    "role": ("json", [messages(("user", "q"), ("tool", "t"))], OPENAI, "record 0: turn 1 has the role 'tool'"),
    "parts": ("json", [messages(("user", [{"text": "q"}]))], OPENAI, "both texts"),
    "no messages": ("json", [GOOD], OPENAI, "found no field 'messages'"),
    "no fields": ("json", [{}], {}, "found no value in any record"),
    "no fields in lines": ("jsonl", lines({}, {}), {}, "found no value in any record"),
    "csv fields": ("csv", "instruction,input,output\na,,b,c,d\n", {}, "found 5 fields; expected the 3"),
    "csv quote": ("csv", 'instruction,input,output\n"a,,b\n', {}, "line 2: found a quote that is never closed"),
    "csv later quote": ("csv", 'instruction,output\n"a\n",b\n"c,d\n', {}, "line 4: found a quote that is never"),
    "csv odd quote": ("csv", 'instruction,output\n"a"b,c\n"d', {}, "line 2: found what is no CSV"),
    "csv empty": ("csv", "", {}, "found 0 rows"),
    "csv header": ("csv", "instruction,input,output\n", {}, "found 0 rows"),
    "csv latin": ("csv", "instruction,output\nä,b\n".encode("latin-1"), {"columns": COLUMNS}, "0xe4"),
    "parquet": ("parquet", b"PAR1 and so on", {}, "magic bytes"),
    "arrow": ("arrow", b"ARROW1 and so on", {}, "ArrowInvalid"),
    "text": ("txt", "one\ntwo\n", {}, "no field 'instruction'; the records have 'text'"),
    "split": ("json", [GOOD], {"split": "test"}, "Unknown split"),
}
ELSEWHERE = {
    "hub": ({"hf_hub_url": "nobody/nothing"}, "Offline"),
    "s3": ({"cloud_file_name": "s3://bucket/x.json"}, "s3fs"),
    "cloud": ({"cloud_file_name": "ftp://x/y.json"}, "Unsupported protocol"),
    "script": ({"script_url": "x.py"}, "no longer supported"),
    "none": ({"file_name": "none.json"}, "not found"),
    "loop": ({"file_name": "loop.json"}, "not found"),
    "empty": ({"file_name": "empty"}, "empty folder"),
    "two": ({"file_name": "two"}, "b.json: line 1, column 1"),
}


def test_odd_data_is_refused_by_name(load: Callable[..., Any], tmp_path: Path) -> None:
    entries: dict[str, Any] = {name: entry for name, (entry, _) in ELSEWHERE.items()}
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.json").write_text(json.dumps([GOOD]))
    (tmp_path / "two" / "b.json").write_text("oops")
    for name, (kind, content, entry, _) in ODD.items():
        file = tmp_path / f"{name}.{kind}"
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        entries[name] = {"file_name": file.name, **entry}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    expected = {name: text for name, (_, _, _, text) in ODD.items()} | {n: text for n, (_, text) in ELSEWHERE.items()}
    for name, text in expected.items():
        assert text in refusal(load, tmp_path, name), name


def test_a_record_is_named_with_workers_and_in_target_sets(load: Callable[..., Any], tmp_path: Path) -> None:
    odd = turns(("human", "q"), ("gpt", None))
    (tmp_path / "good.json").write_text(json.dumps([ASKED] * 8))
    (tmp_path / "bad.json").write_text(json.dumps([ASKED] * 5 + [odd] + [ASKED] * 4))
    (tmp_path / "worse.json").write_text(json.dumps([ASKED] * 7 + [{"conversations": None}]))
    info = {name: {"file_name": f"{name}.json", **SHAREGPT} for name in ("good", "bad", "worse")}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    for name, record in (("bad", 5), ("worse", 7)):
        assert f"record {record}: " in refusal(load, tmp_path, name, preprocessing_num_workers=2)
        with pytest.raises(DataflexError, match=rf"dataset {name} \(.*{name}\.json\), record {record}: "):
            load(tmp_path, "good", eval_dataset=[name])


def test_empty_prompts_are_said(load: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "empty_prompt.json"}}))
    (tmp_path / "empty_prompt.json").symlink_to(FOLDER / "empty_prompt.json")
    load(tmp_path, "x")
    assert "2 records have an empty prompt and are used all the same; the first: 2, 4" in caplog.text


def test_an_error_of_our_own_stays_what_it_is(
    load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataflex.llamafactory import records

    (tmp_path / "x.json").write_text(json.dumps([GOOD]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json"}}))
    monkeypatch.setattr(records, "MEDIA", 7)  # then a line of that module raises
    with pytest.raises(TypeError, match="not iterable"):
        load(tmp_path, "x")


@pytest.mark.parametrize("kind", ["MemoryError", "OutOfMemoryError"])
def test_memory_that_runs_out_is_not_the_fault_of_data(kind: str) -> None:
    """It stays what it is, so that the command says what to lower; no record is tried again."""
    import builtins

    import torch

    from dataflex.explanation import at_record, explained

    error = getattr(torch if kind == "OutOfMemoryError" else builtins, kind)
    tried: list[int] = []
    with pytest.raises(error), explained("dataset x"), at_record([1, 2], tried.append, str):
        raise error("no room")
    assert not tried


BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "text": ("one.json", "a mapping"),
    "null": (None, "a mapping"),
    "no name": ({}, "text.file_name"),
    "list": ({"file_name": ["one.json"]}, "file_name"),
    "columns": ({"file_name": "one.json", "columns": ["a"]}, "x.columns: found"),
    "no columns": ({"file_name": "one.json", "columns": None}, "x.columns: found"),
    "column": ({"file_name": "one.json", "columns": {"prompt": 5}}, "x.columns.prompt"),
    "misspelt": ({"file_name": "one.json", "columns": {"promt": "a"}}, "did you mean 'prompt'"),
    "tags": ({"file_name": "one.json", "tags": {"role": "a"}}, "x.tags.role"),
    "key": ({"file_name": "one.json", "formating": "sharegpt"}, "did you mean 'formatting'"),
    "formatting": ({"file_name": "one.json", "formatting": ["alpaca"]}, "x.formatting"),
    "ranking": ({"file_name": "one.json", "ranking": "false"}, "true or false"),
    "samples": ({"file_name": "one.json", "num_samples": "5"}, "a whole number"),
    "none": ({"file_name": "one.json", "num_samples": 0}, "a whole number"),
    "split": ({"file_name": "one.json", "split": 5}, "x.split"),
    "hub": ({"hf_hub_url": 5}, "x.hf_hub_url"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_registrations_are_refused_at_validate(case: str, workspace: Any, tmp_path: Path) -> None:
    from dataflex.config import load

    entry, said = BAD_ENTRIES[case]
    (tmp_path / "one.json").write_text(json.dumps([GOOD]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    path = workspace.write("run", dataset="x", eval_dataset="x", dataset_dir=str(tmp_path))
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert said.replace("text.", "x.") in str(raised.value)


def test_the_command_says_it_and_verbose_shows_how_it_arose(
    workspace: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.json").write_text(json.dumps([ASKED, turns(("human", "q"), ("gpt", None))]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json", **SHAREGPT}}))
    path = workspace.write("run", dataset="x", eval_dataset="x", dataset_dir=str(tmp_path))
    for flag in ([], ["-v"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*flag, "train", str(path)])
        assert ended.value.code == 1
        shown = capfd.readouterr().err
        assert f"dataflex: dataset x ({tmp_path}/x.json), record 1: turn 1 has null as 'value'" in shown
        assert "Traceback" not in shown
        assert ("Traceback" in caplog.text) == bool(flag)  # pytest takes the log


def test_a_training_of_llamafactorys_own_says_it_as_well(workspace: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(lines(GOOD) + "\nnull\n")
    (tmp_path / "y.jsonl").write_text(lines(GOOD, {**GOOD, "output": 5}))
    names = ("x", "y")
    (tmp_path / "dataset_info.json").write_text(json.dumps({n: {"file_name": f"{n}.jsonl"} for n in names}))
    method = dict.fromkeys(("component_name", "warmup_step", "update_step", "update_times", "dataflex", "eval_dataset"))
    for name in names:
        path = workspace.write(name, dataset=name, dataset_dir=str(tmp_path), train_type="static", **method)
        with pytest.raises(DataflexError, match=rf"dataset {name} \({tmp_path}/{name}\.jsonl\): line 2: found"):
            workspace.run("train", path)


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
def test_a_damaged_model_is_named(workspace: Any, tiny: Any, tmp_path: Path, file: str) -> None:
    model = shutil.copytree(tiny.model, tmp_path / "model")
    (model / file).write_bytes((model / file).read_bytes()[:100])
    path = workspace.write("run", model_name_or_path=str(model))
    with pytest.raises(ConfigError, match=rf"{model} cannot be loaded: .* \(\w+\)$"):
        workspace.run("train", path)


@pytest.mark.slow
def test_what_loads_can_be_trained_on(workspace: Any, tmp_path: Path) -> None:
    names = [file for file in LOADS if not file.startswith("pt_")]
    lay_out(tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps({file: registration(file) for file in names}))
    keys = {"dataset_dir": str(tmp_path), "max_samples": 8, "cutoff_len": 48, "save_steps": 100}
    run = workspace.write("run", dataset=",".join(names), eval_dataset="three_rows.json", **keys)
    assert workspace.run("train", run)["rows"] > 80


ONE_RANK = """
from dataflex import distributed
from dataflex.errors import DataflexError
import torch
torch.distributed.init_process_group("gloo")
try:
    with distributed.together():
        if distributed.rank() == 1:
            raise DataflexError("met on rank 1")
except DataflexError as error:
    print(f"rank {distributed.rank()}: {error}, everywhere {error.everywhere}", flush=True)
"""


@pytest.mark.slow
def test_several_processes_end_together_and_one_says_it(workspace: Any, tmp_path: Path) -> None:
    def launched(*command: str) -> subprocess.CompletedProcess[str]:
        variables = os.environ | {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "PYTHONPATH": os.getcwd()}
        return subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, timeout=600)

    (tmp_path / "x.json").write_text(json.dumps([ASKED, turns(("human", "q"), ("gpt", None))]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json", **SHAREGPT}}))
    path = workspace.write("run", dataset="x", eval_dataset="x", dataset_dir=str(tmp_path))
    ended = launched("-m", "dataflex.cli", "train", str(path))
    assert ended.returncode != 0
    assert ended.stderr.count(f"dataflex: dataset x ({tmp_path}/x.json), record 1: turn 1 has null") == 1
    script = tmp_path / "script.py"
    script.write_text(ONE_RANK)
    said = launched("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)).stdout
    # The two write at once, so a line's end may come behind the other's text.
    assert sorted(re.findall(r"rank (\d): met on rank 1, everywhere True", said)) == ["0", "1"]
