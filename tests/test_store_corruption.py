"""Flipped bits, cut and lost files, crafted files: found every time, and cured by repair."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflex.errors import CorruptionError, MismatchError
from dataflex.fingerprint import keys_digest
from dataflex.rows import KEY_DTYPE
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.record import seal, unseal
from dataflex.stores.root import StoreRoot
from dataflex.stores.values import Layout, Values
from tests.looked_at import faults, problems, repaired

pytestmark = pytest.mark.usefixtures("unsynced")

LAYOUT = Layout({"norm": "float32", "tokens": "int64"}, 48, "int8")
RECIPE = {"r": 1}


def fragment(number: int) -> Values:
    rng = np.random.default_rng(number)
    keys = np.frombuffer(rng.bytes(16 * 40), KEY_DTYPE)
    scalars: dict[str, np.ndarray] = {"norm": rng.random(40, np.float32), "tokens": rng.integers(0, 9, 40)}
    return Values(keys, np.zeros(40, np.uint8), scalars, rng.standard_normal((40, 48), np.float32))


FRAGMENTS = [fragment(0), fragment(1)]
KEYS = np.concatenate([values.keys for values in FRAGMENTS])


def opened(folder: Path) -> ParquetStore:
    return StoreRoot(folder).open("gradient", RECIPE, LAYOUT)


@pytest.fixture
def store(tmp_path: Path) -> ParquetStore:
    """Two fragments, 80 rows."""
    made = opened(tmp_path)
    for n, values in enumerate(FRAGMENTS):
        made.append(f"f{n}", values)
    return made


def harm(store: ParquetStore) -> list[str]:
    return [problem.path for problem in faults(store)]


def data_file(store: ParquetStore, number: int = 0) -> Path:
    entry = unseal(Path(store.path, "log", f"f{number}.json").read_bytes(), "it")
    return Path(store.path, "data", f"{entry['data']}.parquet")


def forget_contents(store: ParquetStore) -> None:
    """Make the log what it was before it said where a data file holds what."""
    for path in Path(store.path, "log").iterdir():
        entry = unseal(path.read_bytes(), "it")
        del entry["format"], entry["contents"]
        path.write_bytes(seal(entry))


def assert_equal(found: Values, expected: Values) -> None:
    np.testing.assert_array_equal(found.keys, expected.keys)
    np.testing.assert_array_equal(found.status, expected.status)
    np.testing.assert_array_equal(found.vectors, expected.vectors)
    for name, column in expected.scalars.items():
        np.testing.assert_array_equal(found.scalars[name], column)


def recompute(folder: Path) -> None:
    """What featurize does: compute what is missing, then read all."""
    store = opened(folder)
    for n, values in enumerate(FRAGMENTS):
        if not store.contains(values.keys).all():
            store.append(f"f{n}", values)
    found = store.read(KEYS)
    np.testing.assert_array_equal(found.scalars["norm"], np.concatenate([v.scalars["norm"] for v in FRAGMENTS]))
    assert harm(store) == []


def test_every_flipped_bit_of_a_data_file_is_found(store: ParquetStore, tmp_path: Path) -> None:
    path = data_file(store)
    intact = path.read_bytes()
    rng = np.random.default_rng(0)
    expected, refusals = store.read(KEYS), []
    for bit in rng.integers(0, 8 * len(intact), 200):
        data = bytearray(intact)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        fresh = opened(tmp_path)
        try:
            assert_equal(fresh.read(KEYS), expected)  # the bit is of what only other readers of Parquet look at
        except CorruptionError as error:
            refusals.append(str(error))
        assert harm(fresh) == [str(path.relative_to(tmp_path))]
    assert len(refusals) > 100
    assert all(path.name in refusal for refusal in refusals)
    assert [problem.path for problem in repaired(opened(tmp_path))] == [str(path.relative_to(tmp_path))]
    recompute(tmp_path)


def test_every_flipped_bit_of_a_data_file_is_found_where_the_log_does_not_say_what_is_in_it(
    store: ParquetStore, tmp_path: Path
) -> None:
    forget_contents(store)
    path = data_file(store)
    intact = path.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(intact), 50):
        data = bytearray(intact)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        with pytest.raises(CorruptionError, match=path.name):
            opened(tmp_path).read(KEYS)
        with pytest.raises(CorruptionError):
            list(opened(tmp_path).scan(16, vectors=False))


def test_a_bit_that_flips_after_the_file_was_checked_is_found_too(store: ParquetStore) -> None:
    path = data_file(store)
    intact = path.read_bytes()
    expected = store.read(KEYS)
    assert expected.vectors is not None
    start = intact.index(_codes(path))
    rng = np.random.default_rng(1)
    for bit in rng.integers(8 * start, 8 * (start + 40 * 48), 60):
        data = bytearray(intact)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        with pytest.raises(CorruptionError, match="are not those committed"):
            store.read(KEYS)
    path.write_bytes(intact)
    np.testing.assert_array_equal(store.read(KEYS).vectors, expected.vectors)


def _codes(path: Path) -> bytes:
    return b"".join(row.as_py() for row in pq.read_table(path).column("vector"))


@pytest.mark.parametrize("is_old", [True, False])
def test_no_flipped_bit_of_a_footer_takes_the_process_down(store: ParquetStore, tmp_path: Path, is_old: bool) -> None:
    """Arrow ends the process at some of them, so a file is not parsed before its bytes are known to be right."""
    if is_old:
        forget_contents(store)
    path = data_file(store)
    intact = path.read_bytes()
    footer = len(intact) - 8 - int.from_bytes(intact[-8:-4], "little")
    bits = np.random.default_rng(0).permutation(np.arange(8 * footer, 8 * len(intact)))[:500]
    expected = store.read(KEYS).vectors
    assert expected is not None
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for bit in bits.tolist():
            data = bytearray(intact)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                found = opened(tmp_path).read(KEYS)
            except CorruptionError:
                if is_old:
                    continue
                os._exit(1)
            if is_old or found.vectors is None or (found.vectors != expected).any():
                os._exit(2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("share", [0, 1e-9, 0.5, 0.99])
def test_a_cut_data_file_is_refused_and_only_it_is_computed_again(
    store: ParquetStore, tmp_path: Path, share: float
) -> None:
    path = data_file(store)
    data = path.read_bytes()
    path.write_bytes(data[: int(np.ceil(len(data) * share))])
    with pytest.raises(CorruptionError, match=path.name):
        opened(tmp_path).contains(KEYS)
    with pytest.raises(CorruptionError, match=path.name):
        store.read(KEYS)
    assert len(repaired(opened(tmp_path))) == 1
    assert opened(tmp_path).contains(KEYS).tolist() == [False] * 40 + [True] * 40
    recompute(tmp_path)


def test_each_file_lost_in_turn(store: ParquetStore, tmp_path: Path) -> None:
    files = sorted(path.relative_to(store.path) for path in Path(store.path).rglob("*") if path.is_file())
    assert {path.parts[0] for path in files} == {"recipe.json", "data", "log"}
    for lost in files:
        copy = tmp_path / "copy" / lost.name
        shutil.copytree(tmp_path / Path(store.path).name, copy / Path(store.path).name)
        (copy / Path(store.path).name / lost).unlink()
        if lost.parts[0] == "recipe.json":
            assert StoreRoot(copy).stores() == []
        elif lost.parts[0] == "data":
            with pytest.raises(CorruptionError, match="is missing although it was committed"):
                opened(copy).contains(KEYS)
            with pytest.raises(CorruptionError, match="is missing although"):
                list(opened(copy).scan())
            repaired(opened(copy))
        else:
            assert opened(copy).contains(KEYS).sum() == 40
            assert [problem.harmless for problem in problems(opened(copy))] == [True]
        recompute(copy)


def mutations(data: bytes) -> list[bytes]:
    rng = np.random.default_rng(2)
    places = rng.choice(len(data), 60, replace=False)
    flips = [data[:i] + bytes([data[i] ^ (1 << rng.integers(8))]) + data[i + 1 :] for i in places]
    cuts = [data[:n] for n in (0, 1, len(data) // 2, len(data) - 1)]
    other = [b"[]", b"{}", b"null", b"[" * 100_000, b"\xff" * 50, b'{"digest": NaN}', b" " * (17 << 20), data * 2]
    return [*flips, *cuts, *other]


@pytest.mark.parametrize("name", ["log/f0.json", "recipe.json"])
def test_damaged_documents_are_reported_and_cured(
    store: ParquetStore, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(store.path, name)
    intact = path.read_bytes()
    expected = store.read(KEYS)
    found = 0
    for data in mutations(intact):
        path.write_bytes(data)
        caplog.clear()
        try:
            fresh = opened(tmp_path)
            kept = fresh.contains(KEYS)
        except MismatchError:  # a format number that grew
            pytest.fail("the digest covers the format")
        extra = sorted(p.name for p in path.parent.glob("*~*"))
        if not caplog.records:  # white space: the same document
            assert unseal(data, "it") == unseal(intact, "it")
            assert kept.all()
            continue
        found += 1
        assert path.name in caplog.text
        if name == "recipe.json":
            assert extra == ["recipe~1.json"]
            assert kept.all()
        else:
            assert kept.tolist() == [False] * 40 + [True] * 40
            assert fresh.append("f0", FRAGMENTS[0])
        np.testing.assert_array_equal(opened(tmp_path).read(KEYS).vectors, expected.vectors)
        assert harm(fresh) == [f"{fresh.folder}/{name}"]
        repaired(fresh)
        assert harm(opened(tmp_path)) == []
        assert not path.exists()
        for leftover in path.parent.glob("*~*"):
            leftover.unlink()
        path.write_bytes(intact)
    assert found > 60


def test_intact_documents_of_another_kind_are_damage(store: ParquetStore, tmp_path: Path) -> None:
    log, recipe = Path(store.path, "log", "f0.json"), Path(store.path, "recipe.json")
    foreign = recipe.read_bytes()
    for data in (foreign, seal({})):
        log.write_bytes(data)
        assert opened(tmp_path).contains(KEYS).sum() == 40
        with pytest.raises(CorruptionError, match="no log entry of that name"):
            opened(tmp_path).append("f0", FRAGMENTS[0])
        assert len(repaired(opened(tmp_path))) == 2  # and the data file it stood for is an orphan
        recompute(tmp_path)
    recipe.write_bytes(log.read_bytes())
    with pytest.raises(CorruptionError, match="is no recipe"):
        opened(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(["fragment", "data", "bytes", "rows", "keys", "status", "writer", "contents", "more"]),
    value=json_values,
)
def test_a_crafted_log_entry_is_left_out_or_harmless(
    store: ParquetStore, tmp_path: Path, field: str, value: object
) -> None:
    path = Path(store.path, "log", "f0.json")
    intact = path.read_bytes()
    entry = unseal(intact, "it")
    entry[field] = value
    try:
        path.write_bytes(seal(entry))
    except ValueError:  # NaN is no JSON
        return
    try:
        fresh = opened(tmp_path)
        assert fresh.contains(KEYS)[40:].all()
        problems(fresh)
    except CorruptionError:
        pass
    finally:
        path.write_bytes(intact)
    assert opened(tmp_path).read(KEYS).keys.tobytes() == KEYS.tobytes()


def test_a_log_entry_cannot_point_outside(store: ParquetStore, tmp_path: Path) -> None:
    path = Path(store.path, "log", "f0.json")
    entry = unseal(path.read_bytes(), "it")
    outside = tmp_path / "outside.parquet"
    shutil.copy(data_file(store), outside)
    for data in ("../../outside", str(outside.with_suffix("")), "0" * 63 + "/", "0" * 64 + "\0"):
        path.write_bytes(seal({**entry, "data": data}))
        assert opened(tmp_path).contains(KEYS).sum() == 40


def test_a_log_entry_that_lies_about_its_rows_is_found(store: ParquetStore, tmp_path: Path) -> None:
    path = Path(store.path, "log", "f0.json")
    entry = unseal(path.read_bytes(), "it")
    path.write_bytes(seal({**entry, "status": {"ok": 39, "nonfinite": 1, "no_labels": 0}}))
    assert len(harm(opened(tmp_path))) == 1
    path.write_bytes(seal({**entry, "bytes": int(entry["bytes"]) + 10}))
    with pytest.raises(CorruptionError, match="were committed"):
        opened(tmp_path).contains(KEYS)
    assert len(harm(opened(tmp_path))) == 1
    path.write_bytes(seal({**entry, "keys": keys_digest(FRAGMENTS[1].keys)}))
    with pytest.raises(CorruptionError, match="row keys are not those committed"):
        opened(tmp_path).contains(KEYS)
    assert repaired(opened(tmp_path))[0].path.startswith(store.folder)
    recompute(tmp_path)


def test_orphans_are_listed_as_harmless_and_left_alone(store: ParquetStore, tmp_path: Path) -> None:
    orphan = Path(store.path, "data", "0" * 64 + ".parquet")
    orphan.write_bytes(b"half a file of a crashed writer")
    assert [(Path(p.path).name, p.harmless) for p in repaired(store)] == [(orphan.name, True)]
    assert orphan.exists()
    assert store.contains(KEYS).all()


def test_an_error_of_the_disk_is_not_called_damage(store: ParquetStore, tmp_path: Path) -> None:
    entry = Path(store.path, "log", "f0.json")
    entry.unlink()
    entry.symlink_to(entry)
    with pytest.raises(OSError, match="symbolic links"):
        opened(tmp_path).contains(KEYS)
