"""The evidence's data can be made again: its manifest is whole, and published records become the rows it names."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from pathlib import Path
from typing import NoReturn

import pytest

from examples.real import evidence_data
from examples.real.evidence_data import DataError, Entry, datasets, digest, has_topic, manifest, of_folder
from examples.real.upstream import SOURCES, Texts, row_id

PUBLISHED = sorted((Path(__file__).parent / "published").glob("*-*.*"))
ENTRIES = manifest()


def test_the_manifest_has_the_sets_and_no_row_twice() -> None:
    sizes = Counter(entry.set for entry in ENTRIES)
    targets = {f"evidence_{name}": 32 for name in ("one", "mixed", "topic")}
    assert sizes == {"evidence_pool": 1000, **targets, **{f"evidence_test_{name[9:]}": 40 for name in targets}}
    assert len({entry.id for entry in ENTRIES}) == len({entry.sha256 for entry in ENTRIES}) == len(ENTRIES)
    of = {name: Counter(entry.source for entry in ENTRIES if entry.set == name) for name in sizes}
    assert of["evidence_pool"] == dict.fromkeys(SOURCES, 200)
    assert of["evidence_one"] == {"banking77": 32}
    assert of["evidence_test_mixed"] == {"gsm8k": 20, "mbpp": 20}


def test_every_entry_can_be_found_upstream() -> None:
    for entry in ENTRIES:
        source = SOURCES[entry.source]
        assert entry.split in source.files
        assert entry.wording in ([str(number) for number in range(len(source.wordings))] or [""])
        assert len(entry.sha256) == 64
    assert all(
        len(source.commit) == 40 and source.commit in source.url(s) for source in SOURCES.values() for s in source.files
    )


def test_published_records_become_the_rows_of_the_manifest() -> None:
    entries = {entry.id: entry for entry in ENTRIES}
    seen = set()
    for path in PUBLISHED:
        name, split = path.stem.split("-")
        source = SOURCES[name]
        for locator, record in source.records(path.read_bytes().decode()):
            if entry := entries.get(row_id(name, split, locator)):
                texts = source.texts(record, source.wordings[int(entry.wording)] if entry.wording else "")
                assert digest(texts) == entry.sha256, texts
                seen.add(entry.id)
    assert seen == {
        "gsm8k:train-6",
        "mbpp:1",
        "mbpp:18",
        "mbpp:536",
        "banking77:test-3",
        "pubmedqa:9488747",
        "strategyqa:dev-e0044a7b4d146d611e73",
    }


def test_a_record_over_several_lines_is_one() -> None:
    found = dict(SOURCES["banking77"].records('text,category\n"\n\nMy card?\n",card_arrival\n"a ""b"", c",pin\n'))
    assert found == {"0": ["\n\nMy card?\n", "card_arrival"], "1": ['a "b", c', "pin"]}
    assert SOURCES["banking77"].texts(found["0"], "Which?") == ("Which?", "My card?", "card_arrival")


def test_blanks_and_control_characters_go() -> None:
    record = {"qid": "a", "question": " Is\r\nit? ", "answer": True, "facts": ["One.\x00 ", "Two.\x85"]}
    assert SOURCES["strategyqa"].texts(record, "Say.") == ("Say.", "Is\nit?", "Yes. One. Two.")


def test_only_topping_up_is_the_topic() -> None:
    assert has_topic("banking77", "verify_top_up")
    assert has_topic("banking77", "topping_up_by_card")
    assert not has_topic("banking77", "contactless_not_working")
    assert not has_topic("mbpp", "top_up")


def test_datasets_are_in_the_manifests_order_and_name_what_is_wrong(tmp_path: Path) -> None:
    one, two = Texts("Say.", "a", "b"), Texts("Say.", "c", "d")
    entries = [Entry("x", "mbpp", "all", number, "", digest(texts)) for number, texts in (("7", one), ("3", two))]
    made = datasets(entries, [("mbpp:3", two), ("mbpp:9", two), ("mbpp:7", one)])
    assert [row["id"] for row in made["x"]] == ["mbpp:7", "mbpp:3"]
    evidence_data.write(made, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "x.json").read_text("utf-8"))[0] == {
        "id": "mbpp:7",
        "source": "mbpp",
        **one._asdict(),
    }
    assert list(json.loads((tmp_path / "out" / "dataset_info.json").read_text("utf-8"))) == ["x"]
    with pytest.raises(DataError, match="mbpp:3: the row is not there"):
        datasets(entries, [("mbpp:7", one)])
    with pytest.raises(DataError, match=r"mbpp:3: .*begins 'C'"):
        datasets(entries, [("mbpp:7", one), ("mbpp:3", two._replace(input="C"))])
    with pytest.raises(DataError, match="found no pool"):
        list(of_folder(tmp_path))


def test_rows_are_found_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    row = {"id": "mbpp:3", "source": "mbpp", "instruction": "Say.", "input": "c", "output": "d"}
    (tmp_path / "val" / "mbpp.json").write_text(json.dumps([row]), "utf-8")
    assert list(of_folder(tmp_path)) == [("mbpp:3", Texts("Say.", "c", "d"))]


def _broken_off(*_: object, **__: object) -> NoReturn:
    raise http.client.IncompleteRead(b"half")


def test_what_cannot_be_downloaded_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mbpp.jsonl").write_text('{"task_id": 3}\n', "utf-8")
    place = tmp_path.as_uri()
    monkeypatch.setattr(type(SOURCES["mbpp"]), "url", lambda _, split: f"{place}/{split}.jsonl")
    entry = Entry("x", "mbpp", "all", "7", "", "")
    with pytest.raises(DataError, match=r"cannot download file:.*all.jsonl .*give --from FOLDER"):
        list(evidence_data.published([entry]))
    with monkeypatch.context() as broken:
        broken.setattr("urllib.request.urlopen", _broken_off)
        with pytest.raises(DataError, match=r"cannot download .*IncompleteRead"):
            list(evidence_data.published([entry]))
    (tmp_path / "mbpp.jsonl").rename(tmp_path / "all.jsonl")
    with pytest.raises(DataError, match=r"all.jsonl has no record 7 \(1 are missing\)"):
        list(evidence_data.published([entry]))


def test_sets_by_source_are_the_same_rows_in_the_same_order() -> None:
    rows = [{"id": entry.id, "source": entry.source, "set": entry.set} for entry in ENTRIES]
    sets = {name: [row for row in rows if row["set"] == name] for name in ("evidence_pool", "evidence_mixed")}
    parts = evidence_data.by_source(sets)
    sizes = dict.fromkeys(SOURCES, 200)
    assert {name: len(rows) for name, rows in parts.items()} == {
        **{f"evidence_pool_{name}": size for name, size in sizes.items()},
        "evidence_mixed_gsm8k": 16,
        "evidence_mixed_mbpp": 16,
    }
    assert parts["evidence_pool_mbpp"] == [row for row in sets["evidence_pool"] if row["source"] == "mbpp"]
