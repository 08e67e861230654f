"""An argument or setting that enters values gives features, states or runs another name when it is changed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import load
from dataflex.config.arguments import ARGUMENTS, SETTINGS
from dataflex.errors import ConfigError
from dataflex.fingerprint import difference, digest


class Stop(Exception):
    """Leaves the workflow with its trainer made."""


@contextlib.contextmanager
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


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run with its trainer made, which trains nothing."""

    workspace: Any
    settings: Any
    trainer: Any

    def names(self) -> tuple[str, str, str]:
        """Return the names of a loss at this state, of the warm-up's exact end, and of the run."""
        from dataflex.features.spec import LossSpec
        from dataflex.pipelines.run import open_run
        from dataflex.trainers.lineage import lineage

        run = open_run(self.settings, self.trainer, "train", self.trainer.rounds)
        story = lineage(self.trainer, run.state.origin(), run.rows.keys[:12], 0, 3, is_exact=True)
        return digest(run.state.recipe(LossSpec())), digest(story), run.identity


@pytest.fixture(scope="module")
def opened(workspace_class: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    from dataflex.llamafactory import workflow
    from dataflex.trainers.directing import Directing

    workspace = workspace_class(tmp_path_factory.mktemp("opened"), tiny)
    settings = load(workspace.write("run", lora_dropout=0.0))
    made: list[Any] = []

    def begin(trainer: Any, checkpoint: str | None) -> Any:
        made.append(trainer)
        raise Stop

    with pytest.raises(Stop):
        workflow.run(settings.llamafactory, Directing(begin, settings.schedule))
    return Opened(workspace, settings, made[0])


TELLING = {
    "model": (0, 1, 2), "drawn": (0, 1, 2), "drawn file": (0, 1, 2), "step": (1, 2), "step file": (1, 2),
    "schedule": (2,), "order": (2,), "batch": (1,), "content": (0, 1, 2), "reference": (1,),
}  # fmt: skip
"""The ways that the arguments of a trainer enter, and which of `Opened.names` tell it."""


def test_every_way_is_gone_through() -> None:
    elsewhere = {"rows", "configuration", "identity", "refused", "no value"}
    assert TELLING.keys() | elsewhere == {*ARGUMENTS.values(), *SETTINGS.values()}
    assert TELLING.keys().isdisjoint(elsewhere)


def cached(folder: Path, contents: dict[str, Path]) -> Path:
    """Lay out a cache of the Hub with one model, `own/model`, whose revisions have these contents."""
    model = folder / "cache" / "models--own--model"
    for number, (revision, content) in enumerate(contents.items()):
        commit = f"{number}" * 40
        shutil.copytree(content, model / "snapshots" / commit)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(commit)
    return folder / "cache"


@pytest.mark.timeout(300)
def test_what_enters_is_another_name_when_it_is_changed(opened: Opened, tmp_path: Path) -> None:
    """One trainer; each argument is changed once, and every name that is to tell it does."""
    trainer, names, files = opened.trainer, opened.names, tmp_path / "file.yaml"
    files.write_text("{}")
    same, model = (shutil.copytree(opened.workspace.tiny.model, tmp_path / name) for name in ("same", "model"))
    written = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(written | {"rms_norm_eps": 1e-5}))
    adapters = tmp_path / "adapters"
    for name in ("one", "two"):
        (adapters / name).mkdir(parents=True)
        (adapters / name / "adapter_config.json").write_text("{}")
        (adapters / name / "adapter_model.safetensors").write_text(name)
    one, two = (str(adapters / name) for name in ("one", "two"))
    special: dict[str, Any] = {
        "lr_scheduler_type": "constant_with_warmup",
        "lr_scheduler_kwargs": {},
        "deepspeed": str(files),
        "new_special_tokens_config": str(files),
        "model_name_or_path": str(model),
        "adapter_name_or_path": [two, two],
        "adapter_folder": "two",
        "model_revision": "other",
        "ref_model": str(model),
        "ref_model_adapters": f"{one},{two}",
        "ref_model_quantization_bit": 4,
    }
    tuned, about = trainer.finetuning_args, trainer.model_arguments
    compared = [(tuned, "use_asft_loss", True), (tuned, "ref_model", str(same))]
    beside: dict[str, list[tuple[Any, str, Any]]] = {
        "pissa_iter": [(tuned, "pissa_init", True)],
        "init_special_tokens": [(about, "resize_vocab", True)],
        "adapter_name_or_path": [(about, "adapter_name_or_path", [one, two])],
        "adapter_folder": [(about, "adapter_name_or_path", [str(adapters)] * 2), (about, "adapter_folder", "one")],
        "create_new_adapter": [(about, "adapter_name_or_path", [one])],
        "model_revision": [
            (about, "model_name_or_path", "own/model"),
            (about, "cache_dir", str(cached(tmp_path, {"main": same, "other": model}))),
        ],
        **dict.fromkeys(("ref_model", "ref_model_adapters", "ref_model_quantization_bit"), compared),
    }
    holders = trainer.args, tuned, about
    before, seen = names(), set()
    assert names() == before
    for holder in holders:
        for name in (field.name for field in dataclasses.fields(holder)):
            way = ARGUMENTS.get(name)
            if way in TELLING:
                with contextlib.ExitStack() as others:
                    for other in beside.get(name, ()):
                        others.enter_context(changed(*other))
                    start = names() if name in beside else before
                    with changed(holder, name, special.get(name, another(getattr(holder, name)))):
                        after = names()
                for which in TELLING[way]:
                    assert after[which] != start[which], (name, which)
                if way in ("step", "step file"):
                    assert after[0] == start[0], name
                seen.add(name)
    assert seen == {name for name, way in ARGUMENTS.items() if way in TELLING}
    with changed(trainer.args, "deepspeed", str(files)):
        once = names()
        files.write_text('{"zero_optimization": {"stage": 1}}')
        assert names()[1:] != once[1:]
    with changed(about, "model_name_or_path", str(same)):
        assert names() == before
    trainer.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ConfigError, match="as gptq"):
        names()
    del trainer.model.config.quantization_config


def test_what_changes_the_loaded_configuration_is_another_name_or_refused(opened: Opened, tmp_path: Path) -> None:
    """LLaMA-Factory loads the model anew, and its configuration tells what it was asked for."""
    from huggingface_hub.errors import StrictDataclassError
    from llamafactory.model import load_model

    short = shutil.copytree(opened.workspace.tiny.model, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    others = {"flash_attn": "disabled", "rope_scaling": "linear"}
    assert others.keys() == {name for name, way in ARGUMENTS.items() if way == "configuration"}
    trainer, arguments = opened.trainer, opened.trainer.model_arguments

    def named(**changes: Any) -> tuple[str, str]:
        given = copy.copy(arguments)
        for name, value in changes.items():
            setattr(given, name, value)
        model = load_model(trainer.processing_class, given, trainer.finetuning_args, True)
        # The adapter is drawn anew at each loading, and with it the name of the warm-up's end.
        with changed(trainer, "model", model), changed(trainer, "model_arguments", given):
            loss, _, run = opened.names()
        return loss, run

    start = named(model_name_or_path=str(short))
    assert named(model_name_or_path=str(short)) == start
    for name, value in others.items():
        # Where this Transformers does not take what LLaMA-Factory sets, there is no run: a test below has the words.
        with contextlib.suppress(StrictDataclassError):
            after = named(model_name_or_path=str(short), **{name: value})
            assert all(a != b for a, b in zip(after, start, strict=True)), name


MIX: dict[str, Any] = {
    "train_type": "dynamic_mix", "component_name": "static", "dataset": "pool,target_words", "warmup_step": 0,
    "update_times": None, "dataflex": {},
}  # fmt: skip


MOE = MIX | {
    "component_name": "dynamic_moe", "eval_dataset": "target_arithmetic,target_records,target_words", "update_step": 2,
}  # fmt: skip


RANDOM: dict[str, Any] = {"component_name": "random", "dataset": "pool,target_words", "dataflex": {}, "warmup_step": 0}


OWN: dict[str, tuple[dict[str, Any], Any]] = {
    "train_type": (RANDOM, "dynamic_mix"),
    "component_name": ({"dataflex": {}}, "random"),
    "warmup_step": ({}, 4),
    "update_step": ({}, 3),
    "update_times": ({}, 5),
    "train_step": (MIX | {"train_step": 4}, 6),
    "static_mix": (MIX, True),
    "mixture_sample_rule": (MIX, "uniform"),
    "init_mixture_proportions": (MIX | {"init_mixture_proportions": [0.5, 0.5]}, [0.25, 0.75]),
    "mixer_eval_dataset": (
        MOE | {"mixer_eval_dataset": "target_arithmetic,target_records"}, "target_records,target_arithmetic",
    ),
    "freeze_gate": (MOE, True),
    "refresh": ({}, {"policy": "static"}),
    "mixture": (MIX, {"unit": "tokens"}),
    "weighter": (MIX | {"dataflex": {"weighter": {"name": "loss"}}}, {"name": "adapt"}),
    "prefilter": ({"dataflex": {"prefilter": {"method": "rds_plus"}}}, {"method": "rds_plus", "keep": 0.5}),
    "storage": ({}, "int8"),
    "exclude_targets": ({}, True),
}  # fmt: skip
"""Each of DataFlex's own settings that enters: beside which others it acts, and another value."""


IN_SECTION = {"refresh", "mixture", "weighter", "prefilter", "storage", "exclude_targets"}


def settings_named(opened: Opened, beside: dict[str, Any], **changes: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the identity that a run file's own settings give a run, and what it is made of."""
    from dataflex.pipelines.run import open_run

    section = {"store": str(opened.workspace.folder / "store"), "params": {"proj_dim": 256}}
    section = {"store": section["store"]} | beside["dataflex"] if "dataflex" in beside else section
    section |= {name: value for name, value in changes.items() if name in IN_SECTION}
    keys = beside | {name: value for name, value in changes.items() if name not in IN_SECTION}
    settings = load(opened.workspace.write("own", **({"lora_dropout": 0.0} | keys | {"dataflex": section})))
    run = open_run(settings, opened.trainer, "train", opened.trainer.rounds)
    return run.identity, run.about


def test_each_own_setting_that_enters_is_another_name_when_it_is_changed(opened: Opened) -> None:
    assert OWN.keys() == {name for name, way in SETTINGS.items() if way == "identity"}
    for name, (beside, value) in OWN.items():
        before, made_of = settings_named(opened, beside)
        after, other = settings_named(opened, beside, **{name: value})
        assert after != before, name
        assert any(line.startswith(f"settings.{name}") for line in difference(other, made_of)), name
        assert settings_named(opened, beside)[0] == before, name
