"""What mixtures are worth: a model trained from scratch on each, its loss on text of every domain that no run saw.

Every method trains for the same steps on the same number of tokens, in blocks of `--cutoff` within a domain, with Muon;
a seed sets the first weights and the draws. A cell is the held-out loss in nats per token, then the share of blocks
that was drawn and the one that was intended over the run, in percent; behind it the mean over domains and the worst
one, with 95 % confidence intervals over seeds (Student's t), and the mean against `natural` seed by seed. What a method
trains before its own run stands by itself: DoReMi's reference (which is the `natural` run of the seed) and proxy.

natural: shares by size; uniform; doremi: `natural` as reference, proxy, and a run on the proportions that came out;
odm: the authors' variant after a hundredth of the steps; ado: the first twentieth of the steps left out, then a fit
every tenth of them, or every 50 steps, which make the 5 points that a fit takes (the default of 1000 and 1000 is meant
for tens of thousands of steps); random: ten draws.

python -m benchmarks.mixing_quality DATA_DIR MODEL_DIR --steps 240 --seeds 3
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import t as student

from dataflex.errors import ConfigError, DataflexError
from dataflex.mixers.ado import BLOCK, POINTS

METHODS = ("natural", "uniform", "doremi", "odm", "ado", "random")


@dataclass(frozen=True)
class Outcome:
    """What one run of a method came to.

    Attributes:
        losses: domain -> held-out nats per token.
        realised: domain -> share of the blocks that were drawn.
        intended: domain -> mean over the steps of the proportions that the mixer gave.
        seconds: of the run itself.
        before_seconds: of the runs that it needs before.
        before_tokens: that those trained on.
    """

    losses: dict[str, float]
    realised: dict[str, float]
    intended: dict[str, float]
    seconds: float
    before_seconds: float = 0.0
    before_tokens: int = 0


@dataclass
class Study:
    """Domains, a model to begin anew, and how long to train it.

    Attributes:
        folder: where everything is written.
        domains: in the order of their names.
        held_out: domain -> texts.
        steps: of every run.
        batch: blocks of a step.
        cutoff: tokens of a block.
        rate: the highest learning rate.
        seconds: folder of a run -> its seconds; what is here is not trained again.
    """

    folder: Path
    domains: Sequence[str]
    held_out: Mapping[str, Sequence[str]]
    steps: int
    batch: int
    cutoff: int
    rate: float
    seconds: dict[Path, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that a run trains on."""
        return self.steps * self.batch * self.cutoff

    def train(self, name: str, seed: int, component: str, params: Mapping[str, Any], **keys: Any) -> Path:
        """Train with a mixer, once; return the folder of the run."""
        from dataflex.config import load
        from dataflex.pipelines.train import train

        out = self.folder / "out" / f"{name}-{seed}"
        if out not in self.seconds:
            section = {"store": str(self.folder / "store"), "params": dict(params)}
            values = {
                **training(self.folder, self.domains, self.batch, self.cutoff, self.rate),
                "seed": seed,
                "use_muon": True,  # with AdamW so short a run ends near the frequencies of single tokens
                "output_dir": str(out),
                "train_type": "dynamic_mix",
                "train_step": self.steps,
                "component_name": component,
                "dataflex": section,
                **keys,
            }
            path = self.folder / "run.yaml"
            path.write_text(yaml.safe_dump(values), "utf-8")
            begun = _clock()
            train(load(path))
            self.seconds[out] = _clock() - begun
        return out

    def outcome(self, method: str, seed: int) -> Outcome:
        """Train by a method and measure.

        Raises:
            ConfigError: the method is none, or does not act within so few steps.
        """
        natural: tuple[str, int, str, dict[str, Any]] = ("natural", seed, "stratified", {})
        before: list[Path] = []
        if method == "natural":
            out = self.train(*natural)
        elif method == "uniform":
            out = self.train(method, seed, "uniform", {})
        elif method == "doremi":
            reference = self.train(*natural)
            proxy = self.train("proxy", seed, "doremi", {"reference_model_path": str(reference)})
            before = [reference, proxy]
            out = self.train(method, seed, "static", {"proportions": str(proxy / "mixture_proportions.json")})
        elif method == "odm":
            out = self.train(method, seed, "odm", {"warmup_steps": max(1, self.steps // 100)})
        elif method == "ado":
            ignored, interval = self.steps // 20, max(BLOCK * POINTS, self.steps // 10)
            if self.steps <= ignored + interval:
                raise ConfigError(
                    f"ado: found {self.steps} steps; its first fit comes after {ignored + interval}, so it would not "
                    "act. Set --steps higher, or leave it out of --methods"
                )
            out = self.train(method, seed, "ado", {"ignore_steps": ignored, "fit_interval": interval})
        elif method == "random":
            out = self.train(method, seed, "random", {}, update_step=max(1, self.steps // 10), update_times=-1)
        else:
            raise ConfigError(f"method: found {method}; expected one of {', '.join(METHODS)}")
        return Outcome(
            losses=held_out_losses(out, self.held_out, self.cutoff),
            realised=_shares(json.loads((out / "dataflex_summary.json").read_text("utf-8"))["realised_rows"]),
            intended=intended(out / "mixture.jsonl"),
            seconds=self.seconds[out],
            before_seconds=sum(self.seconds[path] for path in before),
            before_tokens=len(before) * self.tokens,
        )


def training(folder: Path, domains: Sequence[str], batch: int, cutoff: int, rate: float) -> dict[str, Any]:
    """Return the keys of a run over a study's folder that do not depend on the method."""
    import torch

    return {
        "model_name_or_path": str(folder / "model"),
        "train_from_scratch": True,
        "template": "qwen3_nothink",
        "cache_dir": str(folder / "cache"),
        "stage": "pt",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(folder / "data"),
        "dataset": ",".join(domains),
        "packing": True,
        "cutoff_len": cutoff,
        "disable_gradient_checkpointing": True,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def prepare(data: Path, model: Path, folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Name the domains to LLaMA-Factory and copy the model in float32; return the domains, and their held-out texts.

    Args:
        data: has pt/train/DOMAIN.jsonl and pt/heldout/DOMAIN.jsonl, rows with `text`.
        model: a model folder with its tokenizer.
        folder: takes what is written.

    Raises:
        ConfigError: there is no domain, or one has no held-out text.
        DataflexError: a held-out text is a training row, too.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = {path.stem: path.resolve() for path in sorted((data / "pt" / "train").glob("*.jsonl"))}
    others = {path.stem: path for path in sorted((data / "pt" / "heldout").glob("*.jsonl"))}
    if not files or set(files) != set(others):
        raise ConfigError(
            f"{data / 'pt'}: found train/ of {', '.join(files) or 'nothing'} and heldout/ of "
            f"{', '.join(others) or 'nothing'}; expected a file DOMAIN.jsonl in both for each domain"
        )
    held_out = {name: _texts(path) for name, path in others.items()}
    trained = {text for path in files.values() for text in _texts(path)}
    for name, texts in held_out.items():
        if shared := sum(text in trained for text in texts):
            raise DataflexError(f"{others[name]}: {shared} texts are training rows; expected texts that no run sees")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    info = {name: {"file_name": str(path), "columns": {"prompt": "text"}} for name, path in files.items()}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "model")
    return list(files), held_out


def held_out_losses(folder: Path, texts: Mapping[str, Sequence[str]], cutoff: int, batch: int = 16) -> dict[str, float]:
    """Return the sum of token losses over the number of tokens, in nats, of each domain.

    Texts stand one behind the other, each with the end-of-text token, as in training; blocks of `cutoff` tokens, the
    last one shorter, each from its second token on. `batch` is how many go through the model at a time.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dataflex.features.cross_entropy import token_losses

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    found = {}
    for name, some in texts.items():
        ids = tokenizer([text + tokenizer.eos_token for text in some], add_special_tokens=False).input_ids
        flat = torch.tensor([number for one in ids for number in one])
        whole = len(flat) // cutoff * cutoff
        parts = [*flat[:whole].view(-1, cutoff).split(batch), flat[None, whole:]]
        total, count = 0.0, 0
        for part in parts:
            if part.shape[1] > 1 and len(part):
                with torch.no_grad():
                    logits = model(input_ids=part.to(device), use_cache=False).logits
                total += float(token_losses(logits[:, :-1], part[:, 1:].to(device)).double().sum())
                count += part[:, 1:].numel()
        found[name] = total / count
    return found


def intended(path: Path) -> dict[str, float]:
    """Return the mean of a run's logged proportions over its steps."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    steps = np.array([line["steps"] for line in lines], dtype=float)
    shares = np.array([list(line["proportions"].values()) for line in lines])
    return dict(zip(lines[0]["proportions"], (steps @ shares / steps.sum()).tolist(), strict=True))


def interval(values: Sequence[float]) -> str:
    """Return the mean and half the width of its 95 % confidence interval, which takes two values."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {half:.3f}"


def line(name: str, found: Sequence[Outcome], natural: Sequence[Outcome] | None) -> str:
    """Return a line of the table from the outcomes of all seeds."""
    cells = []
    for domain in found[0].losses:
        loss = np.mean([f.losses[domain] for f in found])
        drawn, meant = (100 * np.mean([getattr(f, of)[domain] for f in found]) for of in ("realised", "intended"))
        cells.append(f"{loss:.3f} ({drawn:.1f} / {meant:.1f})")
    means = [_mean(f) for f in found]
    worst = max(found[0].losses, key=lambda domain: float(np.mean([f.losses[domain] for f in found])))
    cells += [interval(means), f"{interval([max(f.losses.values()) for f in found])} {worst}"]
    cells.append(interval([a - _mean(b) for a, b in zip(means, natural, strict=True)]) if natural else "")
    cells.append(f"{np.mean([f.seconds for f in found]):.0f}")
    cells.append(f"{np.mean([f.before_seconds for f in found]):.0f}")
    cells.append(f"{found[0].before_tokens / 1e3:.0f} k")
    return f"| {name} | {' | '.join(cells)} |"


def heading(domains: Sequence[str]) -> str:
    """Return the first two lines of the table."""
    columns = ["method", *domains, "mean", "worst domain", "mean - natural", "seconds", "s before", "tokens before"]
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def _mean(outcome: Outcome) -> float:
    return float(np.mean(list(outcome.losses.values())))


def _shares(rows: Mapping[str, float]) -> dict[str, float]:
    return {name: count / sum(rows.values()) for name, count in rows.items()}


def _texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:  # lines end at \n alone: text may hold U+2028
        return [json.loads(line)["text"] for line in file]


def _clock() -> float:
    """CPU-seconds, which other work on the machine leaves alone; wall time where a GPU does the work."""
    import torch

    return time.monotonic() if torch.cuda.is_available() else time.process_time()


def kept(path: Path | None, key: Mapping[str, Any], measure: Callable[[], Outcome]) -> Outcome:
    """Return what the file of outcomes has under a key, or measure it and append it."""
    for text in path.read_text("utf-8").splitlines() if path is not None and path.is_file() else ():
        record = json.loads(text)
        if record["key"] == key:
            return Outcome(**record["outcome"])
    outcome = measure()
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "outcome": dataclasses.asdict(outcome)}) + "\n")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with pt/train/DOMAIN.jsonl and pt/heldout/DOMAIN.jsonl")
    parser.add_argument("model", type=Path, help="model folder; its weights are not used, its tokenizer is")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="blocks of a step")
    parser.add_argument("--cutoff", type=int, default=256, help="tokens of a block")
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--records", type=Path, help="file of outcomes: those in it are not measured again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dataflex-mixing-") as scratch:
        domains, held_out = prepare(args.data, args.model, Path(scratch))
        study = Study(Path(scratch), domains, held_out, args.steps, args.batch, args.cutoff, args.rate)
        print(f"{args.seeds} seeds of {args.steps} steps, {study.tokens} tokens each")
        print(heading(domains), flush=True)
        natural: list[Outcome] | None = None
        for method in (name for name in METHODS if name in args.methods):
            found = []
            for seed in range(42, 42 + args.seeds):
                key = {"method": method, "seed": seed, "domains": domains}
                key |= {name: getattr(args, name) for name in ("steps", "batch", "cutoff", "rate")}
                with contextlib.redirect_stdout(sys.stderr):  # what LLaMA-Factory prints
                    found.append(kept(args.records, key, functools.partial(study.outcome, method, seed)))
            natural = found if method == "natural" else natural
            print(line(method, found, natural), flush=True)


if __name__ == "__main__":
    main()
