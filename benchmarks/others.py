"""Other tools that take per-example gradients, on the same model, adapter and rows, for `benchmarks.featurize`.

Each has a virtual environment of its own, with the torch, Transformers and PEFT of this one. A case is a process; its
CPU time has start, imports and loading in it. So it runs on the rows once and on the same rows several times, and the
difference counts. Storing is in it, as each tool does it. The control, a plain training pass, is taken the same way.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.passes import Bench
from dataflex.errors import DataflexError

SHARED = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Tool:
    """A tool of the package index.

    Attributes:
        name: of its package.
        version: of that.
        extras: of that, with brackets.
    """

    name: str
    version: str
    extras: str = ""

    def python(self, folder: Path) -> Path:
        """Return the interpreter of its environment, which is made if it is not there.

        Raises:
            DataflexError: it cannot be installed.
        """
        home = folder / f"{self.name}-{self.version}"
        python = home / "bin" / "python"
        if not (home / "complete").exists():
            venv.create(home, with_pip=True, clear=True)
            versions = {name: metadata.version(name).split("+")[0] for name in SHARED}
            wanted = [f"{name}=={version}" for name, version in versions.items()]
            wanted.append(f"{self.name}{self.extras}=={self.version}")
            _call([str(python), "-m", "pip", "install", "--quiet", *wanted], f"pip install {' '.join(wanted)}")
            # Of another build than torch they fail to import, and take Transformers with them; nothing here needs them.
            _call(
                [str(python), "-m", "pip", "uninstall", "--quiet", "-y", "torchvision", "torchaudio"], "pip uninstall"
            )
            (home / "complete").touch()
        return python

    def versions(self, folder: Path) -> str:
        """Return the versions that its environment has."""
        code = f"from importlib.metadata import version as v; print(', '.join(f'{{n}} {{v(n)}}' for n in {SHARED}))"
        found = subprocess.run([self.python(folder), "-c", code], capture_output=True, text=True, check=True)
        return f"{self.name} {self.version} ({found.stdout.strip()})"


BERGSON, DATTRI = Tool("bergson", "2.5.1"), Tool("dattri-llm", "0.1.0", "[attribution,transformers]")
_BERGSON = (
    *("-m", "bergson", "build", "{out}", "--model", "{adapter}", "--tokenizer", "{model}"),
    *("--dataset", "{rows}", "--token_batch_size", "{budget}"),
)
_CHILD = (str(Path(__file__).resolve().with_name("others_child.py")), "{adapter}", "{rows}", "{out}", "{budget}")
CASES: dict[str, tuple[Tool, tuple[str, ...]]] = {
    "control: plain LoRA training pass": (DATTRI, (*_CHILD, "plain")),
    "bergson: raw LoRA gradients": (BERGSON, _BERGSON),
    "bergson: 16 x 16 a module": (BERGSON, (*_BERGSON, "--projection_dim", "16")),
    "bergson: its LESS recipe, 8192": (
        BERGSON,
        (*_BERGSON, "--projection_dim", "8192", "--projection_target", "global"),
    ),
    "dattri-llm: raw LoRA gradients": (DATTRI, (*_CHILD, "raw")),
    "dattri-llm: Adam directions, unprojected": (DATTRI, (*_CHILD, "adam")),
    "dattri-llm: its LESS, 8192 in all": (DATTRI, (*_CHILD, "less")),
}


@dataclass(frozen=True)
class Figure:
    """CPU-seconds a row, or why there is none."""

    seconds: float | None
    words: str = ""


def measure(
    bench: Bench, model: Path | None, folder: Path, names: Sequence[str], times: int, repeats: int
) -> dict[str, Figure]:
    """Return what the cases cost a row.

    Args:
        bench: the model with its adapter, and the rows.
        model: folder of the model without adapter, if it has one.
        folder: of the environments.
        names: of cases.
        times: how often the rows stand in the second run of a case.
        repeats: all cases in turn, so often; the fastest of each run counts.
    """
    with tempfile.TemporaryDirectory(prefix="dataflex-others-") as scratch:
        model, adapter = _save(bench, model and model.resolve(), Path(scratch))
        values: dict[str, object] = {"adapter": adapter, "model": model, "budget": bench.engine.token_budget}
        rows = {}
        for number in (1, times):
            rows[number] = Path(scratch) / f"rows-{number}.jsonl"
            rows[number].write_text("".join(json.dumps(row) + "\n" for row in bench.rows * number), "utf-8")
        best: dict[tuple[str, int], float] = {}
        failed: dict[str, str] = {}
        for _ in range(repeats):
            for name in names:
                tool, arguments = CASES[name]
                python = str(tool.python(folder))
                for number in (1, times):
                    if name in failed:
                        continue
                    out = Path(scratch) / "out"
                    given = [part.format(rows=rows[number], out=out, **values) for part in arguments]
                    try:
                        spent = _call([python, *given], name, Path(scratch))
                    except DataflexError as error:
                        failed[name] = str(error)
                        continue
                    best[name, number] = min(spent, best.get((name, number), spent))
                    shutil.rmtree(out, ignore_errors=True)
    per_row = len(bench.rows) * (times - 1)
    return {
        name: Figure(None, failed[name]) if name in failed else Figure((best[name, times] - best[name, 1]) / per_row)
        for name in names
    }


def _save(bench: Bench, model: Path | None, folder: Path) -> tuple[Path, Path]:
    """Write the adapter, and the model where it has no folder; return the model's folder and the adapter's."""
    if model is None:
        model = folder / "model"
        bench.base.save_pretrained(model)
        words = {f"w{number}": number for number in range(bench.base.config.vocab_size)}
        # Rows come as tokens; the tools ask for a tokenizer all the same.
        tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="w0", pad_token="w0", eos_token="w1"
        ).save_pretrained(model)
    adapter = folder / "adapter"
    peft: Any = bench.engine.model
    peft.peft_config["default"].base_model_name_or_path = str(model)
    peft.save_pretrained(adapter)
    return model, adapter


def _call(command: Sequence[str], name: str, folder: Path | None = None) -> float:
    """Run a command; return its CPU-seconds and those of the processes that it waited for.

    Raises:
        DataflexError: it fails; the last lines of its output say why.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | threads
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    if folder is not None:  # or the second run would find the first one's rows prepared
        environment |= {"HF_DATASETS_CACHE": str(folder / "cache")}
        shutil.rmtree(folder / "cache", ignore_errors=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            said = " / ".join(line.strip() for line in log.read().splitlines()[-3:])
            raise DataflexError(f"{name}: found exit code {process.returncode}, expected 0. Its last words: {said}")
    return usage.ru_utime + usage.ru_stime


def lines(found: dict[str, Figure], training: float, folder: Path) -> str:
    """Return the versions and the table, with ratios to a training pass of so many CPU-seconds a row."""
    tools = dict.fromkeys(CASES[name][0] for name in found)
    out = [f"  {tool.versions(folder)}" for tool in tools]
    for name, figure in found.items():
        if figure.seconds is None:
            out.append(f"  {name:46s} did not run. {figure.words}")
        else:
            out.append(f"  {name:46s} {figure.seconds * 1e3:8.2f} {figure.seconds / training:11.2f}")
    return "\n".join(out)
