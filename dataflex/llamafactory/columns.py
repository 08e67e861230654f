"""Check that the fields which a dataset's registration names are there, and have types that LLaMA-Factory reads.

Asked before the conversion, because that drops rows whose answer is no text, and takes a history that is no list for
none, without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.types as kinds
from datasets import Dataset

from dataflex.explanation import kind

_ALPACA = ("prompt", "query", "response", "history", "system", "tools", "kto_tag", "images", "videos", "audios")
_SHAREGPT = ("messages", "system", "tools", "kto_tag", "images", "videos", "audios")
_OPENAI = ("messages", "kto_tag", "images", "videos", "audios")
_NAMED = {"alpaca": _ALPACA, "sharegpt": _SHAREGPT, "openai": _OPENAI}
"""What a converter reads of every record, if it has a name."""


def unfit(dataset: Dataset, attributes: Any, stage: str) -> str | None:
    """Return what is wrong with a dataset's fields, or None.

    Args:
        dataset: raw records.
        attributes: LLaMA-Factory's, of the dataset.
        stage: `sft` or `pt`; in `pt` only the prompt is read.
    """
    schema = dataset.features.arrow_schema
    for key in _NAMED.get(str(attributes.formatting), ()):
        name = getattr(attributes, key)
        if key == "messages" and not name:
            return "columns.messages names no field in dataset_info.json; expected the one that has the conversation"
        if not name:
            continue
        if name not in schema.names:
            fields = ", ".join(repr(field) for field in schema.names if not field.startswith("__"))
            return (
                f"found no field {name!r}; the records have {fields}. Name what is there under {key!r} in `columns` in "
                f"dataset_info.json; where `columns` is written without {key!r}, the records need none"
            )
        found, expected = schema.field(name).type, None
        if key == "messages":
            expected = _expected_messages(found, attributes)
        elif key == "history" and not _is(found, kinds.is_list, kinds.is_large_list):
            expected = "lists of [prompt, answer]"
        elif key in ("prompt", "query") or (key in ("response", "system", "tools") and stage == "sft"):
            expected = None if _is_text(found) else "text"
        has_values = dataset.data.column(name).null_count < len(dataset.data)
        if expected is not None and has_values:  # an empty column of CSV is one of numbers
            return (
                f"field {name!r} ({key}) holds {_in_words(found)}; expected {expected}. "
                "Write the records as JSON with that in all of them"
            )
    return None


def odd_record(record: Mapping[str, Any], attributes: Any) -> str | None:
    """Return what is odd about a record that cannot be made into a row, or None if nothing is seen."""
    if attributes.formatting == "alpaca":
        turns = record.get(attributes.history) if attributes.history else None
        for i, turn in enumerate(turns or []):
            if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
                return f"turn {i} of {attributes.history!r} is {turn!r:.60}; expected [prompt, answer], both texts"
        if attributes.response and not isinstance(answer := record.get(attributes.response), str):
            return f"{attributes.response!r} is {kind(answer)}; expected a text"
        return None
    role, content = attributes.role_tag, attributes.content_tag
    turns = record.get(attributes.messages)
    if not isinstance(turns, list):
        return f"{attributes.messages!r} is {kind(turns)}; expected a list of turns"
    tags = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
    known = [getattr(attributes, tag) for tag in tags if getattr(attributes, tag)]
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            return f"turn {i} is {kind(turn)}; expected an object with {role!r} and {content!r}"
        if turn.get(role) not in known:
            return (
                f"turn {i} has the role {turn.get(role)!r}; expected one of {', '.join(map(repr, known))} "
                f"(`tags` in dataset_info.json: {', '.join(tags)})"
            )
        if not isinstance(turn.get(content), str) and not turn.get("tool_calls"):
            return f"turn {i} has {kind(turn.get(content))} as {content!r}; expected a text"
    calls = [turn.get(content) for turn in turns if turn[role] == attributes.function_tag]
    for text, what in (
        (record.get(attributes.tools) if attributes.tools else None, "tools"),
        *((c, "call") for c in calls),
    ):
        if isinstance(text, str) and (odd := _odd_json(text, what)):
            return odd
    return _out_of_turn([turn[role] for turn in turns], attributes) if attributes.formatting == "sharegpt" else None


def _odd_json(text: str, what: str) -> str | None:
    """Return what is odd about the JSON of tools or of calls, or None; text that is no JSON LLaMA-Factory reports."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if what == "tools":
        is_right = isinstance(value, list) and all(isinstance(tool, dict) for tool in value)
        return (
            None
            if is_right
            else f"the tools are {text!r:.60}; expected the JSON of a list of objects, one for each tool"
        )
    calls = value if isinstance(value, list) else [value]
    if all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        return None
    return (
        f"a function call is {text!r:.60}; expected the JSON of an object with name and arguments, or of a list of such"
    )


def _out_of_turn(roles: list[str], attributes: Any) -> str | None:
    """Return what is odd about the order of a conversation's roles, or None: LLaMA-Factory drops it."""
    begins = 1 if attributes.system_tag and roles[:1] == [attributes.system_tag] else 0
    for i, role in enumerate(roles[begins:], begins):
        tags = (("user_tag", "observation_tag"), ("assistant_tag", "function_tag"))[(i - begins) % 2]
        expected = [getattr(attributes, tag) for tag in tags]
        if role not in expected:
            named = " or ".join(f"{value!r} ({tag})" for value, tag in zip(expected, tags, strict=True) if value)
            return f"turn {i} has the role {role!r}; expected {named}, as users and the model take turns"
    if (count := len(roles) - begins) % 2 or not count:
        return f"found {count} turns; expected an even number, the last of them the model's answer"
    return None


def _expected_messages(found: pa.DataType, attributes: Any) -> str | None:
    """Return what a field of conversations should hold, or None if it does."""
    role, content = attributes.role_tag, attributes.content_tag
    expected = f"lists of objects with {role!r} and {content!r}, both texts (role_tag and content_tag in `tags`)"
    if _is(found, kinds.is_null) or (
        _is(found, kinds.is_list, kinds.is_large_list) and kinds.is_null(found.value_type)
    ):
        return None  # no turn anywhere: every record is dropped, and that is said
    if not _is(found, kinds.is_list, kinds.is_large_list) or not kinds.is_struct(found.value_type):
        return expected
    turn = found.value_type
    there = {turn.field(i).name: turn.field(i).type for i in range(turn.num_fields)}
    return None if all(tag in there and _is_text(there[tag]) for tag in (role, content)) else expected


def _is(found: pa.DataType, *tests: Any) -> bool:
    return any(test(found) for test in (kinds.is_null, *tests))


def _is_text(found: pa.DataType) -> bool:
    if kinds.is_dictionary(found):
        found = found.value_type
    return _is(found, kinds.is_string, kinds.is_large_string)


def _in_words(found: pa.DataType) -> str:
    if kinds.is_temporal(found):
        return f"dates (texts that all look like dates are read as such: {found})"
    if kinds.is_boolean(found) or kinds.is_integer(found) or kinds.is_floating(found):
        return f"{'true and false' if kinds.is_boolean(found) else 'numbers'} ({found})"
    return f"values of the type {str(found)[:120]}"
