"""No pickle lies in a store, and none that lies anywhere is executed: kept states, checkpoints, planted files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from dataflex.checkpoints.pickles import SUFFIXES, frozen, read_pickle, thawed
from dataflex.checkpoints.tree import Tensors, Unplain, from_tree, to_tree
from dataflex.errors import MismatchError
from dataflex.stores.record import seal, unseal
from tests.command import run
from tests.workspace import assert_equal_weights


class Bomb:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return (open, (str(self.sentinel), "w"))


def bombs(sentinel: Path) -> list[bytes]:
    """Return the same bomb in every dress that torch's loader knows."""
    path = sentinel.with_name("bomb")
    made = [pickle.dumps(Bomb(sentinel), protocol) for protocol in (0, 2, 4)]
    for zipped in (True, False):
        torch.save({"state": Bomb(sentinel)}, path, _use_new_zipfile_serialization=zipped)
        made.append(path.read_bytes())
    return made


def same(a: Any, b: Any) -> None:
    """Assert equality of classes and bits, at any depth."""
    if isinstance(a, dict):
        assert isinstance(b, dict)
        assert list(a) == list(b)
        assert [type(key) for key in a] == [type(key) for key in b]
        for key in a:
            same(a[key], b[key])
        return
    assert type(a) is type(b)
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        assert torch.equal(*bits)
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert repr(a) == repr(b)  # NaN too, and -0.0


def optimizer_state() -> dict[str, Any]:
    """Return what AdamW has after two steps, of parameters that are views, transposed, empty, half precision."""
    parts = [torch.randn(4, 6), torch.randn(5), torch.zeros(0, 3), torch.randn(3, 2, dtype=torch.bfloat16)]
    parameters = [torch.nn.Parameter(part) for part in parts]
    groups: list[dict[str, Any]] = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    state = optimizer.state_dict()
    moment = state["state"][0]["exp_avg"]
    state["state"][0] |= {"transposed": moment.T, "part": moment[1:3, ::2], "again": moment, "whole": moment.view(-1)}
    return dict(state)


VALUES: list[Any] = [
    {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state(), "cuda": []},
    {"base_lrs": [3e-3, 0.1 + 0.2], "last_epoch": 3, "best": float("inf"), "nan": float("nan"), "_lambdas": [None]},
    {"scale": 65536.0, "growth_interval": 2000, "-0": -0.0, "deep": ((), [], {}, {1: {"1": (True, None)}}), 2.5: "x"},
    {"large": 1 << 80, "text": "ümlaut \ud800 {}", "scalar": torch.tensor(3.0), "bool": torch.tensor([True, False])},
]


def test_every_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for number, value in enumerate([*VALUES, optimizer_state()]):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save(value, folder / "rng_state.pth")
        (folder / "trainer_state.json").write_text("{}")
        (folder / "training_args.bin").write_bytes(b"not needed")
        expected = read_pickle(folder / "rng_state.pth")
        frozen(folder)
        kept = sorted(path.name for path in folder.iterdir())
        assert kept == ["rng_state.pth.json", "rng_state.pth.safetensors", "trainer_state.json"]
        made = thawed(folder, tmp_path / f"{number}-again")
        same(expected, read_pickle(made / "rng_state.pth"))
        assert sorted(path.name for path in made.iterdir()) == ["rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize(
    "value", [{1, 2}, 1j, object, b"bytes", np.array([None]), np.array(["a"]), {(1,): 2}], ids=repr
)
def test_what_is_no_plain_value_is_not_kept(value: Any) -> None:
    with pytest.raises(Unplain, match="found an object of the class"):
        to_tree({"state": [value]}, Tensors())


TREES: list[Any] = [
    {},
    {"tensor": "1"},
    {"tensor": ["0"]},
    {"tuple": 3},
    {"dict": [[1]]},
    {"dict": [[{"tensor": "0"}, 1]]},
    {"dict": [[[], 1]]},
    {"float": "1"},
    {"object": "os.system"},
    {"tuple": [], "dict": []},
]


@pytest.mark.parametrize("tree", TREES, ids=repr)
def test_a_crafted_tree_is_refused(tree: Any, tmp_path: Path) -> None:
    with pytest.raises(Unplain):
        from_tree([tree], {"0": torch.zeros(1)})
    torch.save({}, tmp_path / "optimizer.pt")
    frozen(tmp_path)
    (tmp_path / "optimizer.pt.json").write_text(json.dumps(tree))
    with pytest.raises(MismatchError, match=r"optimizer\.pt\.json: .*expected what DataFlex keeps"):
        thawed(tmp_path, tmp_path / "made")


@pytest.mark.parametrize("data", [b"", b"x", b"[" * 200_000, b"\xff\xfe"], ids=["empty", "text", "deep", "bytes"])
def test_files_that_are_none_are_refused(data: bytes, tmp_path: Path) -> None:
    for name in ("optimizer.pt.json", "optimizer.pt.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        torch.save({"step": torch.ones(1)}, folder / "optimizer.pt")
        frozen(folder)
        (folder / name).write_bytes(data)
        with pytest.raises(MismatchError, match="expected what DataFlex keeps"):
            thawed(folder, folder / "made")
        (folder / "optimizer.pt").write_bytes(data)
        with pytest.raises(MismatchError, match=r"optimizer\.pt: expected tensors and plain values"):
            read_pickle(folder / "optimizer.pt")


def test_a_bomb_is_refused_in_every_dress_and_by_its_name(tmp_path: Path) -> None:
    for number, data in enumerate(bombs(tmp_path / "exploded")):
        path = tmp_path / str(number) / "optimizer.pt"
        path.parent.mkdir()
        path.write_bytes(data)
        for read in (read_pickle, lambda path: frozen(path.parent)):
            with pytest.raises(MismatchError, match=r"optimizer\.pt: expected tensors and plain values") as caught:
                read(path)
            assert "weights_only" not in str(caught.value)
        with pytest.raises(MismatchError, match=r"found a pickle.*not opened"):
            thawed(path.parent, tmp_path / "made")
    assert not (tmp_path / "exploded").exists()


def refused(path: Path, capsys: pytest.CaptureFixture[str], *said: str) -> None:
    code, _, err = run(capsys, "train", str(path))
    last = err[err.index("dataflex: ") :]
    assert code == 3, err
    assert all(each in last for each in said), last
    assert "Traceback" not in last
    assert "weights_only" not in last
    assert len(last.splitlines()) <= 3


@pytest.fixture
def _plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "FORCE_TORCHRUN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_plain_process")
@pytest.mark.timeout(300)
def test_a_kept_state_holds_no_pickle_and_no_planted_one_is_opened(
    workspace: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dropped beside the kept files, listed in a manifest that is right, and in place of a file that is kept."""
    once = {"update_times": 1, "save_strategy": "no"}
    workspace.run("train", workspace.write("first", **once))
    (manifest,) = (workspace.folder / "store" / "states").glob("*/manifest.json")
    record = unseal(manifest.read_bytes(), "it")
    kept = manifest.parent / record["folder"]
    names = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert {"optimizer.pt.safetensors", "optimizer.pt.json", "scheduler.pt.json", "rng_state.pth.json"} <= names
    assert not [name for name in names if Path(name).suffix in SUFFIXES]
    assert not [name for name in names if (kept / name).read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]
    sentinel = workspace.folder / "exploded"
    bomb = bombs(sentinel)[-2]
    second = workspace.write("second", **once)

    (kept / "optimizer.pt").write_bytes(bomb)
    refused(second, capsys, "optimizer.pt was not kept with this state", "dataflex store repair")
    sums = {**record["files"], "optimizer.pt": hashlib.sha256(bomb).hexdigest()}
    manifest.write_bytes(seal({**record, "files": sums}))
    refused(second, capsys, "optimizer.pt: found a pickle", "It was not opened")
    (kept / "optimizer.pt").unlink()
    manifest.write_bytes(seal(record))

    intact = (kept / "scheduler.pt.json").read_bytes()
    (kept / "scheduler.pt.json").write_bytes(bomb)
    code, _, err = run(capsys, "train", str(second))
    assert code == 4
    assert "scheduler.pt.json is damaged" in err
    (kept / "scheduler.pt.json").write_bytes(intact)
    assert workspace.run("train", second)["started_from"]
    assert_equal_weights(workspace.weights("first"), workspace.weights("second"))
    assert not list((workspace.folder / "out" / "second").glob(".state*"))
    assert not sentinel.exists()


@pytest.mark.usefixtures("_plain_process")
@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_planted_file_of_a_checkpoint_is_not_executed(workspace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In a checkpoint that moments are read from, and in one that training is resumed from, its mark made right."""
    from dataflex.checkpoints.marks import mark_complete

    run = workspace.write("run", component_name="random", dataflex=None, update_times=1)
    workspace.run("train", run)
    sentinel = workspace.folder / "exploded"
    checkpoint = workspace.folder / "out" / "run" / "checkpoint-3"
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256, "checkpoints": [str(checkpoint)]}}
    (checkpoint / "dataflex" / "moments.safetensors").unlink()
    (checkpoint / "optimizer.pt").write_bytes(bombs(sentinel)[-2])
    mark_complete(checkpoint, {"is_resumable": True})
    refused(workspace.write("moments", dataflex=section), capsys, "checkpoint-3/optimizer.pt", "asks for ")
    out = workspace.folder / "out" / "run"
    for step in (3, 5):
        shutil.rmtree(out / f"checkpoint-{step}")
    newest = out / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        intact = (newest / name).read_bytes()
        (newest / name).write_bytes(bombs(sentinel)[-2])
        mark_complete(newest, {"is_resumable": True})
        refused(run, capsys, f"checkpoint-4/{name}", "asks for ")
        (newest / name).write_bytes(intact)
    assert not sentinel.exists()


def test_a_state_on_an_object_store_is_thawed_here(tmp_path: Path) -> None:
    from dataflex.stores.root import StoreRoot

    MemoryFileSystem.store.clear()
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    torch.save(VALUES[0], checkpoint / "rng_state.pth")
    frozen(checkpoint)
    states = StoreRoot("memory://thawed").states
    assert states.put("a", checkpoint, {})
    made = thawed(states.fetch("a", tmp_path / "kept"), tmp_path / "made")
    same(read_pickle(made / "rng_state.pth"), VALUES[0])
    assert os.listdir(made) == ["rng_state.pth"]


def test_an_ordered_mapping_is_a_mapping() -> None:
    tensors = Tensors()
    assert from_tree(to_tree(OrderedDict(a=1), tensors), tensors.named) == {"a": 1}
