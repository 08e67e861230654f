"""A tokenized dataset on disk (`tokenized_path`), and beside its rows what they are made from.

LLaMA-Factory keeps the tokens alone. `dataflex.json` stands inside the folder, so it travels with it, and LLaMA-Factory
reads the folder as before:

version     1
made_from   datasets by content, tokenizer, data arguments (`provenance.made_from`)
names       datasets, in the order of their numbers
sets        for `train` and each evaluation set: a digest of the row keys, `dataset` and `index` of each row, the rows
            that `cutoff_len` shortened, and (dataset, index) of the records that were dropped
digest      of all this
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_from_disk
from llamafactory.extras.misc import has_tokenized_data

from dataflex import distributed
from dataflex.errors import CorruptionError, DataflexError, MismatchError
from dataflex.fingerprint import digest, keys_digest
from dataflex.llamafactory.provenance import differences, unknown_files
from dataflex.rows import Rows

log = logging.getLogger(__name__)

FILE = "dataflex.json"
_VERSION = 1


def is_there(path: str) -> bool:
    """Say whether rows have been saved under a path; the same on every rank. Collective.

    Raises:
        DataflexError: some nodes have them and others have not; or the path is a URL.
    """
    if "://" in path:
        raise DataflexError(f"tokenized_path: found {path}; expected a local folder, which is all LLaMA-Factory reads")
    found = distributed.gather(has_tokenized_data(path))
    if len(set(found)) > 1:
        raise DataflexError(
            f"tokenized_path: {path} holds rows for {sum(found)} of {len(found)} processes; expected one folder that "
            "all of them see. Copy it to every node, or put it on storage that they share"
        )
    return found[0]


def save(path: str, rows: DatasetDict, made: Mapping[str, Any], sets: Mapping[str, Rows]) -> None:
    """Write rows and what is known of them; the folder appears entirely or not at all.

    Raises:
        DataflexError: it cannot be written.
    """
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        rows.save_to_disk(str(scratch))
        about = {
            "version": _VERSION,
            "made_from": made,
            "names": list(next(iter(sets.values())).names),
            "sets": {name: _about(known) for name, known in sets.items()},
        }
        (scratch / FILE).write_text(json.dumps({**about, "digest": digest(about)}) + "\n", "utf-8")
        # Written aside and renamed: a run that is killed here leaves nothing that another would take for a dataset.
        scratch.rename(target)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if has_tokenized_data(path):  # another launch was faster
            log.info("%s has been made meanwhile and is left as it is", path)
            return
        raise DataflexError(f"tokenized_path: {path} cannot be written: {error}") from error


def load(path: str, made: Mapping[str, Any]) -> tuple[DatasetDict | Dataset, dict[str, Any] | None]:
    """Return saved rows and their `dataflex.json`, None where there is none.

    Args:
        path: the folder.
        made: what this run's rows have to be made from.

    Raises:
        MismatchError: the rows are made from something else.
        CorruptionError: `dataflex.json` cannot be read.
    """
    try:
        rows = load_from_disk(path)
    except (OSError, ValueError) as error:
        raise DataflexError(
            f"tokenized_path: {path} cannot be read ({error}); expected a tokenized dataset. Remove the folder to have "
            "it made"
        ) from error
    return rows, compared(path, made)


def compared(path: str, made: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `dataflex.json` of saved rows, if it says the same as `made`; None, with a warning, if there is none.

    Raises:
        MismatchError: the rows are made from something else.
        CorruptionError: `dataflex.json` cannot be read.
    """
    file = Path(path) / FILE
    if not file.is_file():
        if distributed.is_main():
            log.warning(
                "%s has no %s, so DataFlex did not make it: unknown are the datasets and settings it was made with, "
                "the dataset of each row, and what was truncated or dropped. Remove the folder to have it made anew",
                path, FILE,
            )  # fmt: skip
        return None
    about = _read(file)
    if found := differences(made, about["made_from"]):
        raise MismatchError(
            f"tokenized_path: {path} was made under other settings (there → this run):\n  "
            + "\n  ".join(found)
            + "\nUse those settings, name another tokenized_path, or remove the folder to have it made anew"
        )
    if (absent := unknown_files(made)) and distributed.is_main():
        log.warning("%s: the files of %s are not here, so only their names are compared", path, ", ".join(absent))
    return about


def described(rows: Rows, about: Mapping[str, Any], name: str, path: str) -> Rows:
    """Add to a set of rows what was noted when they were saved: datasets, positions, truncated and dropped records.

    Raises:
        CorruptionError: the rows are not those that were noted.
    """
    noted = about["sets"].get(name)
    if noted is None or noted["keys"] != keys_digest(rows.keys):
        raise CorruptionError(
            f"tokenized_path: the rows of {name} in {path} are not those that its {FILE} is about; remove the folder "
            "to have it made anew"
        )
    truncated = np.zeros(len(rows), bool)
    truncated[noted["truncated"]] = True
    return replace(
        rows,
        dataset=np.array(noted["dataset"], np.int32),
        index=np.array(noted["index"], np.int64),
        truncated=truncated,
        names=tuple(about["names"]),
        dropped=[(dataset, index) for dataset, index in noted["dropped"]],
    )


def _about(rows: Rows) -> dict[str, Any]:
    assert rows.truncated is not None
    return {
        "keys": keys_digest(rows.keys),
        "dataset": rows.dataset.tolist(),
        "index": rows.index.tolist(),
        "truncated": np.flatnonzero(rows.truncated).tolist(),
        "dropped": rows.dropped,
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        about = dict(json.loads(file.read_text("utf-8")))
        if about.pop("digest", None) != digest(about):
            raise ValueError("its digest is another")
    except (OSError, ValueError, TypeError) as error:
        raise CorruptionError(
            f"{file}: cannot be read ({error}); remove it to use the rows without what is known of them, or the folder "
            "to have it made anew"
        ) from error
    if about["version"] > _VERSION:
        raise MismatchError(f"{file}: found version {about['version']}, this DataFlex knows {_VERSION}; upgrade it")
    return about
