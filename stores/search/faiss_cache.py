"""FAISS indexes kept under `derived/faiss/` of their store: deletable at any time, rebuilt when in doubt.

FAISS does not guard against crafted files, so one is loaded only if it is signed with this user's own key, and was
built by this FAISS from exactly the commits that the store has now.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.errors import CorruptionError, DataflexError
from dataflex.fingerprint import canonical
from dataflex.rows import KEY_DTYPE
from dataflex.stores.files import HashingWriter, LocalFiles
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.record import read_record, seal
from dataflex.stores.search.faiss_index import FaissIndex, Kind, Metric, build, load_faiss

_log = logging.getLogger(__name__)


def load_or_build(store: ParquetStore, metric: Metric = "cosine", kind: Kind = "auto") -> FaissIndex:
    """Return the kept index of the store's present commits, built and kept if there is none that can be trusted.

    Raises:
        DataflexError: as `dataflex.stores.search.faiss_index.build`.
    """
    built_from = {"commits": store.version, "faiss": load_faiss().__version__, "metric": metric, "kind": kind}
    stem = f"{store.folder}/derived/faiss/{metric}-{kind}"
    try:
        return _load(store, stem, built_from)
    except FileNotFoundError:
        pass
    except (OSError, DataflexError) as error:
        _log.warning("%s; building the index anew", error)
    index = build(store, metric, kind)
    try:
        _save(store, stem, built_from, index)
    except (OSError, DataflexError) as error:  # a root that is read-only or full costs the next run a build, no more
        _log.warning("the index is not kept for the next run: %s", error)
    return index


def _load(store: ParquetStore, stem: str, built_from: dict[str, Any]) -> FaissIndex:
    files, faiss = store.files, load_faiss()
    record = read_record(files, f"{stem}.json")
    record.pop("format")
    signature = record.pop("signature", "")
    if not hmac.compare_digest(str(signature), _signature(record)):
        raise CorruptionError(f"{files.name(stem)} was not built by this user")
    # Outdated, which is no damage: the caller builds anew without a warning.
    if any(record[field] != value for field, value in built_from.items()):
        raise FileNotFoundError(f"{stem} for these commits and this FAISS")
    for suffix in ("faiss", "keys"):
        if files.sha256(f"{stem}.{suffix}") != record[suffix + "_sha256"]:
            raise CorruptionError(f"{files.name(stem)}.{suffix} is damaged")
    with files.open(f"{stem}.faiss") as file:
        index = faiss.read_index(faiss.PyCallbackIOReader(file.read, 1 << 20))
    return FaissIndex(
        index, np.frombuffer(files.read(f"{stem}.keys"), KEY_DTYPE), built_from["metric"], record["built"]
    )


def _save(store: ParquetStore, stem: str, built_from: dict[str, Any], index: FaissIndex) -> None:
    """Write the index and keys, then the signed record: any mixture that a crash leaves fails its checksums."""
    files, faiss = store.files, load_faiss()
    with files.output(f"{stem}.faiss") as file:
        sink = HashingWriter(file)
        faiss.write_index(index.index, faiss.PyCallbackIOWriter(sink.write, 1 << 20))
    keys = index.keys.tobytes()
    with files.output(f"{stem}.keys") as file:
        file.write(keys)
    sums = {"faiss_sha256": sink.sha256.hexdigest(), "keys_sha256": hashlib.sha256(keys).hexdigest()}
    record = {**built_from, **sums, "built": index.kind}
    with files.output(f"{stem}.json") as file:
        file.write(seal({**record, "signature": _signature(record)}))


def _signature(record: dict[str, Any]) -> str:
    """Sign a record with a key that only this user can read, made on first use."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dataflex" / "private"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = LocalFiles(folder)
    files.create("faiss/key", secrets.token_bytes(32))
    return hmac.new(files.read("faiss/key"), canonical(record), "sha256").hexdigest()
