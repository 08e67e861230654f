"""Make the data of the evidence: `python -m examples.real.evidence_data OUT [--from FOLDER]`.

`evidence.csv` names each row: the set that it is in, its source, split and locator upstream, the number of its wording
(empty where the instruction is upstream's own) and the SHA-256 of its three texts. Without `--from` the files of
`upstream.SOURCES` are downloaded at their pinned commits (11 MB) and turned into rows; with it, rows are looked up
by name in the JSON arrays of a folder (`pool/`, `val/` and `test/`, one file a source). Either way each digest has to
be the written one, so both ways make the same files, byte for byte.

How the sets were drawn: rows of at most 512 tokens (SmolLM2's, with its template), of each source in the order of the
SHA-256 of `evidence:` and the row's name, tests first, then targets, then the pool; a row is left out whose words
overlap with those of a row already drawn by a Jaccard index of 0.8 or more. So no row is in two sets, and none of the
pool or of a target nearly repeats a test row. The pool has 200 rows of each of five sources; `one` is of banking77;
`mixed` of gsm8k and mbpp, half and half; `topic` of what `has_topic` says. The pool and `mixed` are written a second
time, source by source (`evidence_pool_gsm8k`, ...), for methods that mix domains or take turns between target sets.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import http.client
import json
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from examples.real.upstream import SOURCES, Texts, row_id

MANIFEST = Path(__file__).with_name("evidence.csv")

COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}


class Entry(NamedTuple):
    """A line of the manifest."""

    set: str
    source: str
    split: str
    locator: str
    wording: str
    sha256: str

    @property
    def id(self) -> str:
        """The row's name."""
        return row_id(self.source, self.split, self.locator)


class DataError(Exception):
    """The data could not be made; the message says which row or file, and why."""


def manifest() -> list[Entry]:
    """Read `evidence.csv`, in the order in which rows are written."""
    with MANIFEST.open(encoding="utf-8", newline="") as lines:
        return [Entry(**line) for line in csv.DictReader(lines)]


def digest(texts: Texts) -> str:
    """Return the SHA-256 of the three texts, joined by NUL, in UTF-8."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def has_topic(source: str, output: str) -> bool:
    """Say whether a row is of the set `topic`: a bank's customer asks about topping up (ten intents of 77)."""
    return source == "banking77" and ("top_up" in output or "topping_up" in output)


def published(entries: Iterable[Entry]) -> Iterator[tuple[str, Texts]]:
    """Yield (name, texts) of the entries' rows, made of the published files, which are downloaded one after the other.

    Raises:
        DataError: a file cannot be had, or lacks a record.
    """
    wanted: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in entries:
        wanted.setdefault((entry.source, entry.split), {})[entry.locator] = entry
    for (name, split), missing in wanted.items():
        source = SOURCES[name]
        for locator, record in source.records(_download(source.url(split))):
            if locator in missing:
                entry = missing.pop(locator)
                yield entry.id, source.texts(record, source.wordings[int(entry.wording)] if entry.wording else "")
        if missing:
            raise DataError(f"{source.url(split)} has no record {next(iter(missing))} ({len(missing)} are missing)")


def _download(url: str) -> str:
    print(f"downloading {url}", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return str(answer.read().decode("utf-8"))
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"cannot download {url} ({error}); with the rows in a folder, give --from FOLDER") from error


def of_folder(folder: Path) -> Iterator[tuple[str, Texts]]:
    """Yield (name, texts) of all rows in a folder's JSON arrays.

    Raises:
        DataError: the folder has no such files.
    """
    paths = [p for p in sorted(folder.glob("*/*.json")) if p.parent.name in ("pool", "val", "test")]
    if not paths:
        raise DataError(f"found no pool/*.json, val/*.json or test/*.json in {folder}")
    for path in paths:
        for row in json.loads(path.read_text("utf-8")):
            yield row["id"], Texts(row["instruction"], row["input"], row["output"])


def datasets(entries: list[Entry], rows: Iterable[tuple[str, Texts]]) -> dict[str, list[dict[str, str]]]:
    """Put rows into the manifest's sets, in its order, each with id, source and its texts.

    Raises:
        DataError: a row is missing, or does not say what the manifest was written for; the message names it.
    """
    names = {entry.id for entry in entries}
    found = {name: texts for name, texts in rows if name in names}
    sets: dict[str, list[dict[str, str]]] = {}
    for entry in entries:
        if (texts := found.get(entry.id)) is None:
            raise DataError(f"{entry.id}: the row is not there")
        if (read := digest(texts)) != entry.sha256:
            raise DataError(
                f"{entry.id}: the row's text has the SHA-256 {read}, {MANIFEST.name} has {entry.sha256}; it begins "
                f"{(texts.input or texts.instruction)[:60]!r}"
            )
        sets.setdefault(entry.set, []).append({"id": entry.id, "source": entry.source, **texts._asdict()})
    return sets


def by_source(sets: dict[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """Return the pool and the target of mixed sources once more, as a set for each source."""
    parts: dict[str, list[dict[str, str]]] = {}
    for name in ("evidence_pool", "evidence_mixed"):
        for row in sets[name]:
            parts.setdefault(f"{name}_{row['source']}", []).append(row)
    return parts


def write(sets: dict[str, list[dict[str, str]]], folder: Path) -> None:
    """Write each set as a JSON array, and `dataset_info.json`, into a folder that is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    info = {name: {"file_name": f"{name}.json", "columns": COLUMNS} for name in sets}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1) + "\n", "utf-8")


def main() -> None:
    """Make the files, or end with what is wrong in a line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.real.evidence_data", description="Make the evidence's data."
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--from", dest="folder", type=Path, help="folder with the rows; default: download them")
    arguments = parser.parse_args()
    entries = manifest()
    try:
        sets = datasets(entries, of_folder(arguments.folder) if arguments.folder else published(entries))
    except DataError as error:
        sys.exit(str(error))
    sets |= by_source(sets)
    write(sets, arguments.out)
    for name, rows in sets.items():
        topic = sum(has_topic(row["source"], row["output"]) for row in rows)
        print(f"{name}: {len(rows)} rows, {topic} of them of the topic")


if __name__ == "__main__":
    main()
