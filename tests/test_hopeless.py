"""What no selection can do anything with is refused before anything is computed."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dataflex.config import load
from dataflex.errors import ConfigError, CoverageError, DataflexError
from dataflex.features.spec import LossSpec
from dataflex.pipelines.select import select
from dataflex.pipelines.selecting.beginning import refuse_silent_targets
from dataflex.selectors.base import Need
from tests.held import pool


def test_targets_without_a_label() -> None:
    targets = {"good": pool(3), "empty": pool(2, np.zeros(2, np.int32))}
    looking, blind = ([Need(LossSpec(), of)] for of in ("targets", "train"))
    with pytest.raises(CoverageError, match="target set empty: none of its 2 rows has a supervised token"):
        refuse_silent_targets(SimpleNamespace(targets=targets, declared=looking))  # type: ignore[arg-type]
    refuse_silent_targets(SimpleNamespace(targets=targets, declared=blind))  # type: ignore[arg-type]


def test_more_rows_than_there_are(workspace):
    keys = {"component_name": "random", "dataflex": None, "warmup_step": 0, "update_times": 1, "max_samples": 10}
    with pytest.raises(CoverageError, match=r"an update needs 12 rows \(3 steps of 4\), found 10"):
        workspace.run("train", workspace.write("many", **keys, update_step=3))
    workspace.run("train", workspace.write("few", **keys, update_step=2))


def test_a_parameter_without_a_rule_is_found_before_the_first_step(workspace):
    """DoRA out of an adapter's own configuration, of which the run file says nothing."""
    model = AutoModelForCausalLM.from_pretrained(workspace.tiny.model)
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(workspace.folder / "adapter")
    path = workspace.write("dora", adapter_name_or_path=str(workspace.folder / "adapter"))
    with pytest.raises(DataflexError, match=r"lora_magnitude_vector.*DoRA has no exact per-example rule"):
        workspace.run("train", path)
    assert not list((workspace.folder / "out" / "dora").glob("checkpoint-*"))
    assert not (workspace.folder / "out" / "dora" / "rounds").exists()


def test_whole_modules_beside_lora_are_selected_by(workspace):
    """As `resize_vocab` sets them itself for new tokens."""
    keys = {"additional_target": "embed_tokens,lm_head", "resize_vocab": True, "add_tokens": "<a>,<b>"}
    summary = workspace.run("train", workspace.write("saved", update_times=1, **keys))
    assert [update["computed"] > 0 for update in summary["updates"]] == [True]


def test_select_is_refused_before_the_features_whose_result_it_could_not_write(workspace):
    for output in (workspace.folder, workspace.folder / "run.txt"):
        with pytest.raises(ConfigError, match="--output"):
            select(load(workspace.write("select")), 5, output)
    (workspace.folder / "file").touch()
    with pytest.raises(ConfigError, match=r"expected a file that can be written; .*file is no folder"):
        select(load(workspace.write("select")), 5, workspace.folder / "file" / "chosen.json")
    (tokens := workspace.folder / "tokens").mkdir()
    (tokens / "dataset_dict.json").touch()
    with pytest.raises(ConfigError, match="tokenized_path: the raw records"):
        select(load(workspace.write("select", tokenized_path=str(tokens))), 5, workspace.folder / "chosen.json")


def test_what_llamafactory_lacks_is_told_in_a_line(workspace):
    with pytest.raises(ConfigError, match=r"^transformers refuses the run file: .*swanlab.* \(raised in .*\)$"):
        workspace.run("train", workspace.write("tracked", use_swanlab=True))


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number: int = found.getsockname()[1]
    return number


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("ftp://127.0.0.1:{port}/x", "ftp://127.0.0.1:.*ConnectionRefusedError"),
        ("/proc/x", "cannot write /proc/x/runs/.*No such file"),
        ("local:///proc/x", "cannot write /proc/x/runs/.*No such file"),
    ],
)
def test_a_store_that_cannot_be_used_is_found_before_the_first_step(workspace, store, said):
    path = workspace.write("unstored", dataflex={"store": store.format(port=closed_port())})
    with pytest.raises(DataflexError, match=said):
        workspace.run("train", path)
    assert not (workspace.folder / "out" / "unstored" / "rounds").exists()


MIXER = """
import numpy as np
from dataflex.mixers.base import NativeMixer
from dataflex.components.params import Parameters

class Tuples(NativeMixer):
    class Params(Parameters):
        pass

    def __init__(self, params):
        self.params = params

    def state(self):
        return {"seen": (1, 2)}

    def restore(self, state):
        pass

    def mix(self, context):
        return context.proportions
"""


def test_a_state_that_no_checkpoint_could_keep_is_found_before_the_first_step(workspace):
    (workspace.folder / "own.py").write_text(MIXER)
    keys = {"train_type": "dynamic_mix", "component_name": f"{workspace.folder}/own.py:Tuples", "train_step": 4}
    section = {"store": str(workspace.folder / "store")}
    with pytest.raises(DataflexError, match=r"mixer state\.seen: found tuple"):
        workspace.run("train", workspace.write("tuples", update_times=None, dataflex=section, **keys))
    assert not list((workspace.folder / "out" / "tuples").glob("checkpoint-*"))
