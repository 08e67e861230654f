"""Run files as the reference implementation documents them load, or the error names what is to be written instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataflex.config import load
from tests.run_file import refusal, write

pytestmark = pytest.mark.usefixtures("run_folder")

COMPONENTS = """\
selectors:
  nice:
    name: nice
    params:
      cache_dir: ../saves/nice_output
      gradient_type: adam
      proj_dim: 4096
      seed: 123
      save_interval: 16
      reward_model_backend: local_vllm
      reward_backend_params:
        local_vllm: {hf_model_name_or_path: owner/model, vllm_tensor_parallel_size: 1, vllm_max_model_len: null}
        api: {api_url: "https://api.openai.com/v1/chat/completions", api_key: DF_API_KEY, model_name: gpt-4o}
      mc_samples: 4
      max_new_tokens: 512
      generation_temperature: 0.7
      max_prompt_length: 4096
  custom: {name: custom, params: {cache_dir: ../saves/custom_output}}
mixers:
  dynamic_moe: {name: dynamic_moe, params: {eta: 10.0, c: 0.05, collect_steps: 5}}
  custom: {name: custom, params: {shares: [0.5, 0.5]}}
weighters:
  custom: {name: custom, params: {strategy: uniform}}
"""
CUSTOM = """\
from dataflex.{kind}s import {base}, register_{kind}


@register_{kind}("custom")
class Custom({base}):
    def __init__(self, {arguments}):
        {made}

    {verb}
"""
KINDS = {
    "selector": (
        "train_type: dynamic_select\nwarmup_step: 10\nupdate_step: 10\nupdate_times: 2",
        CUSTOM.format(
            base="Selector",
            kind="selector",
            arguments="dataset, accelerator, data_collator, cache_dir",
            made="super().__init__(dataset, accelerator, data_collator, cache_dir)",
            verb="def select(self, model, step_id, num_samples, **kwargs): return list(range(num_samples))",
        ),
    ),
    "mixer": (
        "train_type: dynamic_mix\ndataset: pool,target\nmixture_sample_rule: mixture\nupdate_step: 10\nupdate_times: 2",
        CUSTOM.format(
            base="Mixer",
            kind="mixer",
            arguments="mixture_manager, shares",
            made="super().__init__(mixture_manager); self.shares = shares",
            verb="def mix(self, model, step_id, **kwargs): return self.shares",
        ),
    ),
    "weighter": (
        "train_type: dynamic_weight\ntrain_step: 20\nwarmup_step: 10",
        CUSTOM.format(
            base="Weighter",
            kind="weighter",
            arguments="strategy='uniform', **kwargs",
            made="super().__init__(**kwargs)",
            verb="def get_weighted_loss(self, losses, **kwargs): return losses.mean()",
        ),
    ),
}
"""The `custom` component of each kind: the keys that name it, and a class by its documented interface."""

MOE = """\
dataset: pool,target
eval_dataset:
train_type: dynamic_mix
component_name: dynamic_moe
mixture_sample_rule: mixture
static_mix: false
warmup_step: 60
update_step: 100
update_times: -1
train_step: 2000
max_steps: 2000
freeze_gate: true
mixer_eval_dataset: pool,target"""


@pytest.fixture(autouse=True)
def _components(run_folder: Path) -> None:
    (run_folder / "components.yaml").write_text(COMPONENTS)


@pytest.mark.parametrize("kind", KINDS)
def test_custom_components_run_once_their_file_is_named(kind: str) -> None:
    keys, code = KINDS[kind]
    keys = f"components_cfg_file: components.yaml\n{keys}\ncomponent_name: custom"
    said = refusal(keys)
    assert f"component_name: found 'custom'; expected a {kind} (" in said
    assert "A class of your own is named as file.py:Class, or needs its module or file in dataflex.plugins" in said
    Path("my_component.py").write_text(code)
    settings = load(write(f"{keys}\ndataflex: {{plugins: [./my_component.py]}}"))
    assert settings.component is not None
    assert settings.component.__qualname__ == "Custom"
    by_file = keys.partition("\n")[2].replace("custom", "./my_component.py:Custom")
    shares = "\ndataflex: {params: {shares: [0.5, 0.5]}}" if kind == "mixer" else ""
    assert load(write(by_file + shares)).component is not None


def test_nice_says_of_every_key_what_stands_in_its_place() -> None:
    said = refusal("components_cfg_file: components.yaml\ncomponent_name: nice").splitlines()
    assert len(said) == 5
    for line, (key, instead) in zip(
        said[1:4],
        {
            "reward_model_backend": "reward in its place: {type: judge, base_url: ..., model: ...}",
            "reward_backend_params": "reward's own parameters in its place: base_url (api_url",
            "max_prompt_length": "no such key, as cutoff_len bounds prompts",
        }.items(),
        strict=True,
    ):
        number = next(n for n, text in enumerate(COMPONENTS.splitlines(), 1) if f"{key}:" in text)
        at = f"  components.yaml:{number}: selectors.nice.params.{key}: "
        assert line.startswith(f"{at}found a key of the reference implementation; expected {instead}")
        assert "did you mean" not in line
    assert "expected a reward, such as {type: exact_match}" in said[4]
    params = "policy_model_path: model, reward_prompt_with_ref: x, reward_prompt_without_ref: x, prompt_template: x"
    said = refusal(f"component_name: nice\ndataflex: {{params: {{{params}}}}}").splitlines()
    for key in ("policy_model_path", "reward_prompt_with_ref", "reward_prompt_without_ref", "prompt_template"):
        assert any(f"dataflex.params.{key}: found a key of the reference" in line for line in said)


def test_nice_runs_with_what_the_error_names() -> None:
    text = COMPONENTS.replace("      max_prompt_length: 4096\n", "      on_policy: sampled\n")
    begin, _, end = text.partition("      reward_model_backend")
    server = "base_url: 'https://api.openai.com/v1', model: gpt-4o, api_key_env: DF_API_KEY"
    judge = f"      reward: {{type: judge, {server}, temperature: 0.0}}\n"
    Path("components.yaml").write_text(begin + judge + end[end.index("      mc_samples") :])
    settings = load(write("components_cfg_file: components.yaml\ncomponent_name: nice"))
    assert settings.params.reward[0].type == "judge"
    assert settings.params.generation_temperature == 0.7
    assert [note.partition(" ")[0] for note in settings.notes] == ["nice:"]  # save_interval, which has no effect
    Path("components.yaml").write_text(Path("components.yaml").read_text().replace("      on_policy: sampled\n", ""))
    said = refusal("components_cfg_file: components.yaml\ncomponent_name: nice")
    assert "expected on_policy: sampled beside temperature" in said
    assert "Projection(" not in said


def test_dynamic_moe_takes_its_held_out_sets_from_its_own_key_alone() -> None:
    settings = load(write(f"components_cfg_file: components.yaml\n{MOE}"))
    assert settings.llamafactory["eval_dataset"] == "pool,target"
    assert settings.schedule.total() == 2000
    assert settings.params.collect_steps == 5
    assert "did you mean 'dynamic_moe'? A class" in refusal(MOE.replace("dynamic_moe", "dynamic_moe_mixer"))
    given = load(write(f"{MOE.replace('eval_dataset:', 'eval_dataset: target,pool', 1)}"))
    assert given.llamafactory["eval_dataset"] == "target,pool"
    assert "expected 2 datasets of eval_dataset" in refusal(f"{MOE}\nval_size: 0.5")
