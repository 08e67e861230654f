"""Packages that a run file's keys need beside what LLaMA-Factory installs; nothing is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from dataflex.config.enumerations import trackers
from dataflex.config.problems import Origin, Problems

_TRACKERS = {
    "azure_ml": ("azureml",),
    "dagshub": ("dagshub", "mlflow"),
    "flyte": ("flytekit",),
    "kubeflow": (),
}
"""Modules of the trackers whose name in `report_to` is not that of their module."""
_NEEDED = {
    "deepspeed": ("deepspeed",),
    "plot_loss": ("matplotlib",),
    "predict_with_generate": ("jieba", "nltk", "rouge_chinese"),
    "use_adam_mini": ("adam_mini",),
    "use_apollo": ("apollo_torch",),
    "use_badam": ("badam",),
    "use_galore": ("galore_torch",),
    "use_swanlab": ("swanlab",),
    "use_unsloth": ("unsloth",),
    "enable_liger_kernel": ("liger_kernel",),
}


def check_trackers(values: Mapping[str, Any], origin: Origin, problems: Problems) -> None:
    """Note every tracker of `report_to` that Transformers does not know, or whose package is not installed."""
    given = values.get("report_to")
    for name in [given] if isinstance(given, str) else given or []:
        known = (*trackers(), "all", "none")
        if not isinstance(name, str) or (name not in known and len(known) > 2):
            problems.add(origin, "report_to", f"one of {', '.join(sorted(known))}", name, known)
        elif name not in ("all", "none") and (missing := _missing(_modules(name))):
            why = f"Install it: pip install {' '.join(missing)}; or set report_to: none"
            problems.add(origin, "report_to", f"a tracker whose package is installed; {_found(missing)}", name, why=why)


def missing_packages(values: Mapping[str, Any]) -> list[str]:
    """Say which keys need a package that is not installed here: LLaMA-Factory refuses them when the run begins."""
    notes = []
    for key, modules in _NEEDED.items():
        if values.get(key) and (missing := _missing(modules)):
            notes.append(f"{key} needs a package that is not installed here: {_found(missing)}")
    bits, method = values.get("quantization_bit"), values.get("quantization_method", "bnb")
    if (
        bits
        and method in ("bnb", "hqq", "eetq")
        and (missing := _missing(("bitsandbytes" if method == "bnb" else method,)))
    ):
        notes.append(f"quantization_bit needs a package that is not installed here: {_found(missing)}")
    if values.get("flash_attn") == "fa2" and (missing := _missing(("flash_attn",))):
        notes.append(f"flash_attn: fa2 is not used here: {_found(missing)}")
    return notes


def _modules(tracker: str) -> tuple[str, ...]:
    if tracker == "tensorboard":  # either of two will do
        return ("tensorboard",) if importlib.util.find_spec("tensorboardX") is None else ()
    return _TRACKERS.get(tracker, (tracker,))


def _missing(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]  # looked up: an import takes seconds


def _found(missing: list[str]) -> str:
    return f"found no {' and no '.join(missing)}"
