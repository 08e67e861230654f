"""Every argument stands in the table of what it does to values; what enters gives another name when it is changed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dataflex.config import load
from dataflex.config.arguments import _LLAMAFACTORY, _OURS, ARGUMENTS, SETTINGS, values
from dataflex.config.keys import DataflexKeys, FlatKeys
from dataflex.config.llamafactory_keys import known_keys
from dataflex.errors import ConfigError, MismatchError
from dataflex.fingerprint import difference, digest, keys_digest, model_digest

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


TURNS = {"dataset": "turns", "template": "qwen3"}
PACKED = {"stage": "pt", "dataset": "text", "eval_dataset": "text_target", "template": "default", "cutoff_len": 16,
          "packing": True}  # fmt: skip
TWO = {"dataset": "pool,turns", "eval_dataset": "target_words,turns"}
INTERLEAVED = TWO | {"mix_strategy": "interleave_under"}
ROWS: dict[str, tuple[dict[str, Any], Any]] = {
    "template": ({}, "default"),
    "dataset": ({}, "turns"),
    "eval_dataset": ({}, "target_words"),
    "dataset_dir": ({}, "other"),
    "cutoff_len": ({}, 24),
    "train_on_prompt": ({}, True),
    "mask_history": (TURNS, True),
    "mix_strategy": (TWO, "interleave_under"),
    "interleave_probs": (INTERLEAVED, "0.2,0.8"),
    "preprocessing_batch_size": (PACKED, 5),
    "preprocessing_num_workers": (PACKED, 2),
    "max_samples": ({}, 5),
    "val_size": ({"eval_dataset": None}, 0.5),
    "eval_on_each_dataset": (INTERLEAVED, True),
    "packing": (PACKED, False),
    "tool_format": (TURNS, "llama3"),
    "default_system": ({}, "Be short."),
    "enable_thinking": (TURNS, False),
    "preserve_thinking": (TURNS | {"mask_history": True}, True),
    "tokenized_path": ({"max_samples": 5}, "tokens"),
    "use_fast_tokenizer": ({}, False),
    "split_special_tokens": ({}, True),
}
"""Each argument that enters through the rows: beside which others it acts, and another value."""

UNREAD = {"use_fast_tokenizer"}
"""Those of them that the installed Transformers does not read: the tokens are the same, and so are the names."""


def lay_out_rows(tiny: Any, folder: Path) -> None:
    """Copy the tiny datasets into `data` and `other`, with records of several turns, tools and thoughts."""
    shutil.copytree(tiny.dataset_dir, folder / "data")
    said = [("human", "Add 1 and 2."), ("gpt", "<think>\n1 and 2\n</think>\n\n3"), ("human", "And 4?"), ("gpt", "7")]
    tool = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}, "required": []}}
    turns = {"conversations": [{"from": who, "value": text} for who, text in said], "tools": json.dumps([tool])}
    (folder / "data" / "turns.json").write_text(json.dumps([turns] * 3))
    info = json.loads((folder / "data" / "dataset_info.json").read_text())
    columns = {"messages": "conversations", "tools": "tools"}
    info["turns"] = {"file_name": "turns.json", "formatting": "sharegpt", "columns": columns}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    shutil.copytree(folder / "data", folder / "other")
    pool = json.loads((folder / "data" / "pool.json").read_text())
    (folder / "other" / "pool.json").write_text(json.dumps(pool[1:]))


def rows_named(tiny: Any, folder: Path, **keys: Any) -> Any:
    """Load a run's rows as a run does; return the part of its identity that they are."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from dataflex.llamafactory.row_sets import load_rows

    given = {
        "model_name_or_path": str(tiny.model),
        "stage": "sft",
        "do_train": True,
        "dataset": "pool",
        "eval_dataset": "target_arithmetic",
        "dataset_dir": str(folder / "data"),
        "template": "qwen3_nothink",
        "cutoff_len": 400,
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "report_to": "none",
        "max_samples": 20,
        **keys,
    }
    for name in ("dataset_dir", "tokenized_path"):
        if given.get(name) in ("other", "tokens"):
            given[name] = str(folder / given[name])
    model_args, data_args, training_args, tuning_args, _ = get_train_args(given)
    module = load_tokenizer(model_args)
    with patch.dict(TEMPLATES, copy.deepcopy(TEMPLATES)):  # LLaMA-Factory writes arguments into what all runs share
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        sets = load_rows(template, model_args, data_args, training_args, tuning_args.stage, **module)
    return keys_digest(sets.train.keys), {name: keys_digest(rows.keys) for name, rows in sets.targets.items()}


@pytest.mark.timeout(300)
def test_arguments_that_enter_through_the_rows_give_other_rows_or_are_refused(tiny: Any, tmp_path: Path) -> None:
    assert ROWS.keys() == {name for name, way in ARGUMENTS.items() if way == "rows"}
    lay_out_rows(tiny, tmp_path)
    rows_named(tiny, tmp_path, tokenized_path="tokens")
    starts: dict[str, Any] = {}
    for name, (beside, value) in ROWS.items():
        if name == "tokenized_path":
            with pytest.raises(MismatchError, match=r"max_samples: 20 → 5"):
                rows_named(tiny, tmp_path, **beside, tokenized_path=value)
            continue
        start = starts.setdefault(json.dumps(beside), None) or rows_named(tiny, tmp_path, **beside)
        starts[json.dumps(beside)] = start
        assert (rows_named(tiny, tmp_path, **(beside | {name: value})) == start) == (name in UNREAD), name
    assert rows_named(tiny, tmp_path) == starts["{}"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run with its trainer made, which trains nothing."""

    workspace: Any
    settings: Any
    trainer: Any

    def names(self) -> tuple[str, str, str]:
        """Return the names of a loss at this state, of the warm-up's end, and of the run."""
        from dataflex.features.spec import LossSpec
        from dataflex.pipelines.run import open_run
        from dataflex.trainers.lineage import lineage

        run = open_run(self.settings, self.trainer, "train", self.trainer.rounds)
        story = lineage(self.trainer, run.state.origin(), run.rows.keys[:12], 0, 3)
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
    "storage": ({}, "int8"),
    "exclude_targets": ({}, True),
}  # fmt: skip
"""Each of DataFlex's own settings that enters: beside which others it acts, and another value."""
IN_SECTION = {"refresh", "mixture", "weighter", "storage", "exclude_targets"}


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
