"""The code of a user's component is part of what its decisions are known by."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataflex.components.registry import MIXERS, SELECTORS, WEIGHTERS, import_plugin
from dataflex.components.user_code import code_digest, modules_digest
from dataflex.errors import ConfigError, MismatchError
from dataflex.rewards import REWARDS, build_reward, reward_identity
from dataflex.selectors.less import Less
from tests.workspace import cut_back

PACKAGE = {
    "__init__.py": "",
    "method.py": "import json\nimport numpy\nfrom . import near\nfrom .deep.far import x\nimport beside\n"
    "class Method:\n    def act(self):\n        from mine_late import late\n        import nosuch_module_anywhere\n",
    "near.py": "a = 1\n",
    "unused.py": "from mine import method\n",
    "deep/__init__.py": "",
    "deep/far.py": "x = 1\nfrom .. import near\n",
}
BESIDE = {"beside.py": "b = 1\n", "mine_late.py": "late = 1\n", "alone.py": "class Alone: ...\n"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder of a user's code, on Python's path."""
    for name, text in ({f"mine/{k}": v for k, v in PACKAGE.items()} | BESIDE).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    known = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in sys.modules.keys() - known:
        if name.partition(".")[0] in ("mine", "beside", "mine_late", "alone"):
            del sys.modules[name]


def test_every_file_that_is_imported_enters_and_no_other(folder: Path) -> None:
    method = importlib.import_module("mine.method").Method
    before = code_digest(method)
    assert before == code_digest(method) == code_digest(sys.modules["mine.method"])
    assert len(str(before)) == 32
    entering = {"mine/__init__.py", "mine/method.py", "mine/near.py", "mine/deep/__init__.py", "mine/deep/far.py"}
    entering |= {"beside.py", "mine_late.py"}
    for path in sorted(folder.rglob("*.py")):
        kept = path.read_text()
        path.write_text(kept + "# changed\n")
        assert (code_digest(method) != before) == (path.relative_to(folder).as_posix() in entering), path
        path.write_text(kept)
    assert code_digest(method) == before


def test_code_is_the_same_wherever_it_lies(folder: Path) -> None:
    copy = shutil.copy(folder / "alone.py", folder / "mine" / "alone.py")
    first, second = import_plugin(str(folder / "alone.py")), import_plugin(str(copy))
    assert first.__name__ != second.__name__
    assert code_digest(first.Alone) == code_digest(second.Alone)


def test_our_own_code_is_known_by_its_version_and_code_without_a_file_by_nothing() -> None:
    assert code_digest(Less) is None
    assert code_digest(None) is None
    made = type("Made", (), {"__module__": "written_at_a_prompt"})
    with pytest.raises(ConfigError, match=r"Made: found no file that it is written in(.|\n)*\.py file"):
        code_digest(made)


REWARD = """
import beside
from pydantic import BaseModel
from dataflex.rewards import register_reward

def half(prompts, responses, references):
    return [0.5 for _ in responses]

class Half:
    class Params(BaseModel):
        pass
    def __init__(self, params):
        pass
    def score(self, prompts, responses, references):
        return [0.5 for _ in responses]
    def identity(self):
        return {"type": "half"}
"""


@pytest.mark.parametrize("changed", ["half.py", "beside.py"])
def test_rewards_are_kept_under_their_code(folder: Path, changed: str) -> None:
    (folder / "half.py").write_text(REWARD)
    named: list[tuple[str, dict[str, Any]]] = [
        (f"{folder}/half.py:Half", {}),
        ("function", {"function": f"{folder}/half.py:half"}),
    ]
    for name, params in named:
        before = reward_identity(build_reward(name, params))
        assert before == reward_identity(build_reward(name, params))
        (folder / changed).write_text((folder / changed).read_text() + "# changed\n")
        assert reward_identity(build_reward(name, params)) != before
    assert "code" not in reward_identity(build_reward("exact_match", {}))


METHODS = {
    "dynamic_select": """
from dataflex.selectors import Selector

class Method(Selector):
    def select(self, model, step_id, num_samples, **kwargs):
        return list(range(num_samples))
""",
    "dynamic_mix": """
from dataflex.mixers import Mixer

class Method(Mixer):
    def mix(self, model, step_id, **kwargs):
        return [0.5, 0.5]
""",
    "dynamic_weight": """
from dataflex.weighters import Weighter

class Method(Weighter):
    def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
        return losses.mean()
""",
}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("dynamic_mix", "dynamic_weight")]


@pytest.mark.parametrize("kind", ["dynamic_select", *SLOW])
def test_a_change_of_code_ends_what_would_have_been_replayed(workspace: Any, kind: str) -> None:
    file = workspace.folder / "method.py"
    file.write_text(METHODS[kind])
    keys: dict[str, Any] = {"train_type": kind, "component_name": f"{file}:Method", "dataflex": None}
    keys |= {"warmup_step": 1, "update_step": 1, "update_times": 1, "dataset": "pool,target_words"}
    if kind == "dynamic_weight":
        keys |= {"update_step": None, "update_times": None, "train_step": 2}
    path = workspace.write("run", **keys)
    out = workspace.folder / "out" / "run"

    def resumed() -> dict[str, Any]:
        cut_back(out, 1)
        return dict(workspace.run("train", path))

    workspace.run("train", path)
    summary = resumed()
    assert summary.get("updates", []) == []
    file.write_text(METHODS[kind] + "# changed\n")
    if kind == "dynamic_select":
        assert len(resumed()["updates"]) == 1
    else:
        with pytest.raises(MismatchError, match="code"):
            resumed()


@pytest.mark.slow
def test_a_changed_reward_replays_no_round(workspace: Any) -> None:
    file = workspace.folder / "half.py"
    file.write_text(
        REWARD.replace("import beside", "import zlib").replace("0.5 for _", "float(zlib.crc32(_.encode()) % 7) for _")
    )
    params: dict[str, Any] = {"proj_dim": 64, "mc_samples": 2, "max_new_tokens": 4}
    params["reward"] = {"type": "function", "function": f"{file}:half"}
    section = {"store": str(workspace.folder / "store"), "params": params}
    keys: dict[str, Any] = {"warmup_step": 1, "update_step": 1, "update_times": 1, "dataflex": section}
    path = workspace.write("run", component_name="nice", **keys)
    workspace.run("train", path)
    for changed in (False, True):
        cut_back(workspace.folder / "out" / "run", 1)
        if changed:
            file.write_text(file.read_text() + "# changed\n")
        assert len(workspace.run("train", path)["updates"]) == changed


SELECTOR = """
import numpy as np
from dataflex.selectors import Selector

def make(sign):
    class Mine(Selector):
        def select(self, model, step_id, num_samples, *, context, **kwargs):
            return np.argsort(sign * context.rows.length, kind="stable")[:num_samples]
    return Mine
"""


@pytest.fixture
def fresh() -> Iterator[Any]:
    """Return a function that forgets the plugins, as a new process would."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("dataflex_plugin_")]:
            del sys.modules[name]

    yield forget
    forget()


def test_the_file_that_names_a_class_enters_beside_that_which_defines_it(folder: Path, fresh: Any) -> None:
    (folder / "alone.py").write_text(SELECTOR)
    plug = folder / "plug.py"
    seen = []
    for sign, comment in ((1, ""), (-1, ""), (-1, "# changed\n")):
        plug.write_text(f"from alone import make\nMine = make({sign})\n")
        (folder / "alone.py").write_text(SELECTOR + comment)
        fresh()
        seen.append(code_digest(SELECTORS.load(f"{plug}:Mine")))
    assert len(set(seen)) == 3
    assert None not in seen


@pytest.mark.parametrize("registry", [SELECTORS, MIXERS, WEIGHTERS, REWARDS], ids=lambda registry: registry.kind)
def test_a_plugin_that_registers_a_built_in_enters(folder: Path, fresh: Any, registry: Any) -> None:
    name, place = list(registry.builtins.items())[-1]
    module, _, cls = place.partition(":")
    text = "from dataflex.components.registry import *\nfrom dataflex.rewards import REWARDS\n"
    text += f"from {module} import {cls}\n"
    text += f"{registry.kind.upper()}S.register('theirs')({cls})\n"
    seen = []
    for i in (1, 2):
        (folder / "plug.py").write_text(text + f"{cls}.x = {i}\n")
        fresh()
        seen.append(code_digest(registry.load("theirs", [str(folder / "plug.py")])))
        seen.append(code_digest(registry.load(f"{folder / 'plug.py'}:{cls}")))
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert None not in seen
    assert code_digest(registry.load(name)) is None


@pytest.mark.parametrize(
    "path", ["r'{folder}/base.py'", "str(Path(__file__).parent / 'base.py')"], ids=["literal", "computed"]
)
def test_what_a_plugin_fetches_enters(folder: Path, fresh: Any, path: str) -> None:
    (folder / "base.py").write_text("class Base:\n    def select(self):\n        return 1\n")
    (folder / "plug.py").write_text(
        "from pathlib import Path\nfrom dataflex.components.registry import import_plugin\n"
        f"Base = import_plugin({path.format(folder=folder)}).Base\nclass Mine(Base): ...\n"
    )
    mine = SELECTORS.load(f"{folder / 'plug.py'}:Mine")
    before = code_digest(mine)
    (folder / "base.py").write_text("class Base:\n    def select(self):\n        return 2\n")
    assert code_digest(mine) != before


def test_a_literal_import_within_a_function_is_followed(folder: Path, fresh: Any) -> None:
    (folder / "base.py").write_text("x = 1\n")
    (folder / "plug.py").write_text(
        "class Mine:\n    def select(self):\n        import importlib\n"
        "        from dataflex.components.registry import import_plugin\n"
        f"        return import_plugin('{folder}/base.py').x + importlib.import_module('beside').b\n"
    )
    mine = SELECTORS.load(f"{folder / 'plug.py'}:Mine")
    seen = [code_digest(mine)]
    for changed in ("base.py", "beside.py"):
        (folder / changed).write_text("x = b = 2\n")
        seen.append(code_digest(mine))
    assert len(set(seen)) == 3


def test_files_of_one_name_all_enter(folder: Path) -> None:
    (folder / "deep").mkdir()
    files = [folder / "plug.py", folder / "deep" / "plug.py"]
    for file in files:
        file.write_text("x = 1\n")
    modules = [import_plugin(str(file)).__name__ for file in files]
    seen = [modules_digest(modules)]
    for file in files:
        file.write_text("x = 2\n")
        seen.append(modules_digest(modules))
    assert len(set(seen)) == 3


@pytest.mark.slow
def test_a_changed_factory_or_plugin_is_another_run(folder: Path, fresh: Any, workspace: Any) -> None:
    (folder / "alone.py").write_text(SELECTOR)
    plug, beside = folder / "plug.py", folder / "patch.py"
    beside.write_text("from dataflex.selectors.random import Random\nRandom.x = 1\n")
    section = {"store": str(workspace.folder / "store"), "plugins": [str(beside)]}
    keys: dict[str, Any] = {"warmup_step": 1, "update_step": 1, "update_times": 1, "dataflex": section}
    keys |= {"eval_dataset": None, "component_name": f"{plug}:Mine"}
    plug.write_text("from alone import make\nMine = make(1)\n")
    path = workspace.write("run", **keys)
    rounds = []
    for changed, text in ((plug, plug.read_text()), (plug, "from alone import make\nMine = make(-1)\n"), (beside, "")):
        changed.write_text(text)
        fresh()
        summary = workspace.run("train", path)
        assert len(summary["updates"]) == 1, changed
        rounds.append(workspace.rounds("run")[-1])
        cut_back(workspace.folder / "out" / "run", 1)
    assert rounds[0] != rounds[1] == rounds[2]
    assert workspace.run("train", path)["updates"] == []
