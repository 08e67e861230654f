"""A small run file and what stands around it, for tests of what is taken and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataflex.config import load
from dataflex.errors import ConfigError

RUN = """\
model_name_or_path: model
stage: sft
do_train: true
finetuning_type: lora
dataset: pool
eval_dataset: target
template: qwen
output_dir: out
per_device_train_batch_size: 2
learning_rate: 1e-4
train_type: dynamic_select
component_name: less
warmup_step: 10
update_step: 10
update_times: 2
"""


COMPONENTS = """\
selectors:
  less:
    name: less
    params:
      cache_dir: ${output_dir}/less
      proj_dim: 512
      seed: 7
  random:
    params:
      replacment: true
  static:
    name: statik
    params: {path: data/dataset_info.json}
"""


PLUGIN = """\
from dataflex import register_selector

@register_selector("plugin_under_test")
class Plain:
    def __init__(self, dataset, accelerator, data_collator, cache_dir, depth, width=3): ...
    def select(self, model, step_id, num_samples, **kwargs): ...
"""


def lay_out(folder: Path) -> None:
    """Put a model, two datasets, a components file and a plugin into a folder."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "data").mkdir()
    row = json.dumps([{"instruction": "a", "output": "b"}])
    for name in ("pool", "target"):
        (folder / "data" / f"{name}.json").write_text(row)
    info = {"pool": {"file_name": "pool.json"}, "target": {"file_name": "target.json"}, "hub": {"hf_hub_url": "a/b"}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    (folder / "components.yaml").write_text(COMPONENTS)
    (folder / "plugin.py").write_text(PLUGIN)
    (folder / "wrong.py").write_text("def\n")


def write(changes: str = "", without: tuple[str, ...] = ()) -> Path:
    """Write the run file; a top-level key in `changes` takes the place of the one in RUN."""
    replaced = {line.partition(":")[0] for line in changes.splitlines() if not line.startswith((" ", "#"))}
    kept = [line for line in RUN.splitlines() if line.partition(":")[0] not in {*replaced, *without}]
    path = Path("run.yaml")
    path.write_text("\n".join([*kept, changes]))
    return path


def refusal(changes: str = "", overrides: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(changes, without), overrides)
    return str(caught.value)
