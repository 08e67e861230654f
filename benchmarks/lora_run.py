"""What the run files of benchmarks have in common: a LoRA adapter on a CPU, quietly, at a rate that does not change."""

from __future__ import annotations

from typing import Any

LORA: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "lora_rank": 8,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
