"""What a run is known by elsewhere: nothing that cannot touch its result, and all that can."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field, TypeAdapter

from dataflex.components.params import Parameters, without_added
from dataflex.components.registry import MIXERS, SELECTORS, WEIGHTERS
from dataflex.config import load
from dataflex.config.arguments import ARGUMENTS, is_path, of_evaluation
from dataflex.fingerprint import plain
from dataflex.pipelines.comparing.arms import arms_of
from dataflex.pipelines.comparing.trials import trials_of


def write(workspace: Any, **more: Any) -> Path:
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "test_dataset": "target_words"}
    section |= more.pop("dataflex", {})
    return Path(workspace.write("run", dataflex=section, **{"save_strategy": "no", "update_step": 1, **more}))


def named(path: Path, arm: str, is_portable: bool = True) -> dict[str, Any]:
    """Return what the first run of an arm is known by."""
    base = load(path, [])
    (trial,) = trials_of(path, [], arms_of([arm], base), 1, (), 1, base)
    return dict(plain(trial.identity(None, 1, is_portable)))


class Before(Parameters):
    size: int = 8


class Turns(Parameters):
    added: ClassVar[Mapping[str, Any]] = {"order": None}
    order: str | None = None


class Gained(Before):
    added: ClassVar[Mapping[str, Any]] = {"over": "sets"}
    over: str = "sets"


class Holder(Turns, Gained):
    parts: dict[str, tuple[Turns, ...]] = Field({"a": (Turns(), Turns(order="b"))})


def test_a_parameter_that_came_later_is_left_out_where_it_does_what_was_done() -> None:
    assert without_added(Gained()) == without_added(Before()) == {"size": 8}
    assert without_added(Gained(over="rows")) == {"size": 8, "over": "rows"}
    assert without_added(Holder()) == {"size": 8, "parts": {"a": [{}, {"order": "b"}]}}
    assert without_added(Holder(), {"size", "over"}) == {"size": 8}


def test_a_default_that_changes_is_told() -> None:
    class Turned(Gained):
        over: str = "rows"

    assert without_added(Turned()) == without_added(Gained(over="rows"))
    assert without_added(Turned(over="sets")) == without_added(Before())


def test_what_came_later_is_a_parameter_and_has_a_value_of_it() -> None:
    def below(cls: type[Parameters]) -> Iterator[type[Parameters]]:
        yield cls
        for each in cls.__subclasses__():
            yield from below(each)

    for registry in (SELECTORS, MIXERS, WEIGHTERS):
        for name in registry.places():
            registry.load(name)
    found = {(cls, name): value for cls in below(Parameters) for name, value in vars(cls).get("added", {}).items()}
    assert {"over", "target_direction"} <= {name for _, name in found}
    for (cls, name), value in found.items():
        assert TypeAdapter(cls.model_fields[name].annotation).validate_python(value) == value


def test_gradients_that_gained_a_direction_of_targets_are_known_as_before(workspace: Any) -> None:
    composed = {"component_name": "composed", "dataflex.params": {"representation": {"kind": "gradient"}}}
    turned = {"dataflex.params": {"target_direction": "precond_only"}}
    path = write(workspace, dataflex={"arms": {"composed": composed, "turned": turned}})
    (less, _), (other, _) = named(path, "less")["params"], named(path, "composed")["params"]
    assert not {"over", "target_direction"} & less.keys()
    assert less["proj_dim"] == 256
    assert "target_direction" not in other["representation"]
    assert other["representation"]["proj_dim"] == 8192
    assert named(path, "turned")["params"][0]["target_direction"] == "precond_only"


def test_a_model_that_nothing_was_done_to_is_known_by_nothing_of_a_training(workspace: Any) -> None:
    before = named(write(workspace), "base")
    mixed: dict[str, Any] = {"params": {}, "weighter": {"name": "loss"}}
    for more in (
        {"learning_rate": 1e-4, "seed": 7, "weight_decay": 0.1, "optim": "adamw_torch_fused"},
        {"lr_scheduler_type": "linear", "max_grad_norm": 0.5},
        {"per_device_train_batch_size": 2, "warmup_step": 1, "train_step": 4, "eval_dataset": "target_records"},
        {"component_name": "loss", "dataflex": {"params": {}}},
        {"dataflex": {"target_rows": 3, "exclude_targets": True}},
        {"train_type": "dynamic_mix", "component_name": "odm", "dataflex": mixed},
    ):
        assert named(write(workspace, **more), "base") == before, more
    reward = {"type": "exact_match"}
    for other in (
        {"cutoff_len": 64}, {"template": "alpaca"}, {"train_on_prompt": True}, {"flash_attn": "sdpa"},
        {"lora_rank": 2}, {"resize_vocab": True}, {"dataset": "target_words,pool"},
        {"dataflex": {"test_dataset": "target_records"}},
        {"dataflex": {"test_reward": reward}},
    ):  # fmt: skip
        assert named(write(workspace, **other), "base") != before, other
    drawn = {"resize_vocab": True}
    assert named(write(workspace, seed=7, **drawn), "base") != named(write(workspace, **drawn), "base")


def test_an_argument_that_nobody_knows_is_of_an_evaluation_too() -> None:
    assert of_evaluation({"brand_new": 1, "learning_rate": 1.0}) == {"brand_new": 1}
    assert not {"learning_rate", "max_steps"} & of_evaluation(dict.fromkeys(ARGUMENTS, "x")).keys()
    assert {"cutoff_len", "bf16", "lora_rank", "use_badam"} <= of_evaluation(dict.fromkeys(ARGUMENTS, "x")).keys()


def test_files_of_a_model_that_nothing_reads_are_not_told(workspace: Any, tmp_path: Path) -> None:
    model = shutil.copytree(workspace.tiny.model, tmp_path / "model", copy_function=shutil.copy)
    path = write(workspace, model_name_or_path=str(model))
    before = named(path, "base")
    for name in ("made.json", "trainer_state.json", "all_results.json", "notes.txt", "README.md"):
        (model / name).write_text("{}")
    assert named(path, "base") == before
    (model / "additional_chat_templates").mkdir()
    code = {"auto_map": {"AutoTokenizer": ["own_tokenizer.Own", None]}}
    config = json.loads((model / "tokenizer_config.json").read_text())
    known = [before]
    for name, text in (
        ("tokenizer_config.json", json.dumps(config | code)), ("own_tokenizer.py", "class Own: pass"),
        ("generation_config.json", '{"top_k": 3}'), ("chat_template.jinja", "{{ messages }}"),
        ("additional_chat_templates/tools.jinja", "{{ tools }}"), ("special_tokens_map.json", '{"eos_token": "x"}'),
        ("tokenizer.model", "x"), ("vocab.json", '{"a": 0}'), ("qwen.tiktoken", "YQ== 0"),
    ):  # fmt: skip
        (model / name).write_text(text)
        known.append(named(path, "base"))
        assert known[-1] != known[-2], name


@pytest.mark.parametrize("folder", [True, False])
def test_a_word_is_no_path_though_a_file_be_called_so(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    path = write(workspace, lr_scheduler_type="cosine")
    before = named(path, "less")
    for word in ("cosine", "pool", "all", "lora", "adam"):
        (tmp_path / word).mkdir() if folder else (tmp_path / word).write_text("x")
    monkeypatch.chdir(tmp_path)
    after = named(path, "less")
    assert after["arguments"] == before["arguments"]
    assert after["data"] == before["data"]


def test_what_can_only_be_a_path_is_one() -> None:
    assert is_path("ds/zero2.json", "deepspeed")
    assert is_path("zero2", "deepspeed")
    assert is_path("config.yaml", "template")
    assert is_path("adapters", "adapter_folder")
    for name, word in (("template", "qwen2.5"), ("lr_scheduler_type", "cosine"), ("model_revision", "main")):
        assert not is_path(word, name)


def test_a_file_that_an_argument_names_is_known_by_what_it_holds(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero").write_text("{}")
    path = write(workspace, deepspeed="zero")
    before = named(path, "less")["arguments"]
    assert list(before["deepspeed"]) == ["sha256"]
    (tmp_path / "zero").write_text('{"zero_optimization": {}}')
    assert named(path, "less")["arguments"] != before
