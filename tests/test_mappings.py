"""A key whose value is a mapping, or a file with one, is looked into before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import SchedulerType

from dataflex.config import load
from dataflex.config.mappings import _NO_OPTIONS, _of_schedule
from dataflex.errors import ConfigError
from dataflex.llamafactory.learning_rates import check_schedule
from tests.run_file import refusal, write

SCHEDULE = "lr_scheduler_type: {}\nlr_scheduler_kwargs: {}"


@pytest.mark.usefixtures("run_folder")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (SCHEDULE.format("cosine", "{foo: 1}"), "lr_scheduler_kwargs.foo: found an unknown key; expected one of num_c"),
        (SCHEDULE.format("cosine", "{num_cycle: 1}"), "did you mean 'num_cycles'?"),
        (SCHEDULE.format("cosine", "{num_cycles: abc}"), "lr_scheduler_kwargs.num_cycles: found 'abc'; expected a num"),
        (SCHEDULE.format("linear", "{num_cycles: 1}"), "lr_scheduler_kwargs.num_cycles: found an unknown key; expecte"),
        (SCHEDULE.format("cosine", "'{'"), "lr_scheduler_kwargs: found '{'; expected a mapping, or JSON of one"),
        (SCHEDULE.format("cosine", "a=1"), "lr_scheduler_kwargs: found 'a=1'; expected a mapping of keys to values"),
        ("accelerator_config: {foo: 1}", "accelerator_config.foo: found an unknown key; expected one of split_batches"),
        ("accelerator_config: {even_batches: 3}", "accelerator_config.even_batches: found 3; expected true or false"),
        ("accelerator_config: nope.json", "accelerator_config: found 'nope.json'; expected a JSON file that exists"),
        ("fsdp_config: nope.json", "fsdp_config: found 'nope.json'; expected a JSON file that exists"),
        ("deepspeed: nope.json", "deepspeed: found 'nope.json'; expected a JSON file that exists"),
        ("accelerator_config: list.json", "list.json: found [1]; expected a JSON object"),
        ("accelerator_config: odd.json", "accelerator_config.odd: found an unknown key"),
        ("optim_args: foo", "optim_args: found 'foo'; expected name=value, several with commas between"),
        ("optim_args: a=1,", "optim_args: found 'a=1,'; expected name=value, several with commas between"),
        ("neftune_noise_alpha: -1", "neftune_noise_alpha: found -1; expected at least 0"),
        ("label_smoothing_factor: 2", "label_smoothing_factor: found 2; expected at most 1"),
        ("resume_from_checkpoint: false", "found false; expected a checkpoint's folder, true for the newest, or no"),
    ],
)
def test_what_a_trainer_would_not_take(changes, expected):
    Path("list.json").write_text("[1]")
    Path("odd.json").write_text('{"odd": 1}')
    assert expected in refusal(changes)


@pytest.mark.usefixtures("run_folder")
@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (SCHEDULE.format("cosine", "{num_cycles: 2}"), None),
        (SCHEDULE.format("cosine_with_min_lr", "'{\"min_lr\": 0.00001}'"), None),
        (SCHEDULE.format("reduce_lr_on_plateau", "{factor: 0.5}") + "\neval_strategy: steps", None),
        ("accelerator_config: {even_batches: false}", None),
        ("resume_from_checkpoint: true", None),
        ("component_name: random\noptim: rmsprop\noptim_args: momentum=0.5,eps=1e-8", None),
        ("optim_args: foo=1", "optim_args: no effect: optim: adamw_torch reads none"),
        (SCHEDULE.format("constant", "{foo: 1}"), "lr_scheduler_kwargs: no effect: lr_scheduler_type: constant reads"),
    ],
)
def test_what_it_takes_and_what_it_does_not_read(changes, note):
    notes = [text for text in load(write(changes)).notes if "no effect" in text]
    assert bool(notes) == bool(note)
    assert note is None or notes[0].startswith(note)


def test_every_schedule_is_known():
    free = {SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}  # Transformers hands anything on
    for kind in set(SchedulerType) - free:
        assert _of_schedule(kind.value) or kind.value in (*_NO_OPTIONS, "linear")
    assert all(_of_schedule(kind.value) is None for kind in free)
    assert _of_schedule("linear") == {}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("inverse_sqrt", {"timescale": 0}),
        ("cosine", {"num_cycles": "abc"}),
        ("polynomial", {"lr_end": 1.0}),
        ("polynomial", {"power": -1}),
        ("polynomial", {"power": "abc"}),
        ("reduce_lr_on_plateau", {"factor": 2}),
        ("reduce_lr_on_plateau", {"foo": 2}),
        ("warmup_stable_decay", None),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "x"}),
        ("cosine_with_min_lr", {}),
    ],
)
def test_options_that_do_not_work_together(kind, options):
    with pytest.raises(ConfigError, match=f"lr_scheduler_kwargs: found .* which lr_scheduler_type: {kind} does not"):
        check_schedule({"lr_scheduler_type": kind, "lr_scheduler_kwargs": options})


@pytest.mark.parametrize("kind", sorted(each.value for each in SchedulerType))
def test_schedules_that_work(kind):
    options = {"warmup_stable_decay": {"num_decay_steps": 5}, "cosine_with_min_lr": {"min_lr": 0.0}}
    options["cosine_warmup_with_min_lr"] = {"min_lr_rate": 0.1}
    for warmup in ({}, {"warmup_steps": 20}, {"warmup_ratio": 0.1}):
        check_schedule({"lr_scheduler_type": kind, "lr_scheduler_kwargs": options.get(kind), **warmup})


def test_a_run_is_refused_before_anything_is_loaded(workspace):
    keys = {
        "lr_scheduler_type": "inverse_sqrt",
        "lr_scheduler_kwargs": {"timescale": 0},
        "model_name_or_path": "gone/x",
    }
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs: found .* division by zero"):
        workspace.run("train", workspace.write("run", **keys))


@pytest.mark.parametrize("given", ["momentum=abc", "momentum=-1", "eps=-1"])
def test_what_an_optimizer_does_not_take_names_the_key(workspace, given):
    static = dict.fromkeys(("component_name", "warmup_step", "update_step", "update_times", "dataflex", "eval_dataset"))
    path = workspace.write("run", **static, train_type="static", optim="rmsprop", optim_args=given, max_steps=1)
    with pytest.raises(ConfigError, match="optim_args"):
        workspace.run("train", path)
