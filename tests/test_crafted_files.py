"""Data files crafted by a writer who means harm: refused before their pages are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex.errors import CorruptionError, MismatchError
from dataflex.fingerprint import keys_digest
from dataflex.rows import KEY_DTYPE
from dataflex.stores.fragment import schema, serialise
from dataflex.stores.log import Entry
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.record import seal
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values
from tests.looked_at import faults

pytestmark = pytest.mark.usefixtures("unsynced")

LAYOUT = Layout({"norm": "float32", "tokens": "int64"}, 48, "int8")


def fragment() -> Values:
    rng = np.random.default_rng(0)
    keys = np.frombuffer(rng.bytes(16 * 40), KEY_DTYPE)
    scalars: dict[str, np.ndarray] = {"norm": rng.random(40, np.float32), "tokens": rng.integers(0, 9, 40)}
    return Values(keys, np.zeros(40, np.uint8), scalars, rng.standard_normal((40, 48), np.float32))


FRAGMENT = fragment()


def opened(folder: Path) -> ParquetStore:
    return StoreRoot(folder).open("gradient", {"r": 1}, LAYOUT)


def planted(folder: Path, table: pa.Table, keys: np.ndarray, **options: object) -> ParquetStore:
    """Commit a crafted file as a malicious writer would, with all digests right."""
    store = opened(folder)
    path = folder / "crafted.parquet"
    metadata = options.pop("metadata", {"dataflex.format": "1", "dataflex.layout": _layout(store)})
    only_footer = options.pop("only_footer", False)
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(metadata)
    if only_footer:
        data = path.read_bytes()
        path.write_bytes(data[:4] + data[-8 - int.from_bytes(data[-8:-4], "little") :])
    sha = store.files.sha256("crafted.parquet")
    Path(store.path, "data").mkdir(exist_ok=True)
    Path(store.path, "log").mkdir(exist_ok=True)
    entry = Entry("bad", sha, path.stat().st_size, len(keys), keys_digest(keys), {"ok": len(keys)}, "me")
    path.rename(Path(store.path, "data", f"{sha}.parquet"))
    Path(store.path, "log", "bad.json").write_bytes(seal(entry.document[0]))
    return opened(folder)


def _layout(store: ParquetStore) -> str:
    metadata = pq.read_metadata(pa.BufferReader(serialise(store.layout, FRAGMENT))).metadata
    return metadata[b"dataflex.layout"].decode()


PLAIN = {"compression": "NONE", "use_dictionary": False, "store_schema": False}


def honest() -> pa.Table:
    return pq.read_table(pa.BufferReader(serialise(LAYOUT, FRAGMENT))).cast(schema(LAYOUT))


def test_the_crafting_itself_is_no_reason_for_refusal(tmp_path: Path) -> None:
    assert planted(tmp_path, honest(), FRAGMENT.keys, **PLAIN).contains(FRAGMENT.keys).all()


class Boom(pa.ExtensionType):  # type: ignore[misc]
    """An extension type that must not be rebuilt from a file."""

    def __init__(self) -> None:
        super().__init__(pa.binary(16), "dataflex.test.boom")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Boom:
        return cls()


@pytest.mark.parametrize(
    "crafted", ["extension", "names", "types", "nullable", "compressed", "dictionary", "metadata", "declared"]
)
def test_crafted_parquet_is_refused_before_its_pages_are_read(tmp_path: Path, crafted: str) -> None:
    table, options = honest(), dict(PLAIN)
    if crafted == "extension":
        table = table.set_column(
            0, pa.field("row_key", Boom(), False), pa.ExtensionArray.from_storage(Boom(), _first(table))
        )
        options["store_schema"] = True
        pa.register_extension_type(Boom())
    elif crafted == "names":
        table = table.rename_columns(["key", *table.column_names[1:]])
    elif crafted == "types":
        table = table.set_column(1, pa.field("status", pa.int64(), False), table.column(1).cast(pa.int64()))
    elif crafted == "nullable":
        table = table.cast(pa.schema([field.with_nullable(True) for field in table.schema]))
    elif crafted == "compressed":
        options["compression"] = {name: "ZSTD" if name == "norm" else "NONE" for name in table.column_names}
    elif crafted == "dictionary":
        options["use_dictionary"] = ["tokens"]
    elif crafted == "metadata":
        options["metadata"] = {"dataflex.format": "1"}
    else:
        options["only_footer"] = True  # declares pages that the file does not have
    try:
        crafted_store = planted(tmp_path, table, FRAGMENT.keys, **options)
        with pytest.raises(CorruptionError, match=r"not a data file|declares compressed columns"):
            crafted_store.contains(FRAGMENT.keys)
        assert faults(crafted_store)
    finally:
        if crafted == "extension":
            pa.unregister_extension_type("dataflex.test.boom")


def _first(table: pa.Table) -> pa.Array:
    return table.column(0).combine_chunks()


def test_a_data_file_of_a_newer_format_is_refused_with_a_hint(tmp_path: Path) -> None:
    newer = {"dataflex.format": "2", "dataflex.layout": "anything"}
    store = planted(tmp_path, honest(), FRAGMENT.keys, **PLAIN, metadata=newer)
    with pytest.raises(MismatchError, match="read it with a newer DataFlex"):
        store.contains(FRAGMENT.keys)
