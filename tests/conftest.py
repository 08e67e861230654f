"""What the tests share: a tiny model with a tokenizer and small datasets, made once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see the Makefile
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the cores


@dataclass(frozen=True)
class Tiny:
    """Folders and names to put into a run file with `template: qwen3_nothink`; read-only, the whole session uses them.

    Attributes:
        model: a Qwen2 model of random float32 weights (2 layers, hidden size 64), with its tokenizer.
        dataset_dir: datasets in LLaMA-Factory form.
        pool: name of the instruction pool: 60 good rows of three sources in turn; then a duplicate of row 0, a row
            without output, which LLaMA-Factory drops, and a row whose output is empty.
        targets: names of the target sets, 8 rows each, one for each source.
        text: name of a pre-training dataset of 24 texts of two kinds.
        text_target: name of a pre-training dataset of 4 texts of the first kind.
    """

    model: Path
    dataset_dir: Path
    pool: str = "pool"
    targets: tuple[str, ...] = ("target_arithmetic", "target_words", "target_records")
    text: str = "text"
    text_target: str = "text_target"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the cache of what is read from object stores out of the user's own."""
    os.environ["DATAFLEX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Make the tiny model and its datasets."""
    import gc

    import llamafactory.train.tuner  # noqa: F401  every trainer's end collects garbage, and would go through it all

    gc.freeze()
    from examples.quickstart import model, pool

    made = Tiny(tmp_path_factory.mktemp("tiny") / "model", tmp_path_factory.mktemp("tiny") / "data")
    splits = [
        pool.split(name.removeprefix("target_"), 0, pool=20, target=8, test=0, pretrain=0) for name in made.targets
    ]
    rows: list[dict[str, Any]] = [
        dict(row) for several in zip(*(s.pool for s in splits), strict=True) for row in several
    ]
    rows += [
        {**rows[0], "id": "duplicate"},
        {**rows[1], "id": "no output", "output": None},
        {**rows[2], "id": "empty output", "output": ""},
    ]
    texts = [{"text": row["output"] * 4} for row in rows[:36] if row["source"] != "records"]
    datasets = {
        made.pool: rows,
        **dict(zip(made.targets, (s.target for s in splits), strict=True)),
        made.text: texts,
        made.text_target: [{"text": row["output"] * 4} for row in splits[0].target[:4]],
    }
    pool.write_datasets(made.dataset_dir, datasets)
    tokenizer = model.train_tokenizer(["".join(pool.turns(row)) for row in rows[:60]], 512)
    model.save(model.new_model(tokenizer, hidden=64, layers=2, seed=0), tokenizer, made.model)
    return made


@dataclass(frozen=True)
class Workspace:
    """A folder in which run files over the tiny model are written and run in this process."""

    folder: Path
    tiny: Tiny

    def write(self, name: str, **keys: Any) -> Path:
        """Write a run file; `keys` replace the defaults, None leaves a key out."""
        from omegaconf import OmegaConf

        values: dict[str, Any] = {
            "model_name_or_path": str(self.tiny.model),
            "template": "qwen3_nothink",
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": 4,
            "lora_dropout": 0.1,
            "dataset_dir": str(self.tiny.dataset_dir),
            "dataset": self.tiny.pool,
            "eval_dataset": self.tiny.targets[0],
            "cutoff_len": 128,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "output_dir": str(self.folder / "out" / name),
            "train_type": "dynamic_select",
            "component_name": "less",
            "warmup_step": 3,
            "update_step": 2,
            "update_times": 2,
            "dataflex": {"store": str(self.folder / "store"), "params": {"proj_dim": 256}, "fragment_rows": 64},
        }
        values |= keys
        path = self.folder / f"{name}.yaml"
        path.write_text(OmegaConf.to_yaml({k: v for k, v in values.items() if v is not None}), "utf-8")
        return path

    def run(self, verb: str, path: Path, *overrides: str) -> dict[str, Any]:
        """Run `featurize` or `train` in this process; return the summary it wrote, or nothing if it wrote none."""
        import importlib
        import json

        from dataflex.config import load

        settings = load(path, overrides)
        getattr(importlib.import_module(f"dataflex.pipelines.{verb}"), verb)(settings)
        name = "dataflex_summary.json" if verb == "train" else f"dataflex_{verb}.json"
        summary = Path(settings.llamafactory["output_dir"]) / name
        return dict(json.loads(summary.read_text("utf-8"))) if summary.is_file() else {}

    def rounds(self, name: str) -> list[list[int]]:
        """Return the rows of every round of a run, in training order."""
        import pyarrow.parquet as pq

        found = sorted((self.folder / "out" / name / "rounds").glob("round-*.parquet"))
        return [pq.read_table(path)["index"].to_pylist() for path in found]

    def weights(self, name: str) -> dict[str, Any]:
        """Return the weights that a run ended with."""
        from safetensors.torch import load_file

        folder = self.folder / "out" / name
        return {k: v for path in folder.glob("*model*.safetensors") for k, v in load_file(path).items()}


@pytest.fixture(scope="session")
def workspace_class() -> type[Workspace]:
    """Return the class, for fixtures that outlive a test."""
    return Workspace


@pytest.fixture
def workspace(tiny: Tiny, tmp_path: Path) -> Workspace:
    """Return an empty workspace."""
    return Workspace(tmp_path, tiny)


@pytest.fixture(scope="session")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The workspace of a finished run, `whole`, with a checkpoint after each of its seven steps."""
    space = Workspace(tmp_path_factory.mktemp("whole"), tiny)
    space.run("train", space.write("whole"))
    return space


@pytest.fixture(scope="session")
def proxies(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace for the run files of `tests.doremi`: their reference is trained, and its losses are featurized."""
    from tests.doremi import prepare

    return prepare(Workspace(tmp_path_factory.mktemp("doremi"), tiny))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What goes through the trainings of a test, as `tests.doremi.Seen` has it."""
    from tests.doremi import watched

    return watched(monkeypatch)


@pytest.fixture(scope="session")
def load_dataset(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function of a folder and a dataset's name, which loads that as a run does."""
    from tests.bad_data import loader

    return loader(tiny.model, tmp_path_factory.mktemp("out"))


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the run files of `tests.run_file` are written to and read in, without a setting from outside."""
    from tests.run_file import lay_out

    for name in ("ALLOW_EXTRA_ARGS", "USE_RAY", "USE_MCA", "USE_KT", "DATAFLEX_HOME", "HF_HOME", "HF_ASSETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "FORCE_TORCHRUN"):
        monkeypatch.delenv(name, raising=False)
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_file(run_folder: Path) -> Path:
    """The run file of `tests.run_file` in its folder, as it is."""
    from tests.run_file import write

    return write()


@pytest.fixture
def namespaces() -> None:
    """What confines the code of a response; where the system has none, the test is skipped and says so."""
    from dataflex.errors import ConfigError
    from dataflex.rewards import sandbox

    try:
        sandbox.namespaces()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is synced: the kernel outlives every process that dies in a test, so that would only take time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows of every micro-batch that was asked for, in order."""
    from tests.workspace import note_drawn

    found: list[list[int]] = []
    note_drawn(monkeypatch, found.append)
    return found


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every micro-batch that was trained on, in order, with the step that it is of."""
    from dataflex.trainers.trainer import DataflexTrainer

    found: list[dict[str, Any]] = []
    step = DataflexTrainer.training_step

    def noted(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        found.append({**inputs, "step": self.state.global_step})
        return step(self, model, inputs, *args)

    monkeypatch.setattr(DataflexTrainer, "training_step", noted)
    return found


@pytest.fixture(scope="session")
def proxy() -> Iterator[Any]:
    """A proxy before an S3 server, for the whole session; `bucket` is what tests ask for."""
    pytest.importorskip("moto", reason="there is no moto to serve S3; `pip install -e '.[dev]'` brings it")
    from benchmarks.object_store import serving

    with serving({}) as found:
        yield found


@pytest.fixture
def bucket(proxy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an empty bucket that clients of this process and of its children find."""
    import uuid

    from s3fs import S3FileSystem

    from benchmarks.object_store import ENVIRONMENT

    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.url}.items():
        monkeypatch.setenv(name, value)
    name = f"tested-{uuid.uuid4().hex}"
    proxy.make_bucket(name)
    proxy.begin()
    S3FileSystem.clear_instance_cache()  # which may have asked another server, or have other settings
    yield name
    S3FileSystem.clear_instance_cache()
