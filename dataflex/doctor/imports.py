"""Whether packages import, each in a process of its own: one that is broken must not take the others with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dataflex.doctor.finding import TESTED, Finding, Level
from dataflex.doctor.versions import cuda_of, owners, version_of

NEEDED = {  # module -> distribution
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "omegaconf": "omegaconf",
    "safetensors": "safetensors",
    "torch": "torch",
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "datasets": "datasets",
    "llamafactory.train.tuner": "llamafactory",  # imports all that a training does
}
OPTIONAL = {
    "deepspeed": "deepspeed",
    "sentence_transformers": "sentence-transformers",
    "math_verify": "math-verify",
    "bitsandbytes": "bitsandbytes",
}
SECONDS = 600
"""After which an import is taken to hang: seconds on an idle machine, but above 300 s where cores had seven jobs."""

DRIVER = Path("/proc/driver/nvidia/version")
DEVICES = """
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print("; ".join(names))
"""


def optional(also: Collection[str] = ()) -> dict[str, str]:
    """Return the optional modules that are there, and those that this run needs besides; module -> distribution."""
    found = {module: name for module, name in OPTIONAL.items() if module in also or version_of(name)}
    return found | dict(zip(["faiss"], owners("faiss"), strict=False))  # of several, which is an error, the first


def imports(modules: Mapping[str, str], critical: Collection[str]) -> Iterator[Finding]:
    """Yield a finding for each module, in their order; one that does not import is an error if it is critical."""
    # Few at a time: of seven at once on two cores some took 300 s, and a slow one must not be taken for one that hangs.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for (module, distribution), fault in zip(modules.items(), pool.map(_fault, modules), strict=True):
            version = version_of(distribution) or "no version"
            if fault is None:
                yield Finding("ok", distribution, f"{version} imports")
                continue
            level: Level = "error" if module in critical else "warning"
            advice = TESTED if module in NEEDED else f"`pip install --force-reinstall {distribution}`"
            yield Finding(level, distribution, f"{version} does not import: {fault}", advice)


def devices() -> Finding:
    """Say which GPUs torch sees; a driver without one is a fault, no driver is a machine without a GPU."""
    ran = _python(DEVICES)
    names = ran.stdout.strip() if ran else ""
    if names:
        return Finding("ok", "GPU", names)
    if DRIVER.is_file():
        advice = f"`nvidia-smi` names the driver's CUDA; torch is made for {cuda_of('torch')}"
        return Finding("warning", "GPU", "torch sees none, though an NVIDIA driver is loaded", advice)
    return Finding("ok", "GPU", "none: models run on the CPU")


def mismatches() -> Iterator[Finding]:
    """Yield a warning for each of torch's companions that was made for another CUDA than torch."""
    torch = cuda_of("torch")
    for package in ("torchvision", "torchaudio"):
        other = cuda_of(package)
        if torch and other and torch != other:
            found = f"{version_of(package)} is made for {other}, torch {version_of('torch')} for {torch}"
            yield Finding("warning", package, found, TESTED)


def _fault(module: str) -> str | None:
    """Return the last line of what a failing import says; None if it imports."""
    ran = _python(f"import {module}")
    if ran is None:
        return f"no end within {SECONDS} s"
    if ran.returncode == 0:
        return None
    lines = ran.stderr.strip().splitlines()
    return lines[-1].strip() if lines else f"the process ended with {ran.returncode}"


def _python(code: str) -> subprocess.CompletedProcess[str] | None:
    """Run code in a new interpreter that does not look into this folder; None if it does not end."""
    try:
        return subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
