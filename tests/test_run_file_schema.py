"""The JSON schema of run files takes what `validate` takes, and refuses what is wrong by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from dataflex.config import load
from dataflex.config.problems import Problems
from dataflex.config.runfile import read
from dataflex.config.schema import field_schema
from dataflex.errors import ConfigError
from tests.command import python, run
from tests.example import EXAMPLES, MODELINE
from tests.run_file import write

FILES = {path.relative_to(EXAMPLES).as_posix(): path for path in sorted(EXAMPLES.rglob("*.yaml"))}


SCHEMA = EXAMPLES / "run.schema.json"


@pytest.fixture(scope="module")
def whole() -> Any:
    """What editors read."""
    schema = json.loads(SCHEMA.read_text("utf-8"))
    Draft7Validator.check_schema(schema)
    return schema


@pytest.fixture(scope="module")
def validator(whole: Any) -> Draft7Validator:
    return Draft7Validator(whole)


def values_of(path: Path) -> dict[str, Any]:
    document = read(path, problems := Problems())
    problems.raise_if_any()
    assert document is not None
    return document.values


def test_the_file_that_editors_read_is_what_is_printed_without_anything_heavy() -> None:
    """In a process of its own: what tests have registered in this one would be in it."""
    shown = "print(*sys.modules, file=sys.stderr)"
    ran = python("-c", f"import sys; from dataflex.cli import main\ntry: main(['schema'])\nfinally: {shown}")
    written = SCHEMA.read_text("utf-8")
    assert ran.stdout == written, "dataflex schema > examples/run.schema.json"
    assert not {"torch", "transformers", "llamafactory"} & set(ran.stderr.split())
    assert json.loads(written)["$schema"] == "http://json-schema.org/draft-07/schema#"
    for word in ("$defs", "prefixItems", "unevaluatedProperties"):  # of later drafts, which editors do not read
        assert f'"{word}"' not in written


@pytest.mark.parametrize("name", FILES)
def test_every_example_is_right_and_names_the_schema(name: str, validator: Draft7Validator) -> None:
    first = FILES[name].read_text("utf-8").splitlines()[0]
    assert first.startswith(MODELINE)
    assert (FILES[name].parent / first.removeprefix(MODELINE)).resolve() == SCHEMA
    assert not [error.message for error in validator.iter_errors(values_of(FILES[name]))]


RIGHT = [
    "",
    "component_name:\nwarmup_step:\ntrain_type: static\ndataflex:",
    "learning_rate: 1\nreport_to: [wandb, tensorboard]\nlora_target: [q_proj, v_proj]\nwarmup_steps: 0.1",
    "resume_from_checkpoint: true",
    "dataflex:\n  params:\n  refresh:\n  storage: int8",
    "dataflex: {params: {proj_dim: 64, checkpoints: [], weights: null, projection: rademacher}}",
    "dataflex: {test_dataset: 'hub', test_reward: {type: number, tolerance: 1}}",
    "dataflex: {test_dataset: [hub], features: [{kind: gradient, projection: {dim: 8}}, {kind: embedding}]}",
    "component_name: nice\ndataflex: {params: {reward: {type: exact_match, weight: 2}}}",
    "component_name: nice\ndataflex: {params: {reward: [{type: exact_match}, {type: regex, pattern: a}]}}",
    "component_name: static\ncomponents_cfg_file: components.yaml\ndataflex: {params: {}}",
    "component_name: composed\ndataflex: {params: {representation: {kind: loss}, rule: {kind: middle}}}",
    "component_name: loss\ndataflex: {params: {quantiles: [0.2, 0.5]}}",
    "train_type: dynamic_mix\ncomponent_name: static\nmixture_sample_rule: uniform\ndataflex: {params: {}}",
    "train_type: dynamic_mix\ncomponent_name: odm\nstatic_mix: true\ndataflex: {params: {alpha: no}}",
    "train_type: dynamic_mix\ncomponent_name: odm\ndataflex: {params: {initial_losses: {pool: 2}, alpha: 0}}",
    "train_type: dynamic_mix\ncomponent_name: odm\ndataflex: {weighter: {name: loss, params: {strategy: uniform}}}",
    "component_name: plugin_under_test\ndataflex: {plugins: [./plugin.py], params: {depth: any}}",
    "component_name: ./own.py:Less\ndataflex: {params: {whatever: 1}}",
    "component_name: less\ndataflex: {plugins: [./takes_the_name.py], params: {whatever: 1}}",
]
"""Changes to the run file of `tests.run_file`."""

PLUGIN = """\
from dataflex import register_selector

class Less:
    def __init__(self, whatever): ...
    def select(self, model, step_id, num_samples, **kwargs): ...
"""


@pytest.mark.usefixtures("run_folder")
@pytest.mark.parametrize("changes", RIGHT)
def test_what_validate_takes_is_right(changes: str, validator: Draft7Validator) -> None:
    Path("own.py").write_text(PLUGIN)
    Path("takes_the_name.py").write_text(PLUGIN.replace("class", '@register_selector("less")\nclass'))
    components = Path("components.yaml")
    components.write_text(components.read_text().replace("name: statik", "name: static"))
    path = write(changes)
    assert load(path)
    assert not [error.message for error in validator.iter_errors(values_of(path))]


WRONG = {
    "learning_rat: 1": "",
    "warmup_step: -1": "warmup_step",
    "train_type: dynamic": "train_type",
    "per_device_train_batch_size: 0": "per_device_train_batch_size",
    "lora_rank: eight": "lora_rank",
    "do_train: 'yes'": "do_train",
    "lr_scheduler_type: cosin": "lr_scheduler_type",
    "seed: true": "seed",
    "storage: int8": "",
    "dataflex: [1]": "dataflex",
    "dataflex: {storage: int2}": "dataflex/storage",
    "dataflex: {proj_dim: 8}": "dataflex",
    "dataflex: {refresh: {policy: never}}": "dataflex/refresh/policy",
    "dataflex: {params: {proj_dim: many}}": "dataflex/params/proj_dim",
    "dataflex: {params: {proj_dm: 8}}": "dataflex/params",
    "dataflex: {features: [{kind: hessian}]}": "dataflex/features/0",
    "component_name: nice\ndataflex: {params: {reward: exact_match}}": "dataflex/params/reward",
    "component_name: loss\ndataflex: {params: {quantiles: [0.2, 0.5, 0.7]}}": "dataflex/params/quantiles",
    "train_type: dynamic_mix\ncomponent_name: odm\ndataflex: {params: {variant: theirs}}": "dataflex/params/variant",
    "train_type: dynamic_mix\ncomponent_name: odm\ndataflex: {weighter: {params: {}}}": "dataflex/weighter",
    "train_type: dynamic_mix\ncomponent_name: odm\ndataflex: {weighter: {name: loss, params: {tau: 1}}}": (
        "dataflex/weighter/params"
    ),
    "train_type: dynamic_weight\ncomponent_name: adapt\ndataflex: {params: {tau: 0}}": "dataflex/params/tau",
}


@pytest.mark.usefixtures("run_folder")
@pytest.mark.parametrize("changes", WRONG)
def test_what_is_wrong_is_refused_where_it_is(changes: str, validator: Draft7Validator) -> None:
    path = write(changes)
    with pytest.raises(ConfigError):
        load(path)
    found = {"/".join(map(str, error.absolute_path)) for error in validator.iter_errors(values_of(path))}
    assert found == {WRONG[changes]}


def test_parts_stand_for_themselves(whole: Any) -> None:
    for field, right, wrong in (
        ("dataflex.refresh", {"policy": "rotating"}, {"policy": "never"}),
        ("dataflex.refresh.max_age", None, 0),
        ("learning_rate", 1e-4, "fast"),
        ("selector.composed", {"rule": {"kind": "top_k"}}, {"rule": {"kind": "best"}}),
        ("selector.less.proj_dim", 64, 0),
        ("selector.tsds.representation.kind", "gradient", "hessian"),
    ):
        schema = field_schema(field, whole)
        Draft7Validator.check_schema(schema)
        assert Draft7Validator(schema).is_valid(right), field
        assert not Draft7Validator(schema).is_valid(wrong), field
    with pytest.raises(ConfigError, match=r"found 'dataflex.refesh'; expected one of store, .*did you mean 'refresh'"):
        field_schema("dataflex.refesh", whole)
    with pytest.raises(ConfigError, match="expected no key below it"):
        field_schema("learning_rate.x", whole)


def test_a_part_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "schema", "--field", "storage")
    assert code == 2
    assert err.endswith("expected a dotted key of run files, or KIND.METHOD; did you mean 'dataflex.storage'?\n")
    code, out, _ = run(capsys, "schema", "--field", "selector.less")
    assert (code, json.loads(out)["additionalProperties"]) == (0, False)
