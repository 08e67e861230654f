"""Gradients of a pool and its target sets as LESS chooses by them, of a real model or of the quickstart's, in a file.

Adam's steps of the pool and plain gradients of the targets, after a warm-up of ten steps of 8 rows; LoRA of rank 8, an
SJLT to 8,192 numbers, float32.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field

from benchmarks.lora_run import LORA
from dataflex.selectors.base import Context, Selection
from dataflex.selectors.less import Less

WARMUP, DIM = 10, 8192


class Kept(Less):
    """LESS that writes down the vectors that it chooses by."""

    class Params(Less.Params):
        """Parameters."""

        output: str = Field(description="NPZ file that takes them")

    def select(self, model: Any, step_id: int, num_samples: int, *, context: Context, **kwargs: Any) -> Selection:
        """Write the vectors, then choose as LESS does."""
        ours, theirs = (need.spec for need in self.parts.representation.needs())
        views: dict[str, Any] = {"pool": context.features(ours)}
        views |= {f"target {name}": context.features(theirs, name) for name in context.targets}
        np.savez(self.params.output, **{name: view.dense() for name, view in views.items()})
        return super().select(model, step_id, num_samples, context=context, **kwargs)


def gradients(file: Path, data: Path | None, model: Path | None, rows: int, target_rows: int) -> Mapping[str, Any]:
    """Return `pool` (N, D) and `target <name>` (M, D), float32, from the file, which is written if there is none.

    Args:
        file: NPZ.
        data: folder as `benchmarks.selection_quality` takes it; None: the quickstart's pool, built where it is not.
        model: a chat model of the template smollm2; None: the quickstart's.
        rows: N.
        target_rows: M.
    """
    if not file.exists():
        with tempfile.TemporaryDirectory(prefix="dataflex-gradients-") as scratch:
            _compute(file.absolute(), Path(scratch), data, model, rows, target_rows)
    with np.load(file) as found:
        return {name: vectors[np.isfinite(vectors).all(axis=1)] for name, vectors in found.items()}


def _compute(file: Path, folder: Path, data: Path | None, model: Path | None, rows: int, target_rows: int) -> None:
    from benchmarks import selection_quality
    from dataflex.config import load
    from dataflex.pipelines.select import select
    from examples.quickstart import build
    from examples.quickstart.pool import write_datasets

    if data is None or model is None:
        build.build()
        source, place = build.FOLDER / "data", build.FOLDER / "model"
        read = {path.stem: json.loads(path.read_text("utf-8")) for path in source.glob("[pt]*.json")}
        targets = sorted(name for name in read if name.startswith("target"))
        write_datasets(folder / "data", {"pool": read["pool"][:rows], **{name: read[name] for name in targets}})
        template, rate = "qwen3_nothink", 4e-3
    else:
        study = selection_quality.easy(data, model, folder, rows)
        place, targets, template, rate = folder / "model", sorted(study.targets), "smollm2", 2e-4
    values = {
        **LORA,
        "model_name_or_path": str(place.absolute()),
        "template": template,
        "cache_dir": str(folder / "cache"),
        "dataset_dir": str(folder / "data"),
        "dataset": "pool",
        "eval_dataset": ",".join(targets),
        "cutoff_len": 512,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": rate,
        "output_dir": str(folder / "out"),
        "train_type": "dynamic_select",
        "warmup_step": WARMUP,
        "update_step": 1,
        "component_name": "benchmarks.gradients:Kept",
        "dataflex": {
            "store": str(folder / "store"),
            "storage": "float32",
            "token_budget": 2048,
            "target_rows": target_rows,
            "params": {"proj_dim": DIM, "output": str(file)},
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    select(load(path), rows // 20, folder / "chosen.json")
