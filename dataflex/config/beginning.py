"""The run file that `dataflex init` writes: to be filled in, with every parameter of a method in sight."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from dataflex.config.description import Described
from dataflex.config.examples import modeline
from dataflex.config.methods import TRAIN_TYPES
from dataflex.errors import ConfigError

_PLAIN = """\
### LLaMA-Factory: its own keys
model_name_or_path: Qwen/Qwen2.5-0.5B # a folder, or a name on the Hub
template: qwen # the model's chat template
stage: sft # or pt, on plain text
do_train: true
finetuning_type: lora # or full, freeze
lora_target: all
lora_rank: 8
dataset_dir: data # where dataset_info.json registers the datasets
{datasets}
cutoff_len: 1024 # tokens of a row, at most
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
learning_rate: 1.0e-4
lr_scheduler_type: cosine
seed: 42
#bf16: true # on GPUs that have it
output_dir: saves/{name}
logging_steps: 10
save_steps: 100
report_to: none
"""
_TARGETS = "eval_dataset: my_target # rows of what to train towards; several names are several target sets"
_SCHEDULES = {
    "selector": """\
warmup_step: {warmup} # steps on random rows before the first update
update_step: 20 # steps from one update to the next
update_times: 4 # updates; the run has warmup_step + update_step x update_times steps
""",
    "mixer": """\
warmup_step: 0 # steps at init_mixture_proportions before the first update
#update_step: 100 # steps from one update to the next; default: the mixer's own
train_step: 10000 # steps in all
#init_mixture_proportions: [0.5, 0.5] # in the order of dataset; default: by size
""",
    "weighter": """\
warmup_step: 100 # steps on the plain loss
train_step: 1000 # steps in all; default: by num_train_epochs
""",
}


def first_file(method: Described) -> str:
    """Return the text of a run file that begins with a method's defaults.

    Raises:
        ConfigError: the method cannot be imported here.
    """
    if method.error:
        raise ConfigError(method.error)
    has_domains = method.kind == "mixer"
    dataset = "dataset: my_first,my_second # one domain each" if has_domains else "dataset: my_pool # several: a,b"
    datasets = [dataset, *([_TARGETS] if method.compares else [])]
    store = [
        "  # root of the stores, a path or URL; default: DATAFLEX_HOME, else this user's cache",
        "  store: stores/",
    ]
    parts = [
        modeline(),
        *textwrap.wrap(
            f"{method.name}: {method.description or 'of your own'}", 100, initial_indent="# ", subsequent_indent="# "
        ),
        "# Written by `dataflex init`: name your model and data, then `dataflex validate` says what is still wrong.",
        "",
        _PLAIN.format(datasets="\n".join(datasets), name=method.name.rpartition(":")[2]),
        f"### DataFlex: `dataflex ls {method.full_name}` tells more; `#key: value` is the default",
        f"train_type: {TRAIN_TYPES[method.kind]}",
        f"component_name: {method.name}",
        _SCHEDULES[method.kind].format(warmup=20 if method.is_live else 0) + "dataflex:",
        *(store if method.features != () else []),
        *_params(method),
    ]
    return "\n".join(parts) + "\n"


def _params(method: Described) -> list[str]:
    """Return the lines of `params`, each parameter below what it means."""
    lines = ["  params:" if method.params else "  params: {} # there are none"]
    for param in method.params:
        if param["description"].startswith("without effect"):
            continue
        lines += textwrap.wrap(param["description"], 110, initial_indent="    # ", subsequent_indent="    # ")
        name = param["name"]
        is_asked = name in method.starter or (param["required"] and name != "cache_dir")  # a run gives that one itself
        value = method.starter.get(name, param["default"])
        lines.append(f"    {'' if is_asked else '#'}{name}: {_inline(value)}")
    return lines


def _inline(value: Any) -> str:
    """Return a value in YAML's short form; JSON is one, but that it quotes every text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(item)}" for key, item in value.items()) + "}"
    is_word = isinstance(value, str) and value.replace("_", "").isalpha() and value not in ("yes", "no", "on", "off")
    return str(value) if is_word else json.dumps(value)
