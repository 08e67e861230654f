"""What a run file names on disk: model, datasets, DeepSpeed configuration. Remote names are left alone."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex.config.problems import Origin, Problems
from dataflex.config.registration import REMOTE, check_types

_EXTENSIONS = ("arrow", "csv", "json", "jsonl", "parquet", "txt")
_FORMATTINGS = ("alpaca", "sharegpt", "openai")
_PEEK = 1 << 20  # bytes in which the first record of a file has to end to be looked at


def check_files(values: Mapping[str, Any], tests: Sequence[str], origin: Origin, problems: Problems) -> None:
    """Note every local file that is named and not there.

    Args:
        values: LLaMA-Factory's keys.
        tests: `dataflex.test_dataset`.
        origin: where they were written.
        problems: takes what is wrong.
    """
    for key, mark in (("model_name_or_path", "config.json"), ("adapter_name_or_path", "adapter_config.json")):
        for name in names(values.get(key)):
            folder = os.path.expanduser(name)
            file = os.path.join(folder, mark)
            if os.path.isdir(folder) and not os.path.isfile(file):
                problems.add(origin, key, f"a folder with {mark}", name)
            elif os.path.isdir(folder):
                json_object(Path(file), problems)
            elif not os.path.exists(folder) and _is_path(name):
                problems.add(origin, key, "a folder that exists, or a name on the Hub (owner/name)", name)
    resumed = values.get("resume_from_checkpoint")
    if isinstance(resumed, str) and not os.path.isdir(resumed):
        problems.add(origin, "resume_from_checkpoint", "the folder of a checkpoint, or true for the newest", resumed)
    _check_datasets(values, tests, origin, problems)


def dataset_files(wanted: Sequence[str], directory: str) -> dict[str, list[Path]]:
    """Return the files of each registered dataset; none of one that is not on this machine, or not registered."""
    problems, info = Problems(), Path(directory) / "dataset_info.json"
    entries = (json_object(info, problems) if info.is_file() else None) or {}
    found: dict[str, list[Path]] = {}
    for name in wanted:
        entry = entries.get(name)
        file = entry.get("file_name") if isinstance(entry, dict) and not any(key in entry for key in REMOTE) else None
        path = None if file is None else info.parent / str(file)
        found[name] = [] if path is None else sorted(path.iterdir()) if path.is_dir() else [path]
    return found


def names(value: Any) -> list[str]:
    """Return the items of a comma-separated text or of a list."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [part.strip() for part in parts if isinstance(part, str) and part.strip()]


def repeated(values: Mapping[str, Any]) -> list[str]:
    """Say which datasets are named more than once: LLaMA-Factory puts their rows together as often."""
    counts = Counter(names(values.get("dataset")))
    return [f"dataset: names {name} {count} times; each of its rows is there as often" for name, count in counts.items()
            if count > 1]  # fmt: skip


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def _unreadable(file: Path) -> str | None:
    """Return why a file cannot be read, None if it seems that it can; a pipe would be waited for without end."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        return error.strerror
    if not stat.S_ISREG(mode):
        return "a folder within a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
    may = os.access(file, os.R_OK, effective_ids=os.access in os.supports_effective_ids)
    return None if may else os.strerror(errno.EACCES)


def json_object(file: Path, problems: Problems) -> dict[str, Any] | None:
    """Return the object that a JSON file holds; None where it holds none, which is noted."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        problems.say(Origin(file), "", f"found no readable file ({error.strerror}); expected a JSON object")
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        problems.say(Origin(file), "", f"found text that is not JSON ({error}); expected an object", line=line)
    else:
        if isinstance(found, dict):
            return found
        problems.add(Origin(file), "", "a JSON object", found)
    return None


def _check_datasets(values: Mapping[str, Any], tests: Sequence[str], origin: Origin, problems: Problems) -> None:
    """Check that datasets are registered in dataset_info.json, and that the files of their entries are there."""
    directory = values.get("dataset_dir", "data")
    for key in ("dataset", "eval_dataset"):
        given = values.get(key)
        if isinstance(given, str) and given and not all(part.strip() for part in given.split(",")):
            problems.add(origin, key, "a name between any two commas", given)
    wanted = [(key, name) for key in ("dataset", "eval_dataset") for name in names(values.get(key))]
    wanted += [("dataflex.test_dataset", name) for name in tests]
    if not wanted or not isinstance(directory, str) or directory == "ONLINE" or directory.startswith("REMOTE:"):
        return
    path = Path(directory) / "dataset_info.json"
    info = Origin(path)
    try:
        if why := _unreadable(path):  # first: opening a pipe would wait without end
            raise OSError(0, why)
        entries = json.loads(path.read_text("utf-8"))
    except OSError as error:
        text = f"found no readable {path} ({error.strerror}); expected it to register {wanted[0][1]}"
        problems.say(origin, "dataset_dir", text, "The path is relative to the working folder; the default is data")
        return
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        problems.say(info, "", f"found text that is not JSON ({error}); expected an object of datasets", line=line)
        return
    if not isinstance(entries, dict):
        problems.add(info, "", "an object of datasets", entries)
        return
    for key, name in wanted:
        if name not in entries:
            problems.add(origin, key, f"a dataset registered in {path}", name, known=entries)
        else:
            _check_entry(name, entries[name], values, info, problems)


def _check_entry(name: str, entry: Any, values: Mapping[str, Any], info: Origin, problems: Problems) -> None:
    """Check one registration: its types, and the file or folder that it points to."""
    if not isinstance(entry, dict):
        problems.add(info, name, "a mapping with file_name", entry)
        return
    check_types(name, entry, info, problems)
    if (formatting := entry.get("formatting", "alpaca")) not in _FORMATTINGS:
        problems.add(info, f"{name}.formatting", f"one of {', '.join(_FORMATTINGS)}", formatting, _FORMATTINGS)
    if entry.get("ranking") and values.get("stage", "sft") in ("sft", "pt"):
        problems.add(info, f"{name}.ranking", "no preference pairs in stage sft or pt", entry["ranking"])
    columns = entry.get("columns")
    if isinstance(columns, dict) and columns.get("kto_tag") and values.get("stage", "sft") in ("sft", "pt"):
        why = "LLaMA-Factory would make pairs for stage kto of the records, and drop every one of them"
        problems.add(info, f"{name}.columns.kto_tag", "no such column in stage sft or pt", columns["kto_tag"], why=why)
    if any(key in entry for key in REMOTE):
        return
    file_name = entry.get("file_name")
    if not isinstance(file_name, str):
        expected = f"a file, relative to {info.file.parent} (or one of {', '.join(REMOTE)})"
        problems.add(info, f"{name}.file_name", expected, file_name)
        return
    path = info.file.parent / file_name
    is_folder = os.path.isdir(path)
    try:
        files = sorted(path.iterdir()) if is_folder else [path]
    except OSError as error:
        problems.add(info, f"{name}.file_name", f"a folder that can be read; {path}: {error.strerror}", file_name)
        return
    kinds = {file.suffix.removeprefix(".") for file in files}
    if not files:
        problems.add(info, f"{name}.file_name", "a folder with data files", file_name)
    elif not os.path.lexists(path):
        problems.add(info, f"{name}.file_name", f"a file that exists; {path} does not", file_name)
    elif bad := [file for file in files if file.suffix.removeprefix(".") not in _EXTENSIONS]:
        what = (
            f"files ending in {path.suffix[1:]} at {path}" if path.suffix else f"a file without an extension at {path}"
        )
        if is_folder:
            what = f"{', '.join(file.name for file in bad[:5])}{', ...' if bad[5:] else ''} in the folder {path}"
        problems.say(info, f"{name}.file_name", f"found {what}; expected one of {', '.join(_EXTENSIONS)}")
    elif wrong := next(((file, reason) for file in files if (reason := _unreadable(file))), None):
        problems.add(info, f"{name}.file_name", f"a file that can be read; {wrong[0]}: {wrong[1]}", file_name)
    elif len(kinds - {"json", "jsonl"}) + bool(kinds & {"json", "jsonl"}) > 1:
        text = f"found files of several types in {path} ({', '.join(sorted(kinds))}); expected one type"
        problems.say(info, f"{name}.file_name", text)
    elif not is_folder:
        _check_columns(name, entry, files[0], info, problems)


def _check_columns(name: str, entry: Mapping[str, Any], file: Path, info: Origin, problems: Problems) -> None:
    """Look for the column of the prompt in the first record, if that can be read at a glance."""
    column = "messages" if entry.get("formatting", "alpaca") != "alpaca" else "prompt"
    columns = entry.get("columns")
    record = _first_record(file)
    if not isinstance(columns, dict) or column not in columns or record is None:
        return
    if columns[column] not in record:
        expected = f"a key of the records in {file}: {', '.join(map(repr, record))}"
        problems.add(info, f"{name}.columns.{column}", expected, columns[column], record)


def _first_record(file: Path) -> dict[str, Any] | None:
    """Return the first record of a JSON or JSON Lines file, or None where that takes more than a look."""
    if file.suffix not in (".json", ".jsonl"):
        return None
    try:
        with open(file, "rb") as stream:
            text = stream.read(_PEEK).decode("utf-8-sig", errors="ignore").lstrip()
        record, _ = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())
    except (OSError, ValueError, RecursionError):
        return None  # what is wrong with the data is said when they are loaded
    return record if isinstance(record, dict) else None
