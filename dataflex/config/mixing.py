"""Checks of the keys of `dynamic_mix` against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dataflex.config import paths
from dataflex.config.component import Asked, Component
from dataflex.config.keys import FlatKeys
from dataflex.config.problems import Origin, Problems
from dataflex.mixers.base import NativeMixer
from dataflex.schedule import Schedule

CONSTANT = 1000
"""Steps whose rows are drawn at a time if proportions never change: a round has to end somewhere."""
_RULES = ("stratified", "uniform")


def watches(mixer: NativeMixer) -> bool:
    """Say whether training has to record losses by domain for a mixer, or to weight them by domain."""
    return mixer.watches or mixer.loss_form is not None


def mixer_asked(flat: FlatKeys, asked: Asked[NativeMixer], notes: list[str]) -> Asked[NativeMixer]:
    """Return the mixer that `component_name`, `static_mix` and `mixture_sample_rule` name together."""
    rule = flat.mixture_sample_rule
    if flat.static_mix:
        if asked.name not in ("", "static"):
            notes.append(f"static_mix: true leaves {asked.name} out; the shares are init_mixture_proportions")
            asked = replace(asked, params=None)
        asked = replace(asked, name="static")
    if rule in _RULES and asked.name in ("", "static"):
        return replace(asked, name=rule)
    return asked


def mixing_schedule(flat: FlatKeys, epochs: float, mixer: NativeMixer | None) -> Schedule:
    """Return the schedule: without `update_step` the mixer's own interval, until the run ends."""
    # `or`, as 0 is a mixer's word for "the proportions never change".
    interval = flat.update_step or (mixer.interval if mixer else 1) or CONSTANT
    times = flat.update_times if flat.update_step else -1
    return Schedule(flat.warmup_step, interval, times, flat.train_step, epochs, spans_run=True)


def dataset_names(llamafactory: Mapping[str, Any]) -> list[str]:
    """Return the training datasets in order, each once, as LLaMA-Factory reads the key."""
    return list(dict.fromkeys(paths.names(llamafactory.get("dataset"))))


def check_mixing(
    flat: FlatKeys,
    llamafactory: Mapping[str, Any],
    mixer: Component[NativeMixer] | None,
    unit: str,
    weighs: bool,
    origin: Origin,
    problems: Problems,
) -> list[str]:
    """Note what keeps a mixture from being what the run file says; return what is allowed but probably not meant."""
    notes = []
    names = dataset_names(llamafactory)  # the domains, as each dataset is one
    shares = flat.init_mixture_proportions
    if shares is not None:
        if names and len(shares) != len(names):
            expected = f"{len(names)} numbers, one for each of {', '.join(names)}"
            problems.add(origin, "init_mixture_proportions", expected, list(shares))
        elif min(shares, default=0) < 0 or not 0 < sum(shares) < math.inf:
            problems.add(origin, "init_mixture_proportions", "numbers of 0 or more, not all 0", list(shares))
        elif mixer is not None and mixer.method.needs_every_domain and min(shares) == 0:
            expected = f"more than 0 for every domain, as {mixer.name} compares all of them"
            problems.add(origin, "init_mixture_proportions", expected, list(shares))
    name = mixer.name if mixer else None
    if flat.mixture_sample_rule in _RULES and name not in (None, flat.mixture_sample_rule):
        why = f"{flat.mixture_sample_rule} would take no notice of the mixer {name}. Set mixture, or leave it out"
        problems.add(origin, "mixture_sample_rule", "mixture", flat.mixture_sample_rule, why=why)
    for text in mixer.method.check(names, unit) if mixer is not None else ():
        problems.say(origin, "dataflex.params", text)
    for key, right in (("mix_strategy", ("concat",)), ("interleave_probs", ())):
        value = llamafactory.get(key)
        if value is not None and value not in right:
            why = "The mixer sets the shares, and LLaMA-Factory would mix once more"
            problems.add(origin, key, right[0] if right else "no such key", value, why=why)
    if flat.mixer_eval_dataset is not None:
        held_out = dataset_names({"dataset": flat.mixer_eval_dataset})
        known = dataset_names({"dataset": llamafactory.get("eval_dataset")})
        if name != "dynamic_moe":
            expected = "component_name: dynamic_moe, which alone reads it"
            problems.add(origin, "mixer_eval_dataset", expected, flat.mixer_eval_dataset)
        elif len(held_out) != len(names) or not set(held_out) <= set(known):
            expected = f"{len(names)} datasets of eval_dataset, one for each of {', '.join(names)} in this order"
            problems.add(origin, "mixer_eval_dataset", expected, flat.mixer_eval_dataset)
    if weighs and llamafactory.get("packing") and llamafactory.get("neat_packing"):
        problems.add(origin, "neat_packing", "false", True, why="Losses of a packed row belong to several examples")
    if flat.update_step and flat.update_times == 0:
        why = "0 would train on the warm-up alone"
        problems.add(origin, "update_times", "1 or more, or -1 for updates until the run ends", 0, why=why)
    counted = flat.update_step * flat.update_times if "update_times" in flat.model_fields_set else 0
    if counted > 0 and flat.train_step > flat.warmup_step + counted:
        notes.append("update_times has no effect beside train_step: updates go on every update_step to the end")
    if llamafactory.get("tokenized_path"):
        why = "Rows that were tokenized before do not tell which dataset they are of"
        problems.add(origin, "tokenized_path", "no such key", llamafactory["tokenized_path"], why=why)
    if flat.update_step and flat.update_times > 0 and "num_train_epochs" in llamafactory and not flat.train_step:
        notes.append("num_train_epochs has no effect: warmup_step + update_step x update_times is the whole run")
    return notes
