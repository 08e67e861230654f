"""Every argument stands in the table of what it does to values, and what it forbids is refused by its name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import load
from dataflex.config.arguments import _LLAMAFACTORY, _OURS, ARGUMENTS, SETTINGS, values
from dataflex.config.keys import DataflexKeys, FlatKeys
from dataflex.config.llamafactory_keys import known_keys
from dataflex.errors import ConfigError

REFUSED: dict[str, Any] = {
    "mixture_of_depths": "convert",
    "use_unsloth": True,
    "use_kt": True,
    "use_mca": True,
    "use_hyper_parallel": True,
    "export_quantization_bit": 4,
    "streaming": True,
    "neat_packing": True,
    "ignore_pad_token_for_loss": False,
    "fsdp": "full_shard",
    "auto_find_batch_size": True,
    "do_train": False,
    "enable_jit_checkpoint": True,
}


def test_every_argument_of_the_installed_llamafactory_is_in_the_table_once() -> None:
    assert sorted(known_keys().keys() - ARGUMENTS.keys()) == []
    # A name that stands twice would be there once in what is made of the tables.
    for table, found in ((_LLAMAFACTORY, ARGUMENTS), (_OURS, SETTINGS)):
        assert len(" ".join(table.values()).split()) == len(found)
    assert SETTINGS.keys() == FlatKeys.model_fields.keys() | DataflexKeys.model_fields.keys()


def test_what_is_refused_is_refused_by_its_name(workspace: Any) -> None:
    assert REFUSED.keys() == {name for name, way in ARGUMENTS.items() if way == "refused"}
    for name, value in REFUSED.items():
        with pytest.raises(ConfigError, match=rf"{name}: found"):
            load(workspace.write("run", **{name: value}))
    weighted = {"train_type": "dynamic_weight", "component_name": "loss", "warmup_step": 0, "update_times": None}
    with pytest.raises(ConfigError, match="ignore_pad_token_for_loss: found false"):
        load(workspace.write("run", ignore_pad_token_for_loss=False, dataflex=None, update_step=None, **weighted))
    # Where padding is never trained on, there is nothing to refuse.
    load(workspace.write("run", ignore_pad_token_for_loss=False, stage="pt", template=None))


def test_an_argument_that_is_not_in_the_table_enters_unless_it_has_its_default() -> None:
    @dataclasses.dataclass
    class Newer:
        seed: int = 1
        twist: float = 0.5
        parts: list[str] = dataclasses.field(default_factory=list)

    assert values(("step",), Newer()) == {"seed": 1}
    assert values(("model",), Newer(twist=0.7, parts=["a"])) == {"twist": 0.7, "parts": ["a"]}


def test_a_base_that_was_saved_quantised_gives_no_gradients(workspace: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq", "bits": 4}}))
    keys = {"model_name_or_path": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"model_name_or_path: found a base saved quantised \(awq\)"):
        load(workspace.write("run", **keys))
    load(workspace.write("run", component_name="loss", dataflex=None, eval_dataset=None, **keys))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    load(workspace.write("run", **keys))


def test_a_rope_that_this_transformers_cannot_scale_is_refused(workspace: Any, tmp_path: Path) -> None:
    """LLaMA-Factory multiplies a length by a float, which the configurations of some versions do not take."""
    model = tmp_path / "short"
    shutil.copytree(workspace.tiny.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    keys = {"rope_scaling": "linear", "max_samples": 8, "model_name_or_path": str(model)}
    with pytest.raises(ConfigError, match=r"rope_scaling: found .*max_position_embeddings"):
        workspace.run("featurize", workspace.write("rope", **keys))
