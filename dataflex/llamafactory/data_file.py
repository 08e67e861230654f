"""Faults of a data file (JSON, JSON Lines, CSV, Parquet), found by reading the file again once loading has failed."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex.explanation import kind

_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "Parquet"}

_DEEPEST = 100  # far beyond any record; 50,000 were seen to end pyarrow's parser in a segmentation fault
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def unsafe(path: str | os.PathLike[str]) -> str | None:
    """Say what makes a file, or a file of a folder, dangerous to load; None if nothing does.

    Asked before it is loaded. A line `null` ends pyarrow's parser of JSON with a segmentation fault, and so does deep
    nesting, after a time that grows with the square of the depth. In CSV, pandas takes fields without a name for labels
    of the rows, and shifts the others.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.iterdir())
        found = ((file, unsafe(file)) for file in files if file.is_file())
        empty = None if files else "found an empty folder; expected data files"
        return empty or next((f"{file.name}: {text}" for file, text in found if text), None)
    if path.is_file() and path.suffix == ".csv":
        return _unnamed_fields(path)
    return _crashing(path) if path.is_file() and path.suffix in (".json", ".jsonl") else None


def _unnamed_fields(path: Path) -> str | None:
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        try:
            first = [row for row, _ in zip(csv.reader(file), range(2), strict=False)]
        except csv.Error:
            return None  # what pandas makes of it, it says itself
    if len(first) == 2 and len(first[1]) > len(first[0]):
        return f"record 0: found {len(first[1])} fields; expected the {len(first[0])} that the first line names"
    return None


def _crashing(path: Path) -> str | None:
    depth = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(tuple(_MARKS)):
                return None
            if depth == 0 and line.removeprefix(b"\xef\xbb\xbf").strip() == b"null":
                return f"line {number}: found null; expected an object"
            if depth == 0 and line[:1] == b"{" and line.count(b"[") + line.count(b"{") <= _DEEPEST:
                if line.rstrip().endswith(b"}"):
                    continue  # one record that cannot be too deep, as nearly all are
            for bracket in _TEXT.sub(b"", line).translate(None, _NO_BRACKETS):
                depth += 1 if bracket in b"[{" else -1
                if depth > _DEEPEST:
                    return f"line {number}: found lists or objects nested more than {_DEEPEST} deep; expected texts"
    return None


def fault(path: str | os.PathLike[str]) -> str | None:
    """Return what is wrong with a file, or with the first such file of a folder; None if nothing is seen.

    Line numbers begin at 1, as editors count; record numbers at 0, as everywhere in this package.
    """
    path = Path(path)
    if path.is_dir():
        found = ((file, fault(file)) for file in sorted(path.iterdir()) if file.is_file())
        return next((f"{file.name}: {text}" for file, text in found if text), None)
    if path.is_file() and path.suffix == ".csv":
        return _undecodable(path.read_bytes()) or _of_csv(path)
    if path.is_file() and path.suffix == ".parquet":
        return _of_parquet(path)
    if not path.is_file() or path.suffix not in (".json", ".jsonl"):
        return None
    content = path.read_bytes()
    if not content.strip():
        return "found an empty file; expected records"
    if (mark := next((m for m in _MARKS if content.startswith(m)), None)) is not None:
        return f"found bytes of {_MARKS[mark]}; expected JSON in UTF-8"
    if undecodable := _undecodable(content):
        return undecodable
    wrong = _of_text(content.decode("utf-8-sig"))
    if wrong is None and content.startswith(b"\xef\xbb\xbf"):
        return "found a byte order mark before the first record; expected UTF-8 without one"
    return wrong


def _undecodable(content: bytes) -> str | None:
    """Return where the first byte is that is not of UTF-8, or None."""
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"line {line}: found byte 0x{content[error.start]:02x} at position {error.start}; expected UTF-8"
    return None


def _of_parquet(path: Path) -> str | None:
    """Return what the loader of datasets does not take in a file that is Parquet; None if nothing is seen."""
    try:
        schema, rows = pq.read_schema(path), pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError):
        return None  # no Parquet file, as the loader says itself
    if rows == 0:
        return "found 0 rows; expected at least one"
    if twice := [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]:
        return f"found several columns called {twice[0]!r}; expected a name of its own for each"
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        is_read = features.get("features") is None or isinstance(features["features"], dict)
    except (ValueError, TypeError, AttributeError):
        is_read = False
    if not is_read:
        return (
            "found metadata called 'huggingface' that the datasets library did not write; expected no such metadata. "
            "Write the table again without it (pyarrow's table.replace_schema_metadata(None))"
        )
    return None


def _of_csv(path: Path) -> str | None:
    """Return what is wrong with a table: no line below the names, or a quote that is never closed."""
    begun, count = 1, 0
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for count, _ in enumerate(reader, 1):  # noqa: B007
                begun = reader.line_num + 1
        except csv.Error as error:
            if "unexpected end" in str(error):
                return f"line {begun}: found a quote that is never closed; expected one at the end of the field"
            return f"line {begun}: found what is no CSV ({error})"
    return None if count > 1 else "found 0 rows; expected at least one below the names of the columns"


def _of_text(text: str) -> str | None:
    # JSON Lines if the first line is whole; "\n" alone ends a line, U+2028 in a text does not.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        first = _parsed(lines[0][1])
    except ValueError:
        first = None
    try:
        if first is not None and len(lines) > 1:
            return _of_records((f"line {number}", _parsed(line, number, _once)) for number, line in lines)
        whole = first if first is not None else _parsed(text)
    except ValueError as error:
        return str(error)
    if not isinstance(whole, list):
        return f"found {kind(whole)}; expected a list of objects, or one object per line"
    if not whole:
        return "found 0 rows; expected at least one"
    return _of_records((f"record {i}", record) for i, record in enumerate(whole))


def _parsed(text: str, line: int = 1, pairs: Any = None) -> Any:
    """Parse one value; `pairs` makes an object of its keys and values.

    Raises:
        ValueError: with line and column of the file, and what was found.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        beginning = text[error.pos : error.pos + 20].partition("\n")[0]
        raise ValueError(
            f"line {error.lineno + line - 1}, column {error.colno}: found {beginning!r}; expected JSON ({error.msg})"
        ) from error
    except RecursionError as error:
        raise ValueError(f"line {line}: found lists or objects nested too deeply; expected texts") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise ValueError(f"line {line}: found what is no JSON value ({error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object whose keys differ: pyarrow, which reads JSON Lines, refuses it otherwise."""
    for i, (key, _) in enumerate(pairs):
        if any(key == other for other, _ in pairs[:i]):
            raise ValueError(f"the key {key!r} stands twice in an object")
    return dict(pairs)


def _of_records(records: Iterator[tuple[str, Any]]) -> str | None:
    """Return the first record that is no object, or one of whose fields is of another type than before.

    A column has one type: pyarrow refuses the whole file otherwise.
    """
    seen: dict[str, tuple[str, str]] = {}
    for place, record in records:
        if not isinstance(record, dict):
            return f"{place}: found {kind(record)}; expected an object"
        for name, value in record.items():
            if value is None:
                continue
            if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
                return f"{place}: found a number of more than 64 bits in {name!r}; write it as a text"
            before, where = seen.setdefault(name, (kind(value), place))
            if kind(value) != before:
                return (
                    f"{place}: found {kind(value)} in {name!r}; {where} has {before} there. "
                    "Give the field one type in all records"
                )
            if isinstance(value, str) and not value.isascii() and (odd := _surrogate(value)):
                return f"{place}: found the lone surrogate {odd} in {name!r}; expected text that UTF-8 can hold"
    return None if seen else "found no value in any record; expected objects with texts"


def _surrogate(text: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None
