"""`dataflex report`: one closed page, whose figures are those of the run's files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataflex.pipelines.report import report
from dataflex.pipelines.reporting import between, figures
from dataflex.pipelines.reporting.arrays import OTHERS, Arrays, heads, jaccard
from dataflex.pipelines.reporting.facts import facts, labels
from dataflex.pipelines.reporting.page import legible
from dataflex.pipelines.reporting.svg import cleaned
from dataflex.results.folder import RunFolder
from dataflex.rows import Text
from tests.command import run
from tests.run_folders import SOURCES, make_run, rows_of

HOSTILE = (
    "<script>alert(1)</script>",
    "</pre></bdi></style><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    '" onmouseover="alert(1)',
    "$\\frac{1}{$ \\n \x00\x1b[31m \u202e \ud800",
    "https://example.com/pixel.png",
    "&lt;b&gt; &#60;",
)


class Page(HTMLParser):
    """The elements and texts of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def written(output: Path, *folders: Path, **more: Any) -> str:
    report(list(folders), output, **more)
    return output.read_text("utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "less", rows_of(120), test=1.5)


def test_a_page_is_closed(folder: Path, tmp_path: Path) -> None:
    text = written(tmp_path / "r.html", folder)
    page = Page(text)
    assert set(page.tags).isdisjoint({"script", "img", "image", "link", "iframe", "object", "embed", "form", "base"})
    names = {name for name, _ in page.attributes}
    assert "style" not in names
    assert not any(name.startswith("on") for name in names)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "action")]
    assert links
    assert all(value is not None and value.startswith("#") for value in links)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        dict(page.attributes)["content"] if False else re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    )
    assert policy is not None
    assert policy[1].replace("&#39;", "'") == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert "url(" not in style
    assert "@import" not in style


def test_identifiers_are_unique_and_references_lead_somewhere(folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", rows_of(120), seed=1)
    page = Page(written(tmp_path / "r.html", folder, other))
    named = [value for name, value in page.attributes if name == "id"]
    assert len(named) == len(set(named))
    asked = [str(value)[1:] for name, value in page.attributes if name == "href"]
    asked += [found for _, value in page.attributes for found in re.findall(r"url\(#([^)]+)\)", value or "")]
    assert set(asked) <= set(named)


def test_what_rows_say_is_text_and_nothing_else(tmp_path: Path) -> None:
    names = ("<b>bold</b>", "$x_{$", "_under")
    rows = replace(
        rows_of(60, names), text=lambda row: Text("\n".join(HOSTILE).replace("\ud800", "?"), "</bdi><script>x")
    )
    folder = make_run(tmp_path / "<i>run", rows, method="<u>m</u>", note=HOSTILE[0])
    (folder / "status.json").write_text(json.dumps({"state": "failed", "message": HOSTILE[1]}))
    (folder / "dataflex_warnings.jsonl").write_text(json.dumps({"text": HOSTILE[2] + "\ud800"}) + "\n")
    plain = Page(written(tmp_path / "plain.html", make_run(tmp_path / "plain", rows_of(60))))
    page = Page(written(tmp_path / "r.html", folder, title=HOSTILE[0]))
    # Nothing that is not of our own template is an element or an attribute, and all of it is there to be read.
    assert set(page.tags) <= {*plain.tags, "ul", "li", "section"}
    assert {name for name, _ in page.attributes} <= {name for name, _ in plain.attributes}
    for text in (*HOSTILE[:4], HOSTILE[5], HOSTILE[6], "<i>run", "<u>m</u>", *names[:2]):
        assert text in page.text, text
    assert "\x1b" not in page.text
    assert "\x00" not in page.text


def test_a_text_is_shown_as_far_as_it_can_be() -> None:
    assert legible("a\tb\nc") == "a\tb\nc"
    assert legible("a\x00\x1b[0m\x9b\ud800b") == "a��[0m�?b"
    assert legible("👩‍👩‍👧 नमस्ते") == "👩‍👩‍👧 नमस्ते"


def test_the_numbers_are_those_of_loops(folder: Path) -> None:
    found = RunFolder(folder)
    arrays = Arrays(found)
    names, codes = arrays.sources
    assert sorted(names) == sorted(SOURCES)
    known = [line for line in (found.rows.to_pylist() if found.rows else []) if line["role"] == "train"]
    assert [names[code] for code in codes] == [line["dataset"] for line in known if line["index"] is not None]
    labels_of, counts = arrays.by_source
    assert labels_of == ["warm-up", "update 1", "update 2", "update 3"]
    chosen: list[set[int]] = []
    for number in range(4):
        lines = found.round(number).rows.to_pylist()
        assert counts[number].tolist() == [sum(line["dataset"] == name for line in lines) for name in names]
        chosen.append({line["index"] for line in lines})
    updates = chosen[1:]
    assert arrays.times.tolist() == [sum(i in each for each in updates) for i in range(120)]
    _, overlap = arrays.overlap
    for i, one in enumerate(updates):
        for j, other in enumerate(updates):
            assert overlap[i, j] == pytest.approx(len(one & other) / len(one | other))
    update, pool, taken = arrays.spread()
    assert update == ["1", "2", "3"]
    for number in range(3):
        table = found.pool(number + 1)
        assert table is not None
        scores = [s for s in table["score"].to_pylist() if s is not None]
        assert pool[number].tolist() == pytest.approx(np.quantile(scores, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist())
        of_round = found.round(number + 1).rows["score"].to_pylist()
        assert taken[number].tolist() == pytest.approx(
            np.quantile(of_round, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist(), rel=1e-6
        )
    about = facts("x", arrays)
    assert {name: count for name, _, count in about.statuses} == {"ok": 113, "no_labels": 7, "dropped": 1}
    cost = dict(about.cost)
    assert cost["features computed at updates"] == "60"
    assert cost["features reused"] == "15"
    assert cost["saved by reuse"] == "about 1.5 s, at 10.0 rows/s"


def test_jaccard_of_nothing_is_not_a_number() -> None:
    found = jaccard(np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]], np.float32))
    assert found[0].tolist()[:2] == pytest.approx([1, 1 / 3])
    assert np.isnan(found[2, 2])


def test_many_sources_are_summed(tmp_path: Path) -> None:
    names = tuple(f"source {i}" for i in range(12))
    arrays = Arrays(RunFolder(make_run(tmp_path / "run", rows_of(125, names))))
    shown, codes = arrays.sources
    assert len(shown) == 9
    assert shown[-1] == OTHERS
    assert (codes == 8).sum() == 4 * 10  # the largest eight have 11 or 10 rows
    assert len(written(tmp_path / "r.html", arrays.run.path)) > 1000


def test_several_runs_side_by_side(folder: Path, tmp_path: Path) -> None:
    rows = rows_of(120)
    random = [make_run(tmp_path / f"random-{s}", rows, method="random", seed=s, test=2.0 + s / 10) for s in (0, 1)]
    less = make_run(tmp_path / "less-1", rows, seed=1, test=1.7)
    found = report([folder, less, *random], tmp_path / "r.html")
    held = {(line.group, line.test): line for line in between.held_out(found)}
    assert [line.runs for line in held.values()] == [2, 2]
    ours = held["less", "held"]
    assert ours.loss is not None
    assert ours.loss.mean == pytest.approx(1.6)
    assert ours.loss.half == pytest.approx(12.7062 * np.std([1.5, 1.7], ddof=1) / np.sqrt(2), rel=1e-4)
    assert ours.gain is not None
    assert ours.gain.mean == pytest.approx(((1.5 - 2.0) + (1.7 - 2.1)) / 2)
    assert held["random", "held"].gain is None
    assert dict(between.differences(found))["component_name"] == ["less", "less", "random", "random"]
    names, values = between.overlap(found)
    assert len(names) == 4
    sets = [{line["row_key"] for line in each.arrays.run.rounds().to_pylist() if line["round"]} for each in found]
    for i, one in enumerate(sets):
        for j, other in enumerate(sets):
            assert values[i, j] == pytest.approx(len(one & other) / len(one | other))
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    assert "On rows that no run has seen" in page.text
    assert "1.6000 ± " in page.text


def test_the_same_run_twice_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "report", str(folder), f"{folder}/", "-o", str(tmp_path / "r.html"))
    assert code == 2
    assert "expected each run once" in err
    assert not (tmp_path / "r.html").exists()


def test_the_command_says_where_the_page_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "report", str(folder), "-o", str(tmp_path / "deep" / "r.html"))
    assert code == 0
    assert re.fullmatch(rf"wrote {tmp_path}/deep/r.html: 1 run, 0\.\d MB\n", out)
    code, out, _ = run(capsys, "report", str(folder), "-o", str(tmp_path / "r.html"), "--json")
    (about,) = json.loads(out)
    assert about["folder"] == str(folder)
    assert [line["name"] for line in about["rounds"]] == ["warm-up", "update 1", "update 2", "update 3"]


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "x" / "seed-1", tmp_path / "a" / "y" / "seed-1", tmp_path / "a" / "y"]
    assert labels(paths) == ["x/seed-1", "y/seed-1", "y"]
    assert labels(paths[:1]) == ["seed-1"]


def test_a_mixture_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lines = [
        {"step": s, "proportions": {"a": 0.5 + s / 20, "b": 0.5 - s / 20}, "rewards": {"a": 1.0, "b": -s}}
        for s in (0, 2, 4)
    ]
    (tmp_path / "run" / "mixture.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run" / "dataflex_run.json").write_text('{"train_type": "dynamic_mix", "method": "odm"}')
    page = Page(written(tmp_path / "r.html", tmp_path / "run"))
    assert "Shares of domains" in page.text
    assert ("aria-label", "rewards by domain over steps") in page.attributes
    (tmp_path / "run" / "trainer_log.jsonl").write_text('{"current_steps": 1, "dataflex/weight_max": 3.0}\n')
    page = Page(written(tmp_path / "r.html", tmp_path / "run"))
    assert "Factors of losses" in page.text


def test_pictures_are_small_and_plain() -> None:
    svg = (
        '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'width="1pt" height="1pt" viewBox="0 0 1 1"><metadata>x</metadata><defs><style>*{}</style>'
        '<path id="m1" d="M 1.234567 2.000001"/></defs><g id="axes_1"><use xlink:href="#m1" x="3.14159" '
        'style="fill: #010203; stroke: #ff0000; font-family: x"/></g></svg>'
    )
    found = cleaned(svg, "one", "said")
    assert '<path d="M 1.23 2" id="one-m1" />' in found
    assert '<use x="3.14" fill="currentColor" stroke="#ff0000" href="#one-m1" />' in found
    for gone in ("style", "metadata", "axes_1", "font-family", "width"):
        assert gone not in found


def test_row_keys_are_told_apart_by_their_heads(tmp_path: Path) -> None:
    run_folder = RunFolder(make_run(tmp_path / "run", rows_of(40)))
    (found,) = heads([run_folder])
    keys = {line["row_key"] for line in run_folder.rounds().to_pylist() if line["round"]}
    assert sorted(int.from_bytes(key[:8], "big") for key in keys) == found.tolist()


def test_scores_are_the_methods_and_ranks_its_rules(tmp_path: Path) -> None:
    """A rule may prefer low scores, or draw by chance: what is drawn and said are the scores."""
    folder = make_run(tmp_path / "run", rows_of(80), prefers=lambda scores: -scores)
    arrays = Arrays(RunFolder(folder))
    assert arrays.last is not None
    pool = pq.read_table(folder / "rounds" / "pool-00003.parquet")
    assert [None if np.isnan(s) else s for s in arrays.last.pool] == pool["judged"].to_pylist()
    about = facts("x", arrays)
    scores = sorted(s for s in pool["judged"].to_pylist() if s is not None)
    assert [line["score"] for line in about.best] == pytest.approx(scores[:8])
    assert [line["rank"] for line in about.best] == list(range(1, 9))
    assert [line["score"] for line in about.worst] == pytest.approx(scores[::-1][:8])
    assert all(line["prompt"] is not None for line in (*about.best, *about.worst))


def test_equal_scores_are_of_equal_rank_and_their_texts_are_those_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows_of(200), chosen=40, prefers=lambda scores: (scores > 1.0).astype(float))
    about = facts("x", Arrays(RunFolder(folder)))
    assert {line["rank"] for line in about.best} == {1}
    assert len({line["rank"] for line in about.worst}) == 1
    assert all(line["prompt"] is not None for line in (*about.best, *about.worst))


def test_runs_are_held_against_random_rows_of_the_same_setting(tmp_path: Path) -> None:
    rows = rows_of(60)
    ours = make_run(tmp_path / "less", rows, test=2.0)
    own = make_run(tmp_path / "own", rows, method="random", test=2.5)
    other = make_run(tmp_path / "other", rows, method="random", test=9.0, learning_rate=9.0)
    copy = make_run(tmp_path / "copy", rows, test=2.2)
    found = report([ours, own, other, copy], tmp_path / "r.html")
    held = {(line.group, line.runs): line for line in between.held_out(found)}
    line = held["less", 2]
    assert line.gain is not None
    assert line.gain.mean == pytest.approx(2.1 - 2.5)
    assert line.loss is not None
    assert line.loss.mean == pytest.approx(2.1)
    assert line.loss.half is None  # two runs of one seed are one


def test_a_long_mixture_is_thinned_and_its_last_share_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lines = [{"step": s, "proportions": {"a": 1 - s / 9000, "b": s / 9000}} for s in range(9000)]
    (tmp_path / "run" / "mixture.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run" / "dataflex_run.json").write_text('{"train_type": "dynamic_mix"}')
    text = written(tmp_path / "r.html", tmp_path / "run")
    assert len(text) < 100_000
    (tmp_path / "run" / "mixture.jsonl").write_text(json.dumps(lines[0]) + "\n")
    (tmp_path / "run" / "dataflex_summary.json").write_text('{"steps": 30}')
    assert ">30<" in written(tmp_path / "r.html", tmp_path / "run")  # the axis goes to the end of the training


def test_what_turns_letters_is_a_sign_and_nulls_are_nothing(tmp_path: Path) -> None:
    assert legible("a\u202eb\u2066c") == "a�b�c"
    folder = make_run(tmp_path / "run", rows_of(30), chosen=8)
    about = json.loads((folder / "dataflex_run.json").read_text())
    (folder / "dataflex_run.json").write_text(json.dumps(dict.fromkeys(about) | {"planned": {"estimate": "soon"}}))
    assert len(written(tmp_path / "r.html", folder)) > 1000


def test_no_other_file_becomes_a_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("mine")
    for command in (["report", str(folder), "-o"], ["show", str(folder), "--parquet"]):
        code, _, err = run(capsys, *command, str(tmp_path / "run.yaml"))
        assert code == 2
        assert "expected a name that ends in" in err
    assert (tmp_path / "run.yaml").read_text() == "mine"


@pytest.mark.parametrize(("names", "leans"), [(["less", "random"], False), (["gsm8k/less", "gsm8k/random"] * 3, True)])
def test_names_that_would_touch_lean(names: list[str], leans: bool) -> None:
    svg = figures.matrix(names, np.eye(len(names)), "p", "run", "said")
    assert ("rotate(-30" in svg) == leans
