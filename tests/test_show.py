"""`dataflex show`: the rows a round was trained on, held against loops over the files."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataflex.cli import main
from dataflex.results.folder import RunFolder
from dataflex.rows import Text
from tests.command import python, run
from tests.run_folders import make_run, rows_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("show") / "less", rows_of(120))


def asked(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    code, out, err = run(capsys, "show", *map(str, arguments), "--json")
    assert code == 0, err
    return list(json.loads(out))


def expected(folder: Path, number: int) -> list[dict[str, Any]]:
    """Return the distinct rows of an update, best first, by loops."""
    found = RunFolder(folder)
    pool = found.pool(number)
    assert pool is not None
    liked = [-np.inf if s is None else s for s in pool["score"].to_pylist()]
    lines: dict[int, dict[str, Any]] = {}
    for line in found.round(number).rows.to_pylist():
        kept = lines.setdefault(line["index"], {**line, "times": 0, "round": number})
        kept["times"] += 1
        kept["rank"] = 1 + sum(s > liked[line["index"]] for s in liked)
    return sorted(lines.values(), key=lambda line: (line["rank"], line["index"]))


def test_all_rows_of_a_round_best_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, folder, "--round", 2)
    wanted = expected(folder, 2)
    assert len(found) == len(wanted) == 24
    for line, other in zip(found, wanted, strict=True):
        assert line == {name: other[name] for name in line if name != "row_key"} | {"row_key": other["row_key"].hex()}


def test_top_bottom_source_and_the_last_round(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = expected(folder, 3)
    assert [line["index"] for line in asked(capsys, folder, "--top", 3)] == [line["index"] for line in wanted[:3]]
    assert [line["index"] for line in asked(capsys, folder, "--bottom", 3)] == [
        line["index"] for line in wanted[:-4:-1]
    ]
    words = [line["index"] for line in wanted if line["dataset"] == "words"]
    assert [line["index"] for line in asked(capsys, folder, "--source", "words")] == words
    every = asked(capsys, folder, "--round", "all", "--top", 1)
    assert [line["round"] for line in every] == [0, 1, 2, 3]
    assert every[0]["score"] is None


def test_the_whole_pool(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, folder, "--pool", "--round", 1)
    pool = RunFolder(folder).pool(1)
    assert pool is not None
    scores = pool["score"].to_pylist()
    usable = [i for i, score in enumerate(scores) if score is not None]
    assert [line["rank"] for line in found] == list(range(1, len(usable) + 1))
    assert [line["index"] for line in found] == sorted(usable, key=lambda i: (-scores[i], i))
    counts = {line["index"]: line["times"] for line in expected(folder, 1)}
    assert {line["index"]: line["times"] for line in found if line["times"]} == counts


def test_texts_and_the_targets_nearest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in asked(capsys, folder, "--top", 5, "--text"):
        assert line["prompt"] == f"be brief\nprompt {line['index']} of {line['dataset']}"
        assert line["response"] == f"response {line['index']}"
        assert [(near["set"], near["index"]) for near in line["nearest"]] == [("target", 4), ("target", 1)]
        assert line["nearest"][0]["response"] == "response 4"


def test_a_row_trained_on_twice_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", rows_of(12), chosen=20, method="random")
    found = asked(capsys, folder, "--round", 1)
    assert sum(line["times"] for line in found) == 20
    assert len({line["index"] for line in found}) == len(found) < 20
    first = dict.fromkeys(RunFolder(folder).round(1).rows["index"].to_pylist())
    assert [line["index"] for line in found] == list(first)  # without scores, in training order


def test_people_get_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show", str(folder))
    lines = out.splitlines()
    assert code == 0
    assert "round 3 (update 3, steps 13-16), 24 rows trained on" in lines[0]
    assert len(lines) == 2 + 20 + 1
    assert lines[-1].startswith("4 more;")
    assert lines[2].split()[0] == "1"
    code, out, _ = run(capsys, "show", str(folder), "--top", "1", "--text")
    assert "    prompt: be brief prompt" in out
    assert "near: target 4, cosine 0.500:" in out


def test_a_row_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = Text("\x1b]0;title\x07", "a\x9bb\u202e")
    rows = replace(rows_of(12), names=("\x1b[31mred", "b\n", "c"), text=lambda row: said)
    folder = make_run(tmp_path / "run", rows, chosen=6)
    for more in ([], ["--text"]):
        code, out, _ = run(capsys, "show", str(folder), *more)
        assert code == 0
        assert all(c.isprintable() for c in out.replace("\n", ""))


def test_csv_and_parquet_say_the_same(folder: Path, tmp_path: Path, capfdbinary: Any) -> None:
    with pytest.raises(SystemExit):
        main(["show", str(folder), "--csv", "--text"])
    lines = list(csv.DictReader(io.StringIO(capfdbinary.readouterr().out.decode())))
    wanted = expected(folder, 3)
    assert [int(line["index"]) for line in lines] == [line["index"] for line in wanted]
    assert [bytes.fromhex(line["row_key"]) for line in lines] == [line["row_key"] for line in wanted]
    assert lines[0]["prompt"].startswith("be brief\nprompt")
    with pytest.raises(SystemExit):
        main(["show", str(folder), "--parquet", str(tmp_path / "rows.parquet")])
    assert pq.read_table(tmp_path / "rows.parquet")["index"].to_pylist() == [line["index"] for line in wanted]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--round", "7"], "no round 7; expected one of: 0, 1, 2, 3"),
        (["--round", "x"], "--round: found 'x'; expected a number, or all"),
        (["--source", "wrds"], "no row of 'wrds'; expected one of: letters, numbers, words; did you mean 'words'?"),
        (["--top", "1", "--bottom", "1"], "found both"),
        (["--json", "--csv"], "expected one of them"),
        (["--pool", "--round", "0"], "found no scores of rows that warm-up did not choose"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, _, err = run(capsys, "show", str(folder), *arguments)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) <= 3


def test_a_run_without_rounds_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dataflex_run.json").write_text('{"train_type": "dynamic_mix"}')
    code, _, err = run(capsys, "show", str(tmp_path))
    assert code == 2
    assert "a mixer draws rows by shares" in err


def test_rows_whose_text_was_not_kept_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", rows_of(30), chosen=8, keep=0)
    code, out, _ = run(capsys, "show", str(folder))
    assert code == 0
    assert out.count("(not kept)") == 8
    assert "the text of 8 of these rows was not kept; dataflex.keep_texts" in out


def test_a_run_of_an_older_version_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has neither a map nor texts, and its rounds no columns but what they are read by."""
    folder = make_run(tmp_path / "run", rows_of(30), chosen=8)
    for name in ("dataflex_run.json", "dataflex_rows.parquet"):
        (folder / name).unlink()
    for path in (folder / "rounds").glob("texts-*"):
        path.unlink()
    for path in (folder / "rounds").glob("round-*"):
        pq.write_table(pq.read_table(path).drop_columns(["dataset", "record", "tokens"]), path)
    found = asked(capsys, folder)
    assert len(found) == 8
    assert {line["dataset"] for line in found} == {None}
    assert run(capsys, "show", str(folder))[0] == 0


def test_all_rounds_where_one_has_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The warm-up scores nothing, and a source may be in some rounds alone."""
    found = asked(capsys, folder, "--round", "all", "--pool", "--top", 1)
    assert [line["round"] for line in found] == [1, 2, 3]
    rows = rows_of(60)
    only = make_run(
        tmp_path / "run",
        replace(rows, length=np.where(rows.dataset == 0, 9000, rows.length).astype(np.int32)),
        chosen=8,
    )
    found = asked(capsys, only, "--round", "all", "--source", "words")
    assert {line["round"] for line in found} == {0}


def test_a_terminal_without_the_letters_shows_what_it_can(folder: Path) -> None:
    command = ("-m", "dataflex.cli", "show", str(folder), "--top", "1")
    for more in ((), ("--text",), ("--json",)):
        ran = python(*command, *more, PYTHONIOENCODING="ascii")
        assert ran.returncode == 0, ran.stderr
