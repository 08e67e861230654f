"""Under FSDP2 on two processes features, trainings and checkpoints are those of one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.errors import ConfigError
from dataflex.features.adam import Moments
from dataflex.live.sharding import Sharding
from dataflex.stores.root import StoreRoot
from tests.fsdp import LAUNCHED
from tests.processes import TORCHRUN, dataflex, launch
from tests.test_processes import values
from tests.workspace import cut_back, in_force, logged, mix, weigh

TWO = {"per_device_train_batch_size": 1}
LESS = {"warmup_step": 2, "max_samples": 24, "lora_dropout": 0.0, "loraplus_lr_ratio": 4.0, "save_steps": 2}
FEATURES = [{"kind": "loss"}, {"kind": "embedding"}, {"kind": "gradient", "projection": {"dim": 64}}]


def kept(space: Any, name: str, **section: Any) -> dict[str, Any]:
    """Return a section `dataflex` with a store of its own."""
    return {"store": str(space.folder / f"store-{name}"), "storage": "float32", **section}


def less(space: Any, name: str, **keys: Any) -> Path:
    return space.write(name, dataflex=kept(space, name, params={"proj_dim": 256}), **{**LESS, **keys})


def of_checkpoint(space: Any, name: str, **keys: Any) -> Path:
    """Write a run file whose features are of the state that the sharded run had behind its warm-up."""
    params = {"proj_dim": 256, "checkpoints": [str(space.folder / "out" / "less-two" / "checkpoint-2")]}
    return space.write(name, dataflex=kept(space, name, params=params, features=FEATURES), **{**LESS, **keys})


def trained_whole(space: Any, name: str, **keys: Any) -> Path:
    """Write a run file whose gradients are of all weights, as they are in the beginning."""
    params = {"proj_dim": 256, "gradient_type": "sgd"}
    none = {"lora_rank": None, "lora_target": None, "lora_dropout": None, "loraplus_lr_ratio": None}
    keys = {**LESS, **none, "finetuning_type": "full", "warmup_step": 0, **keys}
    return space.write(name, dataflex=kept(space, name, params=params), **keys)


def mixed(space: Any, name: str, **keys: Any) -> Path:
    return Path(mix(space, name, component_name="odm", train_step=6, **keys))


def weighted(space: Any, name: str, **keys: Any) -> Path:
    return weigh(space, name, params={"normalisation": "batch"}, **keys)


MAKERS = {"at": of_checkpoint, "whole": trained_whole, "odm": mixed, "weighted": weighted}


@pytest.fixture(scope="module")
def space(tiny: Any, tmp_path_factory: pytest.TempPathFactory, workspace_class: Any) -> Any:
    """What two sharded processes left, and one process after and before them; names end in -two and -one."""
    made = workspace_class(tmp_path_factory.mktemp("fsdp"), tiny)
    made.run("train", less(made, "less-one"))
    shutil.copytree(made.folder / "out" / "less-one", made.folder / "out" / "crossed")
    cut_back(made.folder / "out" / "crossed", 2, rounds=1)
    files = [("train", less(made, "less-two", **TWO)), ("train", less(made, "crossed", **TWO))]
    again = less(made, "again", **TWO)
    files += [("train", again), ("again", again)]
    files += [("featurize", of_checkpoint(made, "half-two", bf16=True, **TWO))]
    verbs = {name: "featurize" if name in ("at", "whole") else "train" for name in MAKERS}
    files += [(verbs[name], make(made, f"{name}-two", **TWO)) for name, make in MAKERS.items()]
    script = str(Path(__file__).parent / "fsdp.py")
    launch([*TORCHRUN, script, *(str(part) for command in files for part in command)], 850, **LAUNCHED)
    made.run("featurize", of_checkpoint(made, "half-one", bf16=True))
    for name, make in MAKERS.items():
        made.run(verbs[name], make(made, f"{name}-one"))
    return made


def weights_apart(space: Any, one: str, other: str) -> float:
    """Return the largest difference between the weights two runs ended with, over the largest weight."""
    first, second = space.weights(one), space.weights(other)
    assert first
    assert first.keys() == second.keys()
    largest = max(float(tensor.abs().max()) for tensor in first.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first) / largest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sharded_selection_trains_on_the_rows_of_one_process(space: Any) -> None:
    """And its state behind the warm-up is kept, under the name that one process gives it."""
    assert [len(rows) for rows in space.rounds("less-two")] == [8, 8, 8]
    assert space.rounds("less-two") == space.rounds("less-one")
    np.testing.assert_allclose(logged(space, "less-two"), logged(space, "less-one"), rtol=1e-5)
    assert weights_apart(space, "less-one", "less-two") < 1e-3  # Adam's first steps amplify what is nearly zero
    states = [
        sorted(path.name for path in space.folder.glob(f"store-{name}/states/*")) for name in ("less-one", "less-two")
    ]
    assert states[0] == states[1]
    assert len(StoreRoot(space.folder / "store-less-two").states.infos()) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_features_are_those_of_one_process(space: Any) -> None:
    """Of the same checkpoint, whose weights are put into the sharded model; each row's own, and under one name."""
    for name, kinds in (("at", 5), ("whole", 1)):
        folders = [
            sorted(store.folder for store in StoreRoot(space.folder / f"store-{name}-{which}").stores())
            for which in ("one", "two")
        ]
        assert folders[0] == folders[1]
        assert len(folders[0]) == kinds
        one, two = (values(space.folder / f"store-{name}-{which}") for which in ("one", "two"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            np.testing.assert_allclose(two[key], value, atol=1e-4 * float(np.abs(value).max()), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_features_in_bfloat16_are_near_and_have_a_name_of_their_own(space: Any) -> None:
    """FSDP2 casts every weight, where autocast leaves some be: what is not bit for bit one thing has two names."""
    roots = [StoreRoot(space.folder / f"store-half-{which}") for which in ("one", "two")]
    numerics = [{json.dumps(store.recipe["numerics"], sort_keys=True) for store in root.stores()} for root in roots]
    assert all("cast by" not in text for text in numerics[0])
    assert all('"cast by": "FSDP2"' in text for text in numerics[1])
    one, two = (values(space.folder / f"store-half-{which}") for which in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        a, b = np.atleast_1d(value).astype(np.float64), np.atleast_1d(two[key]).astype(np.float64)
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a), key  # bfloat16 has 8 bits


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_is_one_process_s_and_is_gone_on_from_by_any_number(space: Any) -> None:
    out = space.folder / "out"
    names = [
        {path.name for path in (out / name / "checkpoint-2").iterdir() if not path.name.startswith("rng_state")}
        for name in ("less-one", "less-two")
    ]
    assert names[0] == names[1]
    one, two = (
        Moments.load(out / name / "checkpoint-2/dataflex/moments.safetensors") for name in ("less-one", "less-two")
    )
    assert one.scalars == two.scalars
    assert {s.rate for s in two.scalars.values()} == {1.0, 4.0}
    for name, moment in one.exp_avg_sq.items():
        torch.testing.assert_close(two.exp_avg_sq[name], moment, rtol=1e-3, atol=1e-12)
    # Two that go on as two, then one that is gone on from by two, and then by one.
    assert space.rounds("again") == space.rounds("less-two")
    assert weights_apart(space, "again", "less-two") == 0
    assert space.rounds("crossed") == space.rounds("less-one")
    assert weights_apart(space, "crossed", "less-one") < 1e-3
    cut_back(out / "crossed", 4)
    space.run("train", less(space, "crossed"))
    assert space.rounds("crossed") == space.rounds("less-one")
    assert weights_apart(space, "crossed", "less-one") < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shares_and_factors_are_those_of_one_process(space: Any) -> None:
    """A mixer, and a weighter that looks at the losses of a whole step first, over all weights of the model."""
    shares = [[list(line["proportions"].values()) for line in in_force(space, name)] for name in ("odm-one", "odm-two")]
    assert np.ptp(shares[0][-1]) > 1e-3  # of three arms, ODM only explores until its fourth update
    np.testing.assert_allclose(shares[1], shares[0], rtol=1e-5)
    for name in ("odm", "weighted"):
        np.testing.assert_allclose(logged(space, f"{name}-two"), logged(space, f"{name}-one"), rtol=1e-5)
        assert weights_apart(space, f"{name}-one", f"{name}-two") < 1e-3
    assert logged(space, "weighted-two", "dataflex/weight_max")[-1] > 1


@pytest.mark.parametrize("by", ["run file", "launcher"])
def test_fsdp_on_cpus_is_refused_and_not_made_ddp(workspace: Any, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain LLaMA-Factory too; a run file says nothing of what accelerate's launcher was told."""
    none = dict.fromkeys(("component_name", "dataflex", "warmup_step", "update_step", "update_times"))
    keys: dict[str, Any] = {"train_type": "static", "max_steps": 1, **none}
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        keys |= {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}
    with pytest.raises(ConfigError, match=r"(fsdp: full_shard auto_wrap|ACCELERATE_USE_FSDP .*): found CPUs alone"):
        workspace.run("train", workspace.write("run", **keys))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fsdp_version": 1}, "fsdp: found FSDP1"),
        ({"activation_checkpointing": True}, "found activation_checkpointing"),
        ({"cpu_offload": True}, "weights that are offloaded"),
    ],
)
def test_what_accelerate_was_told_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **options})
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    args, model = SimpleNamespace(torch_compile=False), SimpleNamespace(config=SimpleNamespace())
    trainer: Any = SimpleNamespace(is_fsdp_enabled=True, accelerator=accelerator, args=args, model=model)
    with pytest.raises(ConfigError, match=said):
        Sharding.of(trainer)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    accelerator.state.fsdp_plugin = plugin
    assert Sharding.of(trainer) == Sharding("fsdp", "bfloat16")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ConfigError, match="found a quantised base under FSDP2"):
        Sharding.of(trainer)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="accelerate enters FSDP on several devices alone")
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
def test_on_gpus_features_and_a_training_are_those_of_one_process(workspace: Any, precision: dict[str, Any]) -> None:
    """As many processes as there are GPUs, launched as accelerate launches them, held against one without FSDP."""
    count = torch.cuda.device_count()
    shape = {"use_cpu": None, "per_device_train_batch_size": 1, **precision}
    two = less(workspace, "less-two", **shape, gradient_accumulation_steps=2)
    many = [*TORCHRUN[:-1], str(count), "-m", "dataflex.cli"]
    launch([*many, "train", str(two)], **LAUNCHED)
    assert len(workspace.rounds("less-two")) == 3
    launch([*many, "featurize", str(of_checkpoint(workspace, "at-two", **shape))], **LAUNCHED)
    dataflex("featurize", of_checkpoint(workspace, "at-one", **shape), CUDA_VISIBLE_DEVICES="0")
    one, sharded = (values(workspace.folder / f"store-at-{which}") for which in ("one", "two"))
    assert one.keys() == sharded.keys()
    for key, value in one.items():
        a, b = np.atleast_1d(value).astype(np.float64), np.atleast_1d(sharded[key]).astype(np.float64)
        assert np.linalg.norm(a - b) < (0.1 if precision else 1e-3) * np.linalg.norm(a), key
    if not precision:
        dataflex(
            "train",
            less(workspace, "less-one", **shape, gradient_accumulation_steps=2 * count),
            CUDA_VISIBLE_DEVICES="0",
        )
        assert workspace.rounds("less-one") == workspace.rounds("less-two")
