"""Whether a change of the code leaves what is trained as it was: a fixed set of runs, compared bit for bit.

Every trainer kind, every family of selectors, mixers and weighters, a mixer with a weighter, stage pt, and resumptions
in the middle, on a tiny model. Of each run: the rows of every round with scores and ages, the shares, what was logged
(losses, diagnostics), the final weights, and the names of the stores and kept states it left.

python -m benchmarks.unchanged record before.json    # on the code as it was
python -m benchmarks.unchanged record after.json     # on the code as it is
python -m benchmarks.unchanged compare before.json after.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PLUGIN = '''
"""Components written against the documented interface, and a reward."""
import numpy as np
from dataflex.mixers import register_mixer
from dataflex.selectors import register_selector
from dataflex.weighters import register_weighter


@register_selector("documented")
class Documented:
    def __init__(self, dataset, cache_dir, stride=3):
        self.dataset, self.stride = dataset, stride

    def select(self, model, step_id, num_samples, **kwargs):
        return [(step_id + self.stride * i) % (len(self.dataset) - 2) for i in range(num_samples)]


@register_mixer("documented")
class DocumentedMixer:
    def __init__(self, mixture_manager):
        self.names = mixture_manager.names

    def mix(self, model, step_id, batch=None, domain_ids=None, **kwargs):
        seen = np.ones(len(self.names))
        if domain_ids is not None:
            seen += np.bincount(domain_ids, minlength=len(self.names))
        return seen / seen.sum()


@register_weighter("documented")
class DocumentedWeighter:
    def __init__(self, power=0.5):
        self.power = power

    def get_weighted_loss(self, losses, *, ctx, model, inputs):
        weights = losses.detach() ** self.power
        return (weights * losses).sum() / weights.sum()


def digits(prompts, responses, references):
    return [sum(c in given for c in text) / (1 + len(text)) for text, given in zip(responses, references)]
'''

SMALL = {"proj_dim": 256}
TWO = "target_arithmetic,target_words"
SELECT: dict[str, dict[str, Any]] = {
    "less": {"component_name": "less", "params": SMALL},
    "less-two-targets": {"component_name": "less", "eval_dataset": TWO,
                         "params": {**SMALL, "aggregation": "round_robin"}},
    "less-sgd-rotating": {
        "component_name": "less",
        "params": {**SMALL, "gradient_type": "sgd"},
        "refresh": {"policy": "rotating", "refresh_fraction": 0.3},
    },
    "nice": {
        "component_name": "nice",
        "params": {**SMALL, "mc_samples": 2, "max_new_tokens": 4,
                   "reward": {"type": "function", "function": "plugin.py:digits"}},
    },
    "loss": {"component_name": "loss", "params": {"focus": "medium", "focus_weight": 5.0}},
    "delta_loss": {"component_name": "delta_loss"},
    "ifd": {"component_name": "ifd"},
    "embedding": {"component_name": "embedding"},
    "rds_plus": {"component_name": "rds_plus", "eval_dataset": TWO},
    "near": {"component_name": "near"},
    "tsds": {"component_name": "tsds", "params": {"alpha": 0.6, "C": 1.0, "max_K": 20}},
    "cluster_less": {"component_name": "cluster_less", "params": {**SMALL, "cluster_size": 8}},
    "influence_distillation": {"component_name": "influence_distillation", "params": {**SMALL, "landmarks": 16}},
    "composed": {
        "component_name": "composed",
        "params": {"representation": {"kind": "gradient", "gradient_type": "sgd", "proj_dim": 256}, "within": "max",
                   "rule": {"kind": "sample"}},
    },
    "random": {"component_name": "random"},
    "documented-selector": {"component_name": "documented"},
    "less-pt": {"component_name": "less", "stage": "pt", "dataset": "text", "eval_dataset": "text_target",
                "params": SMALL},
}  # fmt: skip
MIX: dict[str, dict[str, Any]] = {
    "static": {"component_name": "static", "params": {"proportions": {"pool": 0.5, "target_words": 0.5}}},
    "temperature": {"component_name": "temperature", "params": {"tau": 2.0}},
    "unimax-tokens": {"component_name": "unimax", "mixture": {"unit": "tokens"}},
    "random-mixer": {"component_name": "random", "update_step": 2, "update_times": 3},
    "odm": {"component_name": "odm"},
    "odm-weighted": {"component_name": "odm", "weighter": {"name": "loss", "params": {"strategy": "linupper"}}},
    "ado": {"component_name": "ado", "params": {"ignore_steps": 1, "fit_interval": 2}},
    "doremi": {"component_name": "doremi", "params": {"reference": "stored", "reference_model_path": "out/static"}},
    "documented-mixer": {"component_name": "documented", "update_step": 2, "update_times": 3},
}
WEIGHT: dict[str, dict[str, Any]] = {
    "loss-weighter": {"component_name": "loss", "params": {"strategy": "linupper", "weight_cap": 2.0}},
    "adapt": {"component_name": "adapt", "params": {"refresh_interval": 3}},
    "feature": {"component_name": "feature", "params": {"feature": {"kind": "loss"}, "state": "base", "excess": True}},
    "documented-weighter": {"component_name": "documented"},
}
RESUMED = {"less": 4, "less-sgd-rotating": 6, "odm-weighted": 4, "loss-weighter": 3}
"""Run -> the step of the checkpoint that it is gone on from once more."""


def make_data(folder: Path) -> None:
    """Make the model, the datasets and the plugin."""
    from examples.quickstart import model, pool

    names = ("arithmetic", "words", "records")
    splits = {name: pool.split(name, 0, pool=20, target=8, test=0, pretrain=0) for name in names}
    rows = [dict(row) for several in zip(*(s.pool for s in splits.values()), strict=True) for row in several]
    rows += [{**rows[0], "id": "duplicate"}, {**rows[2], "id": "empty output", "output": ""}]
    texts = [{"text": row["output"] * 4} for row in rows[:36] if row["source"] != "records"]
    datasets = {f"target_{name}": split.target for name, split in splits.items()}
    text_target = [{"text": row["output"] * 4} for row in splits["arithmetic"].target[:4]]
    pool.write_datasets(folder / "data", {"pool": rows, **datasets, "text": texts, "text_target": text_target})
    tokenizer = model.train_tokenizer(["".join(pool.turns(row)) for row in rows[:60]], 512)
    model.save(model.new_model(tokenizer, hidden=64, layers=2, seed=0), tokenizer, folder / "model")
    (folder / "plugin.py").write_text(PLUGIN, "utf-8")


def run_files() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every run's name and keys, in the order in which they are to be run; paths are relative."""
    base = {
        "model_name_or_path": "model",
        "template": "qwen3_nothink",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "dataset_dir": "data",
        "cutoff_len": 128,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    kinds: list[tuple[dict[str, dict[str, Any]], dict[str, Any]]] = [
        ({"plain": {"train_type": "static", "dataset": "pool", "max_steps": 3}}, {}),
        (SELECT, {"train_type": "dynamic_select", "dataset": "pool", "eval_dataset": "target_arithmetic",
                  "warmup_step": 3, "update_step": 2, "update_times": 2}),
        (MIX, {"train_type": "dynamic_mix", "dataset": "pool,target_words", "warmup_step": 2, "train_step": 6}),
        (WEIGHT, {"train_type": "dynamic_weight", "dataset": "pool", "eval_dataset": "target_arithmetic",
                  "warmup_step": 2, "train_step": 6}),
    ]  # fmt: skip
    for runs, shared in kinds:
        for name, own in runs.items():
            keys = {**base, **shared, **own}
            if "update_times" in own:
                keys.pop("train_step", None)
            section = {k: keys.pop(k) for k in ("params", "refresh", "mixture", "weighter") if k in keys}
            if keys["train_type"] != "static":
                keys["dataflex"] = {"store": "store", "fragment_rows": 16, "plugins": ["plugin.py"], **section}
            yield name, {**keys, "output_dir": f"out/{name}"}


def results(output: Path) -> dict[str, Any]:
    """Return what a run decided, logged and ended with."""
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    found: dict[str, Any] = {}
    for path in sorted((output / "rounds").glob("round-*.parquet")):
        table = pq.read_table(path)
        found[path.stem] = {name: [repr(v) for v in table[name].to_pylist()] for name in table.column_names}
    if (output / "mixture.jsonl").is_file():
        found["mixture"] = [_plain(json.loads(line)) for line in (output / "mixture.jsonl").read_text().splitlines()]
    state = output / "trainer_state.json"
    found["log"] = [_plain(entry) for entry in json.loads(state.read_text("utf-8"))["log_history"]]
    found["weights"] = {
        name: hashlib.sha256(tensor.tobytes()).hexdigest()[:16]
        for path in sorted(output.glob("*model*.safetensors"))
        for name, tensor in sorted(load_file(path).items())
    }
    return found


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the clock decides, and paths."""
    return {k: v for k, v in entry.items() if not k.endswith(("seconds", "runtime", "per_second", "time", "identity"))}


def record(scratch: Path) -> dict[str, Any]:
    """Run everything in `scratch`; return the results by run, and the names of stores and states."""
    from dataflex.config import load
    from dataflex.pipelines.select import select
    from dataflex.pipelines.train import train

    made: dict[str, Any] = {}

    def run(name: str, path: Path, *overrides: str) -> None:
        begun = time.monotonic()
        train(load(path, overrides))
        made[name] = results(Path("out", name))
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)

    make_data(scratch)
    os.chdir(scratch)
    for name, keys in run_files():
        path = Path(f"{name}.yaml")
        path.write_text(yaml.safe_dump(keys), "utf-8")
        run(name, path)
        if name in SELECT and keys["stage"] == "sft":
            select(load(path, [f"output_dir=out/{name}-select"]), 9, Path("chosen.json"))
            made[f"{name}: select"] = [row["id"] for row in json.loads(Path("chosen.json").read_text("utf-8"))]
        if name in RESUMED:
            again = f"{name}-resumed"
            checkpoint = f"out/{name}/checkpoint-{RESUMED[name]}"
            run(again, path, f"output_dir=out/{again}", f"resume_from_checkpoint={checkpoint}")
    made["stores"] = sorted(path.name for path in Path("store").iterdir() if path.name not in ("runs", "states"))
    made["states"] = sorted(path.name for path in Path("store/states").iterdir())
    return made


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Yield each place at which two results differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            inner = f"{where}/{key}"
            if key not in before or key not in after:
                yield f"{inner}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{where}/{i}")
    elif before != after and not (before != before and after != after):
        yield f"{where}: {before!r:.60} → {after!r:.60}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("record").add_argument("file", type=Path)
    compare = verbs.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.verb == "record":
        file = args.file.absolute()
        with tempfile.TemporaryDirectory(prefix="dataflex-unchanged-") as scratch:
            file.write_text(json.dumps(record(Path(scratch)), indent=1) + "\n", "utf-8")
        return
    before, after = (json.loads(path.read_text("utf-8")) for path in (args.before, args.after))
    found = list(differences(before, after))
    print(*found[:40], sep="\n")
    print(f"{len(found)} differences in {len(before)} results" if found else f"all {len(before)} results are the same")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
