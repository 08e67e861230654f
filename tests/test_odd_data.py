"""What is wrong with a record or a file that cannot be used is said by its cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from llamafactory.data.parser import DatasetAttr

from dataflex.llamafactory.columns import odd_record
from dataflex.llamafactory.data_file import fault


def attributes(entry: dict[str, Any]) -> DatasetAttr:
    made = DatasetAttr("file", "x.json")
    made.join(entry)
    return made


def odd(*turns: tuple[str, str], **fields: Any) -> str | None:
    """Hold a conversation against LLaMA-Factory's default tags."""
    record = {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}
    entry = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "t"}}
    return odd_record(record, attributes(entry))


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("user", "q"), ("assistant", "a")], "turn 0 has the role 'user'; expected one of 'human', 'gpt', "),
        ([("gpt", "a"), ("human", "q")], "turn 0 has the role 'gpt'; expected 'human' (user_tag) or 'observation' ("),
        ([("human", "q"), ("human", "q")], "turn 1 has the role 'human'; expected 'gpt' (assistant_tag) or 'function_"),
        ([("system", "s"), ("gpt", "a")], "turn 1 has the role 'gpt'; expected 'human'"),
        ([("human", "q"), ("system", "s")], "turn 1 has the role 'system'; expected 'gpt'"),
        (
            [("human", "q"), ("gpt", "a"), ("human", "q")],
            "found 3 turns; expected an even number, the last of them the",
        ),
        ([], "found 0 turns; expected an even number"),
        ([("system", "s")], "found 0 turns"),
        ([("human", "q"), ("function_call", "[1, 2]")], "a function call is '[1, 2]'; expected the JSON of an object"),
        ([("human", "q"), ("function_call", '{"name": "f"}')], "with name and arguments"),
    ],
)
def test_a_conversation_that_is_dropped_has_a_reason(turns: list[tuple[str, str]], expected: str) -> None:
    assert expected in str(odd(*turns))


@pytest.mark.parametrize("tools", ["3", '"x"', "[1]", "{}", "null", "true"])
def test_tools_that_are_none(tools: str) -> None:
    assert "expected the JSON of a list of objects" in str(odd(("human", "q"), ("gpt", "a"), t=tools))


def test_what_is_right_is_not_odd() -> None:
    call = json.dumps({"name": "f", "arguments": {}})
    assert odd(("system", "s"), ("human", "q"), ("gpt", "a"), ("human", "q"), ("function_call", call)) is None
    assert odd(("human", "q"), ("function_call", f"[{call}]"), ("observation", "o"), ("gpt", "a"), t="[]") is None


def test_an_answer_or_a_turn_before_it_that_is_no_text() -> None:
    alpaca = attributes({"columns": {"prompt": "i", "response": "o", "history": "h"}})
    assert "turn 0 of 'h' is ['a', None]; expected [prompt, answer]" in str(
        odd_record({"i": "q", "o": "a", "h": [["a", None]]}, alpaca)
    )
    assert odd_record({"i": "q", "o": None, "h": []}, alpaca) == "'o' is null; expected a text"
    assert odd_record({"i": "q", "o": "a", "h": None}, alpaca) is None


def test_a_table_that_the_loader_does_not_take(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    whole = pa.table({"a": ["x"], "b": ["y"]})
    for table, expected in (
        (whole, None),
        (whole.slice(0, 0), "found 0 rows; expected at least one"),
        (whole.rename_columns(["a", "a"]), "found several columns called 'a'; expected a name of its own for each"),
        *(
            (whole.replace_schema_metadata({"huggingface": text}), "found metadata called 'huggingface'")
            for text in ("", "{", "[]", "3", '{"info": 3}', '{"info": {"features": 3}}')
        ),
    ):
        pq.write_table(table, file)
        assert str(fault(file)).startswith(str(expected))
    file.write_bytes(b"PAR1 and so on")
    assert fault(file) is None  # as the loader says
    text = tmp_path / "x.csv"
    text.write_bytes("instruction,output\na,b\nc,d\xe4\n".encode("latin-1"))
    assert fault(text) == "line 3: found byte 0xe4 at position 26; expected UTF-8"
