"""The instruction pool: every source split into pool, target, test and pre-training rows that share no question."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart import stdlib, tasks

Row = dict[str, str]

SOURCES = (*tasks.GENERATED, "docstrings", "code")


@dataclass(frozen=True)
class Split:
    """Rows of one source; no (instruction, input) pair is in two of the four lists."""

    pool: list[Row]
    target: list[Row]
    test: list[Row]
    pretrain: list[Row]


def split(source: str, seed: int, pool: int, target: int, test: int, pretrain: int) -> Split:
    """Draw the given numbers of rows of a source; the pool rows depend on none of the later numbers.

    Raises:
        ValueError: the source has fewer different questions than asked for.
    """
    rows: list[Row] = []
    wanted = pool + target + test + pretrain
    for instruction, given, output in _unique(_draw(source, seed)):
        name = f"{source}-{len(rows):04d}"
        rows.append({"id": name, "source": source, "instruction": instruction, "input": given, "output": output})
        if len(rows) == wanted:
            break
    else:
        raise ValueError(
            f"source {source} has {len(rows)} different questions on this machine, {wanted} were asked for; "
            "the standard library's .py files may have been removed: use a complete Python installation"
        )
    a, b, c = pool, pool + target, pool + target + test
    return Split(rows[:a], rows[a:b], rows[b:c], rows[c:])


def _draw(source: str, seed: int) -> Iterator[tasks.Task]:
    """Yield the source's tasks in an order that the seed decides; a generated source never ends."""
    if source in tasks.GENERATED:
        yield from tasks.stream(source, seed)
    else:
        found = list({"docstrings": stdlib.docstrings, "code": stdlib.code}[source]())
        random.Random(f"{source}/{seed}").shuffle(found)
        yield from found


def _unique(drawn: Iterable[tasks.Task], patience: int = 10_000) -> Iterator[tasks.Task]:
    """Yield each question once; stop after `patience` repeats in a row, when the source is used up."""
    seen: set[tuple[str, str]] = set()
    repeats = 0
    for instruction, given, output in drawn:
        if (instruction, given) in seen:
            repeats += 1
            if repeats == patience:
                return
            continue
        repeats = 0
        seen.add((instruction, given))
        yield instruction, given, output


def turns(row: Row) -> tuple[str, str]:
    """Return the prompt and the answer as LLaMA-Factory's `template: qwen3_nothink` writes an alpaca record."""
    question = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{row['output']}<|im_end|>\n"


def write_datasets(folder: Path, datasets: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write each dataset as a JSON array, and the `dataset_info.json` that names them to LLaMA-Factory.

    Rows that have the key `text` are pre-training text, all others alpaca records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    info: dict[str, dict[str, Any]] = {}
    for name, rows in datasets.items():
        _write_json(folder / f"{name}.json", rows)
        info[name] = {"file_name": f"{name}.json"}
        if "text" in rows[0]:
            info[name]["columns"] = {"prompt": "text"}
    _write_json(folder / "dataset_info.json", info)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
