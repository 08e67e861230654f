"""The page about a real run in a real browser: all of it is shown, nothing is asked for, its policy is kept.

Chromium is Debian's package; where it is not installed, these tests are skipped and say so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dataflex.pipelines.report import report
from dataflex.rows import Text
from tests.run_folders import make_run, rows_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: `apt-get install chromium`"),
]


@dataclass(frozen=True)
class Opened:
    """A page as the browser has it, and what it said and asked for meanwhile."""

    page: Any
    said: list[str]
    asked: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def real(tiny: Any, tmp_path_factory: pytest.TempPathFactory, workspace_class: Any) -> Path:
    """The page of a run of LESS beside one of random rows."""
    space = workspace_class(tmp_path_factory.mktemp("real"), tiny)
    section = {"store": str(space.folder / "store"), "params": {"proj_dim": 256}, "test_dataset": tiny.targets[1]}
    pool = {"dataset": "pool,target_records", "update_times": 3, "dataflex": section}
    space.run("train", space.write("less", **pool))
    section = {k: v for k, v in section.items() if k != "params"}
    space.run("train", space.write("random", **{**pool, "component_name": "random", "dataflex": section}))
    out = space.folder / "out"
    report([out / "less", out / "random"], out / "report.html")
    return Path(out / "report.html")


def opened(browser: Any, path: Path, width: int = 1200, scheme: str = "light") -> Opened:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    return Opened(page, said, asked)


def colours(page: Any) -> tuple[list[int], list[int]]:
    """Return the colours of paper and ink, as red, green, blue."""
    found = page.evaluate("() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]; }")
    paper, ink = ([int(part) for part in text.strip("rgb()").split(",")] for text in found)
    return paper, ink


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_the_page_of_a_real_run(browser: Any, real: Path, width: int, scheme: str, tmp_path: Path) -> None:
    found = opened(browser, real, width, scheme)
    page = found.page
    assert found.said == []
    assert found.asked == [real.as_uri()]
    assert page.title() == "less and random"
    for heading in ("On rows that no run has seen", "The runs together", "Which rows were chosen", "Why: their scores"):
        assert page.get_by_role("heading", name=heading).is_visible()
    pictures = page.get_by_role("img").all()
    assert len(pictures) >= 8
    for picture in pictures:
        box = picture.bounding_box()
        assert box["width"] > 150
        assert box["height"] > 80
        assert box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
    paper, ink = colours(page)
    assert (sum(paper) > sum(ink)) is (scheme == "light")
    assert abs(sum(paper) - sum(ink)) > 400
    label = page.locator("figure svg text").first
    assert label.evaluate("e => getComputedStyle(e).fill") == label.evaluate(
        "e => getComputedStyle(document.body).color"
    )
    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 50_000
    page.close()


def test_every_link_leads_to_its_section_and_details_open(browser: Any, real: Path) -> None:
    found = opened(browser, real)
    page = found.page
    links = page.locator("nav a").all()
    assert len(links) >= 5
    for link in links:
        link.click()
        target = page.locator(link.get_attribute("href"))
        assert target.count() == 1
        assert target.locator("h2").is_visible()
    near = page.locator("details", has_text="nearest target rows").first
    assert not near.locator("li").first.is_visible()
    near.locator("summary").click()
    assert near.locator("li").first.is_visible()
    assert "cosine" in near.locator("li").first.inner_text()
    page.close()


def test_hostile_rows_do_nothing(browser: Any, tmp_path: Path) -> None:
    sets = "document.title='owned'"
    evil = (
        f'</pre><script>{sets}</script><img src=\'https://example.com/x\' onerror="{sets}"><svg onload="{sets}"></svg>'
        "<style>body{display:none}</style><a href='javascript:alert(1)'>x</a><iframe src='file:///etc/passwd'></iframe>"
        "<meta http-equiv=refresh content='0;url=https://example.com'>\u202ereversed"
    )
    rows = replace(rows_of(60, (evil[:60], "b", "c")), text=lambda row: Text(evil, evil))
    folder = make_run(tmp_path / "run", rows, note=evil)
    (folder / "status.json").write_text(json.dumps({"state": "failed", "message": evil}))
    report([folder], tmp_path / "r.html")
    found = opened(browser, tmp_path / "r.html")
    assert found.said == []
    assert found.asked == [(tmp_path / "r.html").as_uri()]
    assert found.page.title() == "run"
    assert found.page.locator("body").is_visible()
    assert evil.replace("\u202e", "�") in found.page.locator("pre.prompt").first.text_content()
    assert found.page.locator("iframe, script, img, a[href^=javascript]").count() == 0
    # What turns letters round ends with the text that has it.
    after = found.page.locator("pre.response").first
    assert after.evaluate("e => getComputedStyle(e.firstElementChild).unicodeBidi") == "isolate"
    found.page.close()


def test_a_page_that_breaks_its_policy_is_noticed(browser: Any, tmp_path: Path) -> None:
    """The checks above can fail: a style attribute and a script are refused, and said."""
    report([make_run(tmp_path / "run", rows_of(30), chosen=8)], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text("utf-8")
    (tmp_path / "bad.html").write_text(
        text.replace("<main>", "<main><p style='color: red'>x</p><script>document.title='owned'</script>"), "utf-8"
    )
    found = opened(browser, tmp_path / "bad.html")
    assert len(found.said) == 2
    assert found.page.title() == "run"
    found.page.close()
