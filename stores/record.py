"""Small JSON documents that prove their own integrity, and the claim of a name by the first who writes it."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from dataflex.errors import CorruptionError, DataflexError, MismatchError
from dataflex.fingerprint import canonical, digest
from dataflex.stores.files import Files

FORMAT = 2
"""The highest version of a document that is read. Raise it when an older DataFlex could misread the new documents."""

_log = logging.getLogger(__name__)
_LIMIT = 16 << 20  # bytes; a recipe with every tensor of a large model in it is far below
_AT_ONCE, _SHORT = 1000, 256 << 10  # documents, and bytes of each, that memory must hold


def seal(body: dict[str, Any], version: int = 1) -> bytes:
    """Serialise a document together with its own digest and the format that a reader has to know."""
    document = {"format": version, **body}
    document["digest"] = digest(document)
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode()


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Return a sealed document.

    Raises:
        CorruptionError: it is not what `seal` wrote.
        MismatchError: a newer DataFlex wrote it.
    """
    try:
        document = json.loads(data)
        if not isinstance(document, dict) or not {"digest", "format"} <= document.keys():
            raise CorruptionError(f"{where} is damaged: found no record; expected a JSON object with format and digest")
        found = document.pop("digest")
        intact = found == digest(document)
        version = document["format"]
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptionError(f"{where} is damaged: {type(error).__name__}: {str(error)[:200]}") from error
    if not intact:  # asked before the version: a format that a flipped bit changed is damage, not a newer DataFlex
        raise CorruptionError(f"{where} is damaged: its content does not match the digest in it")
    if not isinstance(version, int) or version > FORMAT:
        raise MismatchError(
            f"{where} has format {version}; this DataFlex reads up to {FORMAT}; read it with a newer DataFlex"
        )
    return document


def read_record(files: Files, path: str) -> dict[str, Any]:
    """Read a sealed document.

    Raises:
        FileNotFoundError: there is none.
        CorruptionError: it is not what `seal` wrote.
        MismatchError: a newer DataFlex wrote it.
    """
    return _unsealed(files, path, files.read(path, _LIMIT + 1))


def read_records(files: Files, paths: Sequence[str]) -> Iterator[dict[str, Any] | DataflexError | None]:
    """Read sealed documents, many at a time; yield each, or the error of `read_record`, or None where there is none."""
    for start in range(0, len(paths), _AT_ONCE):
        part = paths[start : start + _AT_ONCE]
        found: list[bytes | None] | None = None
        with contextlib.suppress(CorruptionError):  # something else than a file lies at one of the paths: at which?
            found = files.fetch([(path, 0, _SHORT) for path in part])
        for number, path in enumerate(part):
            try:
                data = b"" if found is None else found[number]
                if found is None or (data is not None and len(data) == _SHORT):
                    data = files.read(path, _LIMIT + 1)
                yield None if data is None else _unsealed(files, path, data)
            except FileNotFoundError:
                yield None
            except (CorruptionError, MismatchError) as error:
                yield error


def claim(files: Files, folder: str, stem: str, body: dict[str, Any], version: int = 1) -> tuple[dict[str, Any], bool]:
    """Put a document under `folder/stem.json` unless an intact one is there; return the one there, and if it is ours.

    `body` must hold a value that no other writer has (`Files.create` says why), unless it does not matter whose
    document it is. A damaged one is left alone, and ours goes under `stem~1.json`: removing it first would race with
    another writer who does the same.
    """
    body = json.loads(canonical(body))  # a tuple would come back as a list
    data = seal(body, version)
    for attempt in itertools.count():
        path = f"{folder}/{stem}~{attempt}.json" if attempt else f"{folder}/{stem}.json"
        if files.create(path, data):
            return body, True
        try:
            found = read_record(files, path)
        except CorruptionError:
            continue
        found.pop("format")
        return found, False
    raise AssertionError("unreachable")


def find_record(files: Files, folder: str, stem: str) -> dict[str, Any] | None:
    """Return the intact document that stands for `stem`, or None; damaged ones are logged.

    Raises:
        MismatchError: a newer DataFlex wrote it.
    """
    for attempt in itertools.count():
        try:
            return read_record(files, f"{folder}/{stem}~{attempt}.json" if attempt else f"{folder}/{stem}.json")
        except FileNotFoundError:
            if attempt:  # the first name may be free because what was damaged there has been removed
                return None
        except CorruptionError as error:
            _log.warning("%s; left out", error)
    raise AssertionError("unreachable")


def _unsealed(files: Files, path: str, data: bytes) -> dict[str, Any]:
    if len(data) > _LIMIT:  # not all of it was read: whatever lies there must fit into memory
        raise CorruptionError(f"{files.name(path)} is damaged: more than {_LIMIT} bytes")
    return unseal(data, files.name(path))
