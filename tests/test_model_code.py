"""Code that comes with a model is part of what the model is known by, wherever it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dataflex.errors import MismatchError
from dataflex.fingerprint import model_digest


def test_code_that_comes_with_a_model_is_part_of_its_digest(tiny: Any, tmp_path: Path) -> None:
    """What `auto_map` names in the folder and what that imports relatively, and nothing else that lies there."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoModelForCausalLM": "modeling_own.Own", "AutoTokenizer": [None, "words.Fast"]}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": named, "limits": [0.0, float("inf")]}))
    sources = {
        "modeling_own.py": "from .layers import Layer\nfrom . import parts\n",
        "layers.py": "def make():\n    from .deep.inner import x\n",
        "deep/__init__.py": "",
        "deep/inner.py": "x = 1\n",
        "parts.py": "y = 1\n",
        "words.py": "z = 1\n",
    }
    (folder / "deep").mkdir()
    for name, text in sources.items():
        (folder / name).write_text(text)
    seen = {model_digest(folder)}
    for name, text in sources.items():
        (folder / name).write_text(f"{text}# changed\n")
        seen.add(model_digest(folder))
    assert len(seen) == 1 + len(sources)
    (folder / "convert.py").write_text("import json\n")
    (folder / "README.md").write_text("more\n")
    assert model_digest(folder) in seen


def test_code_of_another_repository_is_digested_or_refused_by_name(tiny: Any, tmp_path: Path) -> None:
    from dataflex.live.base_model import code_elsewhere

    folder, other = tmp_path / "model", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "modeling_far.py").write_text("from .near import x\n")
    (other / "near.py").write_text("x = 1\n")
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": f"{other}--modeling_far.Far"}}))
    first = code_elsewhere(folder, None)
    assert first[str(other)].keys() == {"modeling_far.py", "near.py"}
    (other / "near.py").write_text("x = 2\n")
    assert code_elsewhere(folder, None) != first
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "somebody/model--modeling_far.Far"}}))
    with pytest.raises(MismatchError, match=r"auto_map names modeling_far\.py of somebody/model, which is not at hand"):
        code_elsewhere(folder, None)
