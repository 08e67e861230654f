"""What `dataflex validate` says about a run."""

from __future__ import annotations

import os

from dataflex.config.settings import Settings
from dataflex.features.spec import BASE


def summary(settings: Settings) -> list[str]:
    """Return lines for people: steps, batch, method, features and their model state, stores, notes."""
    lines = [f"{settings.path}: valid", f"  train_type  {settings.train_type}"]
    if settings.train_type == "static":
        lines.append("  steps       LLaMA-Factory's own: num_train_epochs or max_steps")
    elif settings.train_type == "dynamic_weight":
        steps = f"{settings.keys.train_step} (train_step)" if settings.keys.train_step else "LLaMA-Factory's own"
        lines.append(f"  steps       {steps}; weighted after the first {settings.keys.warmup_step}")
    else:
        lines.append(f"  steps       {settings.schedule.describe()}")
    lines.append(f"  batch       {_batch(settings)}")
    if settings.component_name is not None:
        lines.append(f"  method      {settings.component_name}")
        lines += [f"              {name}: {value}" for name, value in settings.params.model_dump().items()]
    if settings.dataflex.weighter is not None:
        lines.append(f"  weighter    {settings.dataflex.weighter.name}")
        lines += [f"              {name}: {value}" for name, value in settings.weighter_params.model_dump().items()]
    if (prefilter := settings.dataflex.prefilter) is not None:
        lines.append(f"  prefilter   {prefilter.method}: keep {prefilter.keep:g}, tail {prefilter.tail:g}")
        lines += [f"              {name}: {value}" for name, value in settings.prefilter_params.model_dump().items()]
    lines += [f"  features    {text}" for text in _features(settings)]
    if settings.needs or settings.dataflex.features:
        lines.append(f"  stores      {settings.store_root} ({settings.dataflex.storage})")
    return lines + [f"  note        {note}" for note in settings.notes]


def _batch(settings: Settings) -> str:
    # The defaults are those of transformers.TrainingArguments.
    rows = settings.llamafactory.get("per_device_train_batch_size", 8)
    accumulation = settings.llamafactory.get("gradient_accumulation_steps", 1)
    text = f"{rows} per device x {accumulation} accumulated"
    world = os.environ.get("WORLD_SIZE", "")
    if world.isdecimal():
        return f"{text} x {world} processes = {rows * accumulation * int(world)} rows per optimizer step"
    return f"{text} = {rows * accumulation} rows per optimizer step and process"


def _features(settings: Settings) -> list[str]:
    """Return each feature with its rows and the state of the model it is of, as featurize computes it."""
    warm = settings.schedule.warmup_step
    live = f"after the warm-up of {warm} steps" if warm else "of the initial model"
    found = []
    prefilter = settings.new_prefilter()
    some = len(settings.needs) - len(prefilter.needs()) if prefilter is not None else 0
    for number, need in enumerate(settings.needs):
        rows = "training rows that go on" if number < some else "training rows"
        which = rows if need.of == "train" else "targets"
        state = live if need.state is None else "of the base model" if need.state == BASE else f"at {need.state}"
        found.append(f"{need.spec.describe()} of the {which}, {state}")
    for spec in settings.dataflex.features:
        found.append(f"{spec.describe()} of training rows and targets, as asked for in dataflex.features")
    return found or ["none"]
