"""A name stands for one class: a user's own before a built-in, two of one name or none an error that says where."""

from __future__ import annotations

import collections
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import dataflex
from dataflex.components.registry import SELECTORS, Registry, import_plugin
from dataflex.errors import ConfigError


@pytest.fixture
def registry() -> Registry[object]:
    return Registry("thing", "dataflex.tests", {"builtin": "collections:OrderedDict", "broken": "no_such_module:X"})


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Another distribution with two entry points, one of which wants a built-in name."""
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: other\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[dataflex.tests]\ntheirs = collections:Counter\nbuiltin = collections:deque\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


def test_builtin_is_loaded_on_demand(registry):
    assert registry.load("builtin").__name__ == "OrderedDict"
    with pytest.raises(ConfigError, match="importing no_such_module failed"):
        registry.load("broken")


def test_decorator_registers_and_returns_the_class(registry):
    @registry.register("mine")
    class Mine: ...

    assert registry.load("mine") is Mine
    assert registry.places()["mine"] == f"{__name__}:{Mine.__qualname__}"


def test_one_name_for_two_classes_names_both(registry):
    @registry.register("mine")
    class First: ...

    with pytest.raises(ConfigError) as caught:

        @registry.register("mine")
        class Second: ...

    assert "First" in str(caught.value)
    assert "Second" in str(caught.value)
    registry.register("mine")(First)  # a module imported twice registers the same class again
    assert registry.load("mine") is First


def test_a_builtin_name_is_the_users_class_and_a_line_says_so(registry):
    @registry.register("builtin")
    class Mine: ...

    assert registry.load("builtin") is Mine
    place = f"{__name__}:{Mine.__qualname__}"
    assert registry.places()["builtin"] == place
    said = registry.override("builtin", Mine)
    assert said == f"thing 'builtin' is {place} ({__file__}), in place of the built-in collections:OrderedDict"
    assert registry.override("mine", Mine) is None
    assert registry.override("builtin", collections.OrderedDict) is None


def test_module_and_class_is_a_name(registry):
    assert registry.load("collections:Counter").__name__ == "Counter"
    with pytest.raises(
        ConfigError, match=r"found no Countr in collections; expected a class; did you mean 'Counter'\?"
    ):
        registry.load("collections:Countr")
    with pytest.raises(ConfigError, match="found module at collections:abc; expected a class"):
        registry.load("collections:abc")


def test_entry_points_follow_the_same_rule(registry, installed):
    assert registry.places() == {
        "builtin": "collections:deque",
        "broken": "no_such_module:X",
        "theirs": "collections:Counter",
    }
    assert registry.load("theirs").__name__ == "Counter"
    assert registry.load("builtin").__name__ == "deque"

    @registry.register("builtin")
    class Mine: ...

    with pytest.raises(ConfigError, match=r"found in .*Mine and in collections:deque; expected one"):
        registry.load("builtin")
    registry.register("theirs")(collections.Counter)  # an entry point's module may register the class as well
    assert registry.load("theirs") is collections.Counter


def test_unknown_name_suggests_and_lists(registry):
    with pytest.raises(ConfigError) as caught:
        registry.load("biltin")
    assert "found 'biltin'; expected a thing (broken, builtin) or module:Class; did you mean 'builtin'?" in str(
        caught.value
    )


def test_what_a_plugin_registers_is_for_those_who_name_it(registry, tmp_path, monkeypatch):
    plugin = tmp_path / "my plugin.py"
    plugin.write_text(
        "from test_registry_target import REGISTRY\nREGISTRY.register('theirs')(type('Theirs', (), {}))\n"
    )
    target = type(sys)("test_registry_target")
    target.REGISTRY = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "test_registry_target", target)
    registry.load("builtin", [str(plugin)])
    assert "theirs" not in registry.places()
    assert registry.load("theirs", [str(plugin)]).__name__ == "Theirs"
    assert import_plugin(str(plugin)) is import_plugin(str(plugin))


def test_plugin_that_fails_is_not_kept(tmp_path):
    plugin = tmp_path / "bad.py"
    plugin.write_text("import no_such_module")
    for _ in range(2):
        with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
            import_plugin(str(plugin))
    with pytest.raises(ConfigError, match="found no file"):
        import_plugin(str(tmp_path / "gone.py"))


def test_selectors_load_apart():
    assert {"static", "random", "less"} <= set(SELECTORS.places())
    assert "odm" not in SELECTORS.places()
    assert dataflex.register_selector.__self__ is SELECTORS  # type: ignore[attr-defined]
    code = (
        "import sys; from dataflex.components.registry import SELECTORS; SELECTORS.load('random'); "
        "print([m for m in sys.modules if m in ('torch', 'transformers', 'dataflex.selectors.less')])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
