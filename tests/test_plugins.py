"""Components of one's own run: under a built-in's name or another, by plugin, file, module or entry point."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from dataflex.components.registry import MIXERS, SELECTORS, WEIGHTERS, use_plugins
from dataflex.config import load
from dataflex.config.methods import methods, table
from dataflex.config.overview import summary
from dataflex.errors import ConfigError
from dataflex.rewards.base import REWARDS, build_reward

SELECTOR = """\
import logging

from dataflex.selectors import Selector, register_selector

logger = logging.getLogger(__name__)


@register_selector("{name}")
class CustomSelector(Selector):
    def __init__(self, dataset, accelerator, data_collator, cache_dir):
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        logger.info("CustomSelector initialized.")

    def select(self, model, step_id: int, num_samples: int, **kwargs):
        return list(range(num_samples))
"""
MIXER = """\
import logging

import numpy as np

from dataflex.mixers import Mixer, register_mixer

logger = logging.getLogger(__name__)


@register_mixer("{name}")
class RandomMixer(Mixer):
    def __init__(self, mixture_manager, seed=None):
        super().__init__(mixture_manager)
        self.rng = np.random.default_rng(seed)

    def mix(self, model, step_id: int, **kwargs) -> np.ndarray:
        k = len(self.mixture_manager.names)
        raw = self.rng.random(k)
        probs = raw / raw.sum()
        logger.info(f"[RandomMixer] Step {{step_id}} proportions: {{probs}}")
        return probs
"""
WEIGHTER = """\
from typing import Any

import torch
from torch import nn

from dataflex.weighters import Weighter, register_weighter


@register_weighter("{name}")
class CustomWeighter(Weighter):
    def __init__(self, strategy: str = "uniform", **kwargs):
        super().__init__(**kwargs)
        self.strategy = strategy

    def get_weighted_loss(
        self,
        losses: torch.Tensor,
        *,
        ctx: Any = None,
        model: nn.Module | None = None,
        inputs: dict[str, torch.Tensor | Any] | None = None,
    ) -> torch.Tensor:
        return losses.mean()
"""
KINDS: dict[str, tuple[Any, str, str, str]] = {
    "dynamic_select": (SELECTORS, SELECTOR, "CustomSelector", "random"),
    "dynamic_mix": (MIXERS, MIXER, "RandomMixer", "random"),
    "dynamic_weight": (WEIGHTERS, WEIGHTER, "CustomWeighter", "loss"),
}


@pytest.fixture(autouse=True)
def _forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    use_plugins(())


def write(folder: Path, kind: str, component: str, **section: Any) -> Path:
    folder.mkdir(exist_ok=True)
    values = {
        "model_name_or_path": "owner/model",
        "stage": "sft",
        "do_train": True,
        "dataset_dir": "ONLINE",
        "dataset": "a/pool,b/pool",
        "template": "qwen",
        "output_dir": "out",
        "train_type": kind,
        "component_name": component,
        "dataflex": section,
    }
    values |= {"update_step": 2, "update_times": 1} if kind != "dynamic_weight" else {"max_steps": 2}
    values |= {"train_step": 4} if kind == "dynamic_mix" else {}
    path = folder / "run.yaml"
    path.write_text(OmegaConf.to_yaml(values), "utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_name_a_class_follows_one_rule(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the run file and not the working folder, under a built-in's name, a new one, and as the class itself."""
    registry, source, cls, builtin = KINDS[kind]
    folder = tmp_path / "run"
    folder.mkdir()
    plain = load(write(folder, kind, builtin))
    assert plain.component is not None
    assert plain.component.__module__.startswith("dataflex.")
    assert not [note for note in plain.notes if "in place of" in note]

    (folder / "mine.py").write_text(source.format(name=builtin))
    (folder / f"own_{kind}.py").write_text(source.format(name="own"))
    monkeypatch.syspath_prepend(str(folder))
    mine = load(write(folder, kind, builtin, plugins=["./mine.py"]))
    assert getattr(mine.component, "__name__", None) == cls
    (said,) = [note for note in mine.notes if "in place of" in note]
    for part in (f"{registry.kind} '{builtin}' is ", str(folder / "mine.py"), f"built-in {registry.builtins[builtin]}"):
        assert part in said
    assert said in "\n".join(summary(mine))

    ways = [("./mine.py:" + cls, {}), (f"own_{kind}:{cls}", {}), ("own", {"plugins": [f"own_{kind}"]})]
    for name, section in ways:
        found = load(write(folder, kind, name, **section))
        assert getattr(found.component, "__name__", None) == cls
        assert not [note for note in found.notes if "in place of" in note]
    # A plugin is imported whatever the run's component is; and what an earlier run's registered is that run's.
    (folder / "seen.py").write_text("import pathlib\npathlib.Path('seen').touch()\n")
    assert load(write(folder, kind, builtin, plugins=["./seen.py"])).component is plain.component
    assert (tmp_path / "seen").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_point_takes_a_builtin_name_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, source, cls, builtin = KINDS[kind]
    folder = tmp_path / "site"
    about = folder / "other-1.0.dist-info"
    about.mkdir(parents=True)
    module = f"announced_{kind}"
    (folder / f"{module}.py").write_text(source.format(name=builtin))
    (about / "METADATA").write_text("Name: other\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{registry.group}]\n{builtin} = {module}:{cls}\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    found = load(write(tmp_path / "run", kind, builtin))
    assert str(found.component) == f"<class '{module}.{cls}'>"
    assert f"{registry.kind} '{builtin}' is {module}:{cls}" in "\n".join(found.notes)
    listed = next(m for m in methods() if (m["kind"], m["name"]) == (registry.kind, builtin))
    assert (listed["class"], listed["in_place_of"]) == (f"{module}:{cls}", registry.builtins[builtin])
    assert f"in place of the built-in {registry.builtins[builtin]})" in "\n".join(table([listed]))
    # With a plugin of the same name it is not known which is meant.
    (tmp_path / "run" / "mine.py").write_text(source.format(name=builtin))
    with pytest.raises(ConfigError, match=rf"found in .*:{cls} and in {module}:{cls}; expected one"):
        load(write(tmp_path / "run", kind, builtin, plugins=["./mine.py"]))


def test_a_reward_follows_it_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataflex.rewards import Parameters, register_reward\n\n\n"
        "@register_reward('exact_match')\nclass Mine:\n    class Params(Parameters):\n        mine: int = 3\n\n"
        "    def __init__(self, params): ...\n    def score(self, *texts): ...\n    def identity(self): ...\n"
    )
    builtin = type(build_reward("exact_match", {}))
    assert type(build_reward("exact_match", {"mine": 4}, ["./mine.py"])).__name__ == "Mine"
    assert type(build_reward("exact_match", {})) is builtin
    use_plugins(["./mine.py"])
    assert "mine" in REWARDS.load("exact_match").Params.model_fields


def test_two_plugins_under_one_name_are_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(SELECTOR.format(name="custom"))
    with pytest.raises(ConfigError, match=r"found in dataflex_plugin_one_\w+:C.* and in dataflex_plugin_two_\w+:C"):
        load(write(tmp_path, "dynamic_select", "custom", plugins=["./one.py", "./two.py"]))
    assert load(write(tmp_path, "dynamic_select", "custom", plugins=["./two.py"])).component
    # The same file under two names is one plugin.
    sys.path.insert(0, str(tmp_path))
    try:
        assert load(write(tmp_path, "dynamic_select", "custom", plugins=["one", "./one.py"])).component
    finally:
        sys.path.remove(str(tmp_path))


NAMES = [
    (":", "expected a selector by its name, as module:Class or file.py:Class"),
    ("x:", "expected a selector by its name, as module:Class or file.py:Class"),
    (":X", "expected a selector by its name, as module:Class or file.py:Class"),
    ("./p.py:", "expected a selector by its name, as module:Class or file.py:Class"),
    ("a..b:X", "expected the dotted name of a module"),
    (".a:X", "expected the dotted name of a module"),
    ("a/b:X", "expected the dotted name of a module"),
    ("a b:X", "expected the dotted name of a module"),
    ("no_such_package.module:X", "importing no_such_package.module failed: No module named 'no_such_package'"),
    ("~nobody_here/x.py:X", "found no file"),
    ("./gone.py:X", "found no file"),
    (f"./{'x' * 300}.py:X", "found no file"),
    (".py:X", "found no file"),
    ("./p.py:Gone", "found no Gone in "),
    ("./p.py:A..b", "found no A..b in "),
    ("./p.py:number", "found int at "),
    ("./p.py:Empty", "found a class without select at "),
    ("./p.py:Half", "does not define select; expected it to"),
    ("collections:Counter", "found a class without select at collections:Counter; expected a selector"),
    ("dataflex.mixers.odm:Odm", "found a class without select at dataflex.mixers.odm:Odm"),
    ("./syntax.py:X", "importing ./syntax.py failed: SyntaxError: "),
    (
        "./raises.py:X",
        "importing ./raises.py failed: ZeroDivisionError: division by zero ({here}/raises.py, line 2)",
    ),
    ("./wants.py:X", "importing ./wants.py failed: No module named 'no_such_package'"),
    ("./twice.py:X", "selector 'same': found in "),
]


@pytest.mark.parametrize(("name", "said"), NAMES, ids=[name[:30] for name, _ in NAMES])
def test_what_is_wrong_is_said_in_a_line(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(
        "from dataflex.selectors import Selector\nnumber = 3\n\n\nclass Empty: ...\n\n\nclass Half(Selector): ...\n"
    )
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("\n1 / 0\n")
    (tmp_path / "wants.py").write_text("import no_such_package\n")
    register = "from dataflex.selectors import register_selector\n"
    classes = "@register_selector('same')\nclass X: ...\n@register_selector('same')\nclass Y: ...\n"
    (tmp_path / "twice.py").write_text(register + classes)
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, "dynamic_select", name))
    text = str(caught.value)
    assert said.format(here=tmp_path) in text
    assert "1 problem in" in text
    assert len(text.splitlines()) <= 4
    plugin = name.rpartition(":")[0]
    if "./p.py" not in name and plugin and not plugin.startswith(("collections", "dataflex", "x")):
        with pytest.raises(ConfigError, match=r"dataflex\.plugins\.0"):
            load(write(tmp_path, "dynamic_select", "random", plugins=[plugin]))


def test_validate_says_whose_class_is_used_and_imports_no_torch_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MIXER.format(name="random"))
    path = write(tmp_path, "dynamic_mix", "random", plugins=["./mine.py"])
    code = (
        "import sys\nfrom dataflex.cli import main\n"
        f"try:\n    main(['validate', {str(path)!r}])\n"
        "finally:\n    print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"({tmp_path}/mine.py), in place of the built-in dataflex.mixers.random:Random" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_documented_components_train(workspace: Any) -> None:
    """One of each kind, as a user writes them down."""
    from tests.workspace import lines, mix, weigh

    folder = workspace.folder
    for name, source in (("selector", SELECTOR), ("mixer", MIXER), ("weighter", WEIGHTER)):
        (folder / f"{name}.py").write_text(source.format(name="random" if name == "mixer" else "custom"))

    def section(name: str, **params: Any) -> dict[str, Any]:
        return {"plugins": [f"./{name}.py"], "params": params, "store": str(folder / "store")}

    short = {"save_strategy": "no", "warmup_step": 0, "update_times": 1}
    workspace.run("train", workspace.write("selected", component_name="custom", dataflex=section("selector"), **short))
    assert [sorted(rows) for rows in workspace.rounds("selected")] == [list(range(8))]
    mixed = {"component_name": "random", "update_step": 2, "update_times": -1, "train_step": 2}
    workspace.run("train", mix(workspace, "mixed", dataflex=section("mixer", seed=7), **mixed))
    raw = np.random.default_rng(7).random(3)
    assert np.allclose(list(lines(workspace, "mixed")[0]["proportions"].values()), raw / raw.sum())
    keys = {"max_steps": 1, "dataflex": section("weighter", strategy="uniform")}
    workspace.run("train", weigh(workspace, "weighed", "custom", **keys))
    assert workspace.weights("weighed")
