"""FSDP as a run file asks for it: its second version, on devices, without what was not seen to give right values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex.config.problems import Origin, Problems


def check_fsdp(values: Mapping[str, Any], origin: Origin, problems: Problems) -> None:
    """Refuse what of FSDP cannot be had here; what accelerate's own configuration asks for is seen when a run begins.

    Args:
        values: LLaMA-Factory's keys.
        origin: where they were written.
        problems: takes what is wrong.
    """
    asked = values.get("fsdp")
    if not asked:
        return
    config = fsdp_config(values)
    if config.get("version", 1) not in (2, "2"):
        found = config.get("version", 1)
        text = f"found {asked!r} and version {found} of FSDP; expected fsdp_config: {{fsdp_version: 2}}"
        why = "The first version's flat parameters have no gradients of single rows; use the second, DDP or DeepSpeed"
        problems.say(origin, "fsdp", text, why)
    if "offload" in (asked.split() if isinstance(asked, str) else map(str, asked if isinstance(asked, list) else [])):
        why = "Features of weights that are offloaded were never held against one process; use ZeRO-3 with offloading"
        problems.add(origin, "fsdp", "no offload", asked, why=why)
    if str(config.get("activation_checkpointing", False)).lower() == "true":
        text = "found activation_checkpointing; expected it to be off"
        why = "It renames the weights; LLaMA-Factory checkpoints activations itself (disable_gradient_checkpointing)"
        problems.say(origin, "fsdp_config", text, why)
    if values.get("torch_compile"):
        problems.add(origin, "torch_compile", "false beside fsdp", True, why="It renames the weights under FSDP")
    if values.get("deepspeed"):
        problems.add(origin, "fsdp", "no fsdp beside deepspeed", asked, why="Either shards the model")
    if values.get("use_cpu"):
        why = "accelerate enters FSDP where there are devices; on CPUs it would train by DDP and not say so"
        problems.add(origin, "fsdp", "no such key beside use_cpu: true", asked, why=why)


def fsdp_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `fsdp_config` has or names, by names without `fsdp_`; empty if it cannot be read."""
    given = values.get("fsdp_config") or {}
    if isinstance(given, str):
        try:
            given = json.loads(given if given.startswith("{") else Path(given).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
    return {str(name).removeprefix("fsdp_"): value for name, value in given.items()} if isinstance(given, dict) else {}
