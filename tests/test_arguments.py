"""Every argument stands in the table of what it does to values; what enters gives another name when it is changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.config import load
from dataflex.config.arguments import _LLAMAFACTORY, _OURS, ARGUMENTS, SETTINGS, values
from dataflex.config.keys import DataflexKeys, FlatKeys
from dataflex.config.llamafactory_keys import known_keys
from dataflex.errors import ConfigError, MismatchError
from dataflex.fingerprint import digest, model_digest

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


class Stop(Exception):
    """Leaves the workflow with its trainer made."""


@contextmanager
def changed(holder: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, kept)


def another(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return True if value is None else not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "more"] if isinstance(value, list) else f"{value}-other"


@pytest.mark.timeout(300)
def test_what_enters_is_another_name_when_it_is_changed(workspace: Any, tmp_path: Path) -> None:
    """One trainer; each argument is changed once, and every name that is to tell it does."""
    from dataflex.features.spec import LossSpec
    from dataflex.llamafactory import workflow
    from dataflex.pipelines.run import open_run
    from dataflex.trainers.lineage import lineage

    settings = load(workspace.write("run", lora_dropout=0.0))
    made: list[Any] = []

    def begin(trainer: Any, checkpoint: str | None) -> None:
        made.append(trainer)
        raise Stop

    director = SimpleNamespace(begin=begin, decide=None, schedule=settings.schedule, interrupts=True)
    with pytest.raises(Stop):
        workflow.run(settings.llamafactory, director)  # type: ignore[arg-type]
    (trainer,) = made

    def names() -> tuple[str, str, str]:
        """Return the names of a loss at this state, of the warm-up's end, and of the run."""
        run = open_run(settings, trainer, "train")
        story = lineage(trainer, run.state.origin(), run.rows.keys[:12], 0, 3)
        return digest(run.state.recipe(LossSpec())), digest(story), run.identity

    config, files = trainer.model.config, tmp_path / "file.yaml"
    files.write_text("{}")
    shutil.copytree(workspace.tiny.model, tmp_path / "same")
    shutil.copytree(workspace.tiny.model, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(written | {"rms_norm_eps": 1e-5}))
    special: dict[str, Any] = {
        "lr_scheduler_type": "constant_with_warmup",
        "lr_scheduler_kwargs": {},
        "deepspeed": str(files),
        "new_special_tokens_config": str(files),
        "model_name_or_path": str(tmp_path / "model"),
    }
    telling = {"model": (0, 1, 2), "drawn": (0, 1, 2), "drawn file": (0, 1, 2), "step": (1, 2), "step file": (1, 2),
               "schedule": (2,), "order": (2,), "batch": (1,)}  # fmt: skip
    act_beside = {
        "pissa_iter": (trainer.finetuning_args, "pissa_init", True),
        "init_special_tokens": (trainer.model_arguments, "resize_vocab", True),
    }
    holders = trainer.args, trainer.finetuning_args, trainer.model_arguments
    before, seen = names(), set()
    assert names() == before
    for holder in holders:
        for name in (field.name for field in dataclasses.fields(holder)):
            way = ARGUMENTS.get(name)
            if way in telling:
                value = getattr(holder, name)
                beside = act_beside.get(name)
                with changed(*beside) if beside else changed(holder, name, value):
                    start = names() if beside else before
                    with changed(holder, name, special.get(name, another(value))):
                        after = names()
                for which in telling[way]:
                    assert after[which] != start[which], (name, which)
                if way in ("step", "step file"):
                    assert after[0] == start[0], name
                seen.add(name)
    assert seen == {name for name, way in ARGUMENTS.items() if way in telling}
    with changed(trainer.args, "deepspeed", str(files)):
        one = names()
        files.write_text('{"zero_optimization": {"stage": 1}}')
        assert names()[1:] != one[1:]
    with changed(trainer.model_arguments, "model_name_or_path", str(tmp_path / "same")):
        assert names() == before
    with changed(trainer.model_arguments, "model_name_or_path", str(tmp_path / "model")):
        assert all(a != b for a, b in zip(names(), before, strict=True))
    for name, value in {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "_attn_implementation": "eager",
    }.items():
        with changed(config, name, value):
            assert names()[0] != before[0], name
    with changed(trainer.finetuning_args, "use_asft_loss", True):
        tuned = trainer.finetuning_args
        with changed(tuned, "ref_model", str(tmp_path / "same")):
            one = names()
            with changed(tuned, "ref_model", str(tmp_path / "model")):
                assert names()[1] != one[1]
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ConfigError, match="as gptq"):
        names()
    del config.quantization_config
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "fragment_rows": 64}
    own: dict[str, Any] = {"update_times": 5, "warmup_step": 4, "dataflex": {**section, "storage": "int8"}}
    for name, value in own.items():
        other = load(workspace.write("run", lora_dropout=0.0, **{name: value}))
        assert open_run(other, trainer, "train").identity != before[2], name
    assert open_run(load(workspace.write("run", lora_dropout=0.0)), trainer, "train").identity == before[2]


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
    from dataflex.pipelines.state import _code_elsewhere

    folder, other = tmp_path / "model", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "modeling_far.py").write_text("from .near import x\n")
    (other / "near.py").write_text("x = 1\n")
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": f"{other}--modeling_far.Far"}}))
    first = _code_elsewhere(folder, None)
    assert first[str(other)].keys() == {"modeling_far.py", "near.py"}
    (other / "near.py").write_text("x = 2\n")
    assert _code_elsewhere(folder, None) != first
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "somebody/model--modeling_far.Far"}}))
    with pytest.raises(MismatchError, match=r"auto_map names modeling_far\.py of somebody/model, which is not at hand"):
        _code_elsewhere(folder, None)
