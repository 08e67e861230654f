"""Odd records and files are refused by name, with the record that is wrong; what is odd and usable is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import DataflexError
from tests.bad_data import ASKED, FOLDER, GOOD, SHAREGPT, lines, refusal, turns

COLUMNS = {"prompt": "instruction", "response": "output"}


TOOLS = {"messages": "conversations", "tools": "t"}


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
    "gs": ({"cloud_file_name": "gs://bucket/x.json"}, "gcsfs"),
    "cloud": ({"cloud_file_name": "ftp://x/y.json"}, "Unsupported protocol"),
    "script": ({"script_url": "x.py"}, "no longer supported"),
    "none": ({"file_name": "none.json"}, "not found"),
    "loop": ({"file_name": "loop.json"}, "not found"),
    "empty": ({"file_name": "empty"}, "empty folder"),
    "two": ({"file_name": "two"}, "b.json: line 1, column 1"),
}


def test_odd_data_is_refused_by_name(
    load_dataset: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as without the extra
    known = sys.modules["fsspec.registry"]._registry  # which `fsspec.registry` shadows
    for name in ("gs", "gcs"):
        monkeypatch.delitem(known, name, raising=False)
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
        assert text in refusal(load_dataset, tmp_path, name), name


def test_a_record_is_named_with_workers_and_in_target_sets(load_dataset: Callable[..., Any], tmp_path: Path) -> None:
    odd = turns(("human", "q"), ("gpt", None))
    (tmp_path / "good.json").write_text(json.dumps([ASKED] * 8))
    (tmp_path / "bad.json").write_text(json.dumps([ASKED] * 5 + [odd] + [ASKED] * 4))
    (tmp_path / "worse.json").write_text(json.dumps([ASKED] * 7 + [{"conversations": None}]))
    info = {name: {"file_name": f"{name}.json", **SHAREGPT} for name in ("good", "bad", "worse")}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    for name, record in (("bad", 5), ("worse", 7)):
        assert f"record {record}: " in refusal(load_dataset, tmp_path, name, preprocessing_num_workers=2)
        with pytest.raises(DataflexError, match=rf"dataset {name} \(.*{name}\.json\), record {record}: "):
            load_dataset(tmp_path, "good", eval_dataset=[name])


def test_empty_prompts_are_said(
    load_dataset: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "empty_prompt.json"}}))
    (tmp_path / "empty_prompt.json").symlink_to(FOLDER / "empty_prompt.json")
    load_dataset(tmp_path, "x")
    assert "2 records have an empty prompt and are used all the same; the first: 2, 4" in caplog.text


def test_an_error_of_our_own_stays_what_it_is(
    load_dataset: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataflex.llamafactory import records

    (tmp_path / "x.json").write_text(json.dumps([GOOD]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json"}}))
    monkeypatch.setattr(records, "MEDIA", 7)  # then a line of that module raises
    with pytest.raises(TypeError, match="not iterable"):
        load_dataset(tmp_path, "x")


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
