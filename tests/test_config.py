"""A right run file is read as it is meant, with overrides and components, and importing nothing heavy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dataflex.config import load
from dataflex.config.llamafactory_keys import known_keys
from dataflex.features.spec import EmbeddingSpec
from dataflex.schedule import Schedule
from dataflex.selectors.less import Less
from tests.run_file import refusal, write

pytestmark = pytest.mark.usefixtures("run_folder")


def test_everything_read():
    loaded = load(write("components_cfg_file: components.yaml\ndataflex:\n  params: {seed: 8}\n  storage: int8"))
    assert loaded.train_type == "dynamic_select"
    assert (loaded.component_name, loaded.component) == ("less", Less)
    assert isinstance(loaded.params, Less.Params)
    assert (loaded.params.proj_dim, loaded.params.seed, loaded.params.cache_dir) == (512, 8, "out/less")
    assert [need.of for need in loaded.needs] == ["train", "targets"]
    assert loaded.schedule == Schedule(10, 10, 2, 0, 1.0)
    assert loaded.schedule.total() == 30
    assert loaded.dataflex.storage == "int8"
    assert loaded.llamafactory["learning_rate"] == 1e-4
    assert not {"train_type", "component_name", "warmup_step", "dataflex"} & loaded.llamafactory.keys()
    assert loaded.store_root == str(Path("out/less").absolute())
    with pytest.raises(ValueError, match="frozen"):
        loaded.train_type = "static"  # type: ignore[misc]


def test_documented_run_file_is_taken_as_it_is():
    """Every key of the documented LESS example, with its values, but for model, data and output."""
    documented = """\
trust_remote_code: true
lora_target: all
lora_rank: 16
lora_alpha: 8
cutoff_len: 4096
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 0
seed: 42
logging_steps: 10
save_steps: 100
plot_loss: true
save_only_model: false
overwrite_output_dir: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 1
learning_rate: 1.0e-4
num_train_epochs: 1.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
components_cfg_file: components.yaml"""
    loaded = load(write(documented))
    assert [note.partition(":")[0] for note in loaded.notes] == ["ddp_timeout"]
    assert loaded.schedule.total() == 30
    assert loaded.llamafactory["warmup_ratio"] == 0.1


def test_overrides_win_and_reach_into_mappings():
    overrides = [
        "dataflex.refresh.policy=rotating",
        "dataflex.refresh.max_age=4",
        "warmup_step=0",
        "learning_rate=1e-5",
    ]
    loaded = load(write("dataflex:\n  refresh: {policy: static}\n  token_budget: 100"), overrides)
    assert (loaded.dataflex.refresh.policy, loaded.dataflex.refresh.max_age) == ("rotating", 4)
    assert loaded.dataflex.token_budget == 100
    assert loaded.schedule.total() == 20
    assert loaded.llamafactory["learning_rate"] == 1e-5


def test_json_run_file():
    loaded = load(write())
    values = loaded.llamafactory | {"train_type": "dynamic_select", "component_name": "random", "update_step": 3}
    Path("run.json").write_text(json.dumps(values))
    assert load("run.json").schedule.total() == 3


def test_static_is_left_to_llamafactory():
    loaded = load(write("train_type: static\nstage: dpo\npacking: true\nmax_steps: 3\nuse_dora: true"))
    assert loaded.component is None
    assert loaded.needs == ()


def test_random_computes_nothing_so_dora_and_quantisation_stay_allowed():
    assert load(write("component_name: random\nuse_dora: true\nquantization_bit: 4\noptim: adafactor")).needs == ()


def test_plain_selector_takes_constructor_arguments():
    changes = "component_name: plugin_under_test\ndataflex:\n  plugins: [./plugin.py]\n  params: {depth: 2}"
    loaded = load(write(changes))
    assert loaded.params.model_dump() == {"depth": 2}
    assert loaded.component is not None
    assert loaded.component.__name__ == "Plain"
    text = refusal(changes.replace("{depth: 2}", "{widht: 2, dataset: x}"))
    assert "dataflex.params.widht: found an unknown parameter; expected one of cache_dir, depth, width" in text
    assert "did you mean 'width'?" in text
    assert "dataflex.params.dataset: found an unknown parameter" in text
    assert "dataflex.params.depth: found nothing; expected a value, which Plain requires" in text


def test_extra_features():
    changes = "train_type: static\ndataflex:\n  features:\n    - {kind: embedding, pooling: last}\n    - {kind: loss}"
    loaded = load(write(changes))
    assert loaded.dataflex.features[0] == EmbeddingSpec(pooling="last")
    assert "packing: found true" in refusal(changes + "\npacking: true")


def test_components_file_is_found_beside_the_run_file(tmp_path, monkeypatch):
    path = write("components_cfg_file: components.yaml").resolve()
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree("data", "elsewhere/data")
    shutil.copytree("model", "elsewhere/model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(path).params.proj_dim == 512


def test_default_components_file_is_read_if_there_is_one():
    assert load(write()).params.proj_dim == 8192
    Path("configs").mkdir()
    shutil.copy("components.yaml", "configs/components.yaml")
    assert load(write()).params.proj_dim == 512


def test_the_value_of_an_override_takes_the_place_of_the_files():
    run = "dataflex:\n  storage: int8\n  params: {proj_dim: 64, seed: 3}"
    for overrides, expected in [
        (["dataflex.params={}"], (8192, 0, "int8")),
        (["dataflex.params={seed: 4}"], (8192, 4, "int8")),
        (["dataflex.params.seed=4"], (64, 4, "int8")),
        (["dataflex.params={}", "dataflex.params.seed=4"], (8192, 4, "int8")),
        (["dataflex={}"], (8192, 0, "float16")),
    ]:
        loaded = load(write(run), overrides)
        assert (loaded.params.proj_dim, loaded.params.seed, loaded.dataflex.storage) == expected


def test_extra_arguments_pass_if_llamafactory_lets_them(monkeypatch):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    loaded = load(write("my_key: 3"))
    assert loaded.llamafactory["my_key"] == 3
    assert "my_key: unknown" in loaded.notes[0]


@pytest.mark.parametrize(
    ("changes", "without", "note"),
    [
        ("warmup_steps: 5\nwarmup_step: 0", (), "warmup_steps: 5 warms up the learning rate"),
        ("warmup_step: 0", (), "at LoRA's initialisation B is zero"),
        ("freeze_gate: true", (), "only dynamic_mix reads freeze_gate"),
        ("", ("train_type",), "train_type is static by default, so component_name, warmup_step"),
        ("run_name: '${oc.env:USER}'", (), "run_name: '${oc.env:USER}' stays as it is"),
        (
            "ddp_timeout: 180000000",
            (),
            "ddp_timeout: 180000000 seconds are 2083 days, for which the other",
        ),
        ("dataflex: {params: {save_interval: 3}}", (), "less: save_interval has no effect: whatever is"),
        ("use_dft_loss: true", (), "gradients are of the plain mean cross-entropy"),
    ],
)
def test_notes(changes, without, note):
    assert any(note in text for text in load(write(changes, without)).notes)


def test_lists_and_null_where_llamafactory_takes_them():
    loaded = load(write("dataset: [pool, target]\nresume_from_checkpoint:\nreport_to: none"))
    assert loaded.llamafactory["dataset"] == ["pool", "target"]


def test_loading_imports_nothing_heavy():
    code = (
        "import sys; from dataflex.config import load; load(sys.argv[1]); "
        "print([m for m in ('torch', 'transformers', 'llamafactory', 'pyarrow', 'datasets') if m in sys.modules])"
    )
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-c", code, write()], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_key_table_is_what_llamafactory_parses():
    # Imports LLaMA-Factory (about 12 s): the one check that the table read from the sources is complete.
    import dataclasses

    from llamafactory.hparams.parser import _TRAIN_ARGS

    assert set(known_keys()) == {f.name for cls in _TRAIN_ARGS for f in dataclasses.fields(cls) if f.init}
