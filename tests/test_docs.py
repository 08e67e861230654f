"""The documentation: every page is reached, every link leads somewhere, and the reference leaves nothing out."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from dataflex.cli import app
from dataflex.config.arguments import ARGUMENTS, SETTINGS, Way
from dataflex.config.keys import DataflexKeys, FlatKeys
from dataflex.config.methods import methods
from dataflex.features.spec import FeatureSpec
from dataflex.rewards.base import REWARDS
from docs import pages, reference

ROOT = Path(__file__).parents[1]
INDEX = ROOT / f"{pages.INDEX}.md"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if "_build" not in path.parts
)
"""Markdown that belongs to the site."""


@cache
def text(path: Path) -> str:
    return pages.filled(path.read_text("utf-8"))


def prose(path: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text(path), flags=re.MULTILINE | re.DOTALL)


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file, and the part of it, of every link of a page that stays in the repository."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(path)):
        name, _, part = link.partition("#")
        yield ((path.parent / name).resolve() if name else path), part


def anchors(path: Path) -> set[str]:
    """Return what can be linked to in a page: its headings, as GitHub calls them, and labels of generated parts."""
    headings = re.findall(r"^#+ (.+)", prose(path), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", each) for each in headings]
    slugs = {re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in plain}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text(path), re.MULTILINE))


def test_every_page_is_listed_once_in_the_index() -> None:
    trees = re.findall(r"```\{toctree\}\n.*?\n\n(.*?)\n```", pages.contents(INDEX.read_text("utf-8")), re.DOTALL)
    listed = [(INDEX.parent / f"{name}.md").resolve() for tree in trees for name in re.findall("<(.+)>", tree)]
    assert sorted(listed) == [path for path in PAGES if path != INDEX]
    assert (INDEX, "") in links(ROOT / "README.md")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for found, part in links(path):
        assert found.is_file(), f"{found}: the site has no page for a folder" if found.is_dir() else found
        assert not part or part in anchors(found), f"{found}#{part}"


def rows(generated: str) -> dict[str, list[str]]:
    """Return the cells of a generated table by what its first column says."""
    lines = [line.strip("|").split(" | ") for line in generated.splitlines() if line.startswith("| `")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def cell(text: str | None) -> str:
    """Return a text as a cell of a table has it."""
    return (text or "").replace("|", r"\|").replace("<", "&lt;")


def dotted(model: type[BaseModel], before: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        inner = [each for each in (field.annotation, *get_args(field.annotation)) if isinstance(each, type)]
        section = next((each for each in inner if each.__module__ == DataflexKeys.__module__), None)
        if section is None:
            yield f"{before}{name}", field
        else:
            yield from dotted(section, f"{before}{name}.")


def test_the_reference_has_every_key_with_its_default_and_meaning() -> None:
    told = rows(reference.keys())
    every = dict([*dotted(FlatKeys, ""), *dotted(DataflexKeys, "dataflex.")])
    beside = {f"`dataflex.{name}`" for name in ("params", "weighter.params", "prefilter.params")}
    assert set(told) == {f"`{name}`" for name in every} | beside
    assert len(every) > 40
    for name, field in every.items():
        _, default, meaning = told[f"`{name}`"]
        assert meaning == cell(field.description) != ""
        if field.is_required():
            assert default == "*required*"
        elif isinstance(field.default, str | int | float):
            assert default.strip("`") in (str(field.default), json.dumps(field.default))


def test_the_reference_says_of_every_argument_how_it_enters() -> None:
    lines = [re.findall(r"`([\w.]+)`", line.partition(" | ")[2]) for line in reference.identities().splitlines()[2:]]
    assert len(lines) == len(get_args(Way))
    ours = [f"dataflex.{name}" if name in DataflexKeys.model_fields else name for name in SETTINGS]
    assert sorted(name for line in lines for name in line) == sorted([*ARGUMENTS, *ours])


def test_the_reference_has_every_method_with_every_parameter() -> None:
    told = reference.methods()
    found = [each for each in methods() if each["class"].startswith("dataflex.")]
    assert len(found) > 20
    for method in found:
        label = f"({method['kind']}-{method['name']})=\n### "
        part = re.split(r"^(?:\(|## )", told.partition(label)[2], maxsplit=1, flags=re.MULTILINE)[0]
        assert part.startswith(f"{method['name']}\n\n{method['description']}")
        known = rows(part)
        assert list(known) == [f"`{each['name']}`" for each in method["params"]], method["name"]
        for each in method["params"]:
            assert known[f"`{each['name']}`"][2] == cell(each["description"]) != ""
    parts = told.partition("## Parts")[2]
    assert set(re.findall(r"\(#(method-part-\w+)\)", told)) == set(re.findall(r"^\((.*)\)=$", parts, re.MULTILINE))
    assert "|  |" not in told, "a parameter without a meaning"


def section(told: str, name: str) -> dict[str, list[str]]:
    """Return the table below a heading."""
    return rows(re.split(r"^(?:\(|#)", told.partition(f"### {name}\n")[2], maxsplit=1, flags=re.MULTILINE)[0])


def test_the_reference_has_every_feature_and_reward() -> None:
    told = reference.features()
    for spec in get_args(get_args(FeatureSpec)[0]):
        fields = [f"`{name}`" for name in spec.model_fields if name != "kind"]
        assert list(section(told, spec.model_fields["kind"].default)) == fields, spec
    assert "|  |" not in told, "a parameter without a meaning"
    told = reference.rewards()
    assert re.findall(r"^### (\w+)$", told, re.MULTILINE) == sorted(REWARDS.builtins)
    for name in REWARDS.builtins:
        assert list(section(told, name)) == [f"`{each}`" for each in REWARDS.load(name).Params.model_fields], name


def options(callback: Any) -> Iterator[str]:
    """Yield the options of a verb as its function declares them."""
    for name, parameter in inspect.signature(callback, eval_str=True).parameters.items():
        for about in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(about, typer.models.OptionInfo):
                every = map(str, (about.default, *(about.param_decls or ())))
                named = [each for each in every if each.startswith("-")]
                yield from named or (f"--{name.replace('_', '-')}",)


def verbs(group: typer.Typer, before: str) -> Iterator[tuple[str, Any]]:
    for command in group.registered_commands:
        assert command.callback
        yield f"{before} {command.name or command.callback.__name__}", command.callback
    for each in group.registered_groups:
        assert each.typer_instance
        yield from verbs(each.typer_instance, f"{before} {each.name}")


def test_the_reference_has_every_verb_with_every_option() -> None:
    told = reference.commands()
    every = dict(verbs(app, "dataflex"))
    assert {"dataflex compare", "dataflex store gc"} <= set(every)
    for name, callback in every.items():
        part = re.search(rf"^##+ {name}$(.*?)(?=^##|\Z)", told, re.MULTILINE | re.DOTALL)
        assert part, name
        assert " ".join((callback.__doc__ or "").split("\n\n")[0].split()) in part[1]
        for option in options(callback):
            assert re.search(rf"`{option}[ `]", part[1]), f"{name} {option}"


def code(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def test_the_selector_of_the_how_to_chooses(workspace: Any) -> None:
    """By an independent computation: long rows cost what `price` says."""
    from omegaconf import OmegaConf

    from dataflex.config import load
    from dataflex.pipelines.select import select

    (workspace.folder / "my_selector.py").write_text(code("own_selector.md", "python")[0])
    keys: Any = OmegaConf.to_container(OmegaConf.create(code("own_selector.md", "yaml")[0]))
    section = keys["dataflex"] | {"store": str(workspace.folder / "store")}
    section["plugins"] = [str(workspace.folder / "my_selector.py")]
    chosen = {}
    for price in (0.0, 1000.0):
        path = workspace.write(f"price-{price}", **keys | {"dataflex": section | {"params": {"price": price}}})
        select(load(path), 10, workspace.folder / f"{price}.json")
        records = json.loads((workspace.folder / f"{price}.json").read_text("utf-8"))
        chosen[price] = [len(json.dumps(record)) for record in records]
    assert len(chosen[0.0]) == len(chosen[1000.0]) == 10
    assert sum(chosen[1000.0]) < sum(chosen[0.0])


def test_the_rewards_of_the_how_to_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataflex.rewards import build_reward

    monkeypatch.chdir(tmp_path)
    function, tried, written = code("own_reward.md", "python")
    Path("my_rewards.py").write_text(function)
    Path("my_reward_class.py").write_text(written)
    scope: dict[str, Any] = {}
    exec(tried, scope)
    assert scope["brevity"].score(["What is 2 + 2?"], ["It is 4."], ["4"]) == [-0.08]
    lines = build_reward("lines", {"wanted": 2}, ["./my_reward_class.py"])
    assert lines.score(["", ""], ["a\nb", "a\nb\nc"], ["", ""]) == [1, 0]
