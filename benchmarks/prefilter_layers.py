"""Whether gradients of some layers alone say which rows LESS will choose, and how exact its own choice is.

At a state of a recording of `benchmarks.prefilter` (an update whose checkpoint it still has) the gradient of every row
is computed once more, plainly: one row at a time, by autograd, with nothing projected. LESS's score is then a sum over
layers, so any set of them can be asked for. Printed for each target set: the correlation of their score with that of
the update, and the share of the update's choice among the best rows by their score. The last layers cost a forward
pass and little of the backward pass; others a whole one. `all` is how far the update's own choice, made of projected
gradients, is that of the exact ones.

python -m benchmarks.prefilter_layers FOLDER --update 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.storage import cosines as projected
from dataflex.features.adam import Moments
from dataflex.live.moments import MOMENTS_FILE

KEEPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
SETS = ("all", "last 1", "last 4", "last 8", "last 15", "last 20", "first 1", "first 15", "every 4th")


class Exact:
    """The model at a checkpoint, with its optimizer's moments.

    Args:
        run: the recording's run file.
        checkpoint: its folder.
    """

    def __init__(self, run: dict[str, Any], checkpoint: Path):
        from llamafactory.data import get_template_and_fix_tokenizer
        from llamafactory.hparams import get_train_args
        from llamafactory.model import load_model, load_tokenizer

        kept = ("model_name_or_path", "template", "stage", "finetuning_type", "lora_rank", "lora_target", "cutoff_len")
        self._values = {name: run[name] for name in (*kept, "dataset_dir", "output_dir")}
        self._values |= {"do_train": True, "use_cpu": True, "adapter_name_or_path": str(checkpoint)}
        model_args, data_args, _, tuning_args, _ = get_train_args({**self._values, "dataset": run["dataset"]})
        self._tokenizer = load_tokenizer(model_args)
        self._template = get_template_and_fix_tokenizer(self._tokenizer["tokenizer"], data_args)
        self.model = load_model(self._tokenizer["tokenizer"], model_args, tuning_args, is_trainable=True).float().eval()
        self.adapter = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._moments = Moments.load(checkpoint / MOMENTS_FILE)
        blocks = np.array([int(name.split(".layers.")[1].split(".")[0]) for name, _ in self.adapter])
        assert (np.diff(blocks) >= 0).all(), "layer by layer"
        sizes = np.array([p.numel() for _, p in self.adapter])
        ends = np.cumsum([sizes[blocks == block].sum() for block in range(blocks.max() + 1)])
        self.layers = [slice(int(begin), int(end)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def rows(self, name: str) -> list[dict[str, list[int]]]:
        """Return a dataset's rows as LLaMA-Factory tokenizes them."""
        from llamafactory.data import get_dataset
        from llamafactory.hparams import get_train_args

        model_args, data_args, train_args, _, _ = get_train_args({**self._values, "dataset": name})
        found = get_dataset(self._template, model_args, data_args, train_args, stage="sft", **self._tokenizer)
        return list(found["train_dataset"])

    def gradient(self, row: dict[str, list[int]], is_adam: bool) -> torch.Tensor:
        """Return (P,) a row's gradient, or the step that Adam would take on it alone; of length 1."""
        self.model.zero_grad(set_to_none=True)
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "labels")}
        self.model(**batch).loss.backward()
        found = []
        for name, parameter in self.adapter:
            value = parameter.grad
            assert value is not None
            if is_adam:
                its, step = self._moments.scalars[name], self._moments.scalars[name].step + 1
                first = its.beta1 * self._moments.exp_avg[name] + (1 - its.beta1) * value
                second = its.beta2 * self._moments.exp_avg_sq[name] + (1 - its.beta2) * value**2
                value = first / (1 - its.beta1**step) / ((second / (1 - its.beta2**step)).sqrt() + its.eps)
            found.append(value.flatten())
        whole = torch.cat(found)
        return whole / whole.norm()


def layers_of(name: str, count: int) -> list[int]:
    """Return which layers a name stands for."""
    if name == "all":
        return list(range(count))
    if name == "every 4th":
        return list(range(1, count, 4))
    where, number = name.split()
    return list(range(count))[-int(number) :] if where == "last" else list(range(int(number)))


def cosines(products: np.ndarray, ours: np.ndarray, theirs: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """Return (N,) mean cosines with T targets over some of the layers.

    Args:
        products: (L, N, T) inner products in each layer.
        ours: (L, N) squared lengths.
        theirs: (L, T) squared lengths.
        layers: those that count.
    """
    at = list(layers)
    lengths = np.sqrt(ours[at].sum(0))[:, None] * np.sqrt(theirs[at].sum(0))[None]
    found: np.ndarray = (products[at].sum(0) / np.maximum(lengths, 1e-30)).mean(1)
    return found


def measured(folder: Path, update: int) -> str:
    """Compute the gradients at an update, and return its table."""
    run = yaml.safe_load((folder / "run.yaml").read_text("utf-8"))
    exact = Exact(run, folder / "out" / f"checkpoint-{run['warmup_step'] + update * run['update_step']}")
    with np.load(folder / f"updates/update_{update}.npz", allow_pickle=False) as found:
        kept = {name: found[name] for name in found.files}
    pool = exact.rows(run["dataset"])
    assert [len(row["input_ids"]) for row in pool] == kept["length"].tolist(), "the rows of the recording, in its order"
    names = run["eval_dataset"].split(",")
    targets = torch.stack([exact.gradient(row, is_adam=False) for name in names for row in exact.rows(name)])
    lengths = np.array([targets[:, at].square().sum(1).numpy() for at in exact.layers])
    products, ours, begun = [], [], time.monotonic()
    for number, row in enumerate(pool, 1):
        gradient = exact.gradient(row, is_adam=True)
        products.append([(targets[:, at] @ gradient[at]).numpy() for at in exact.layers])
        ours.append([float(gradient[at].square().sum()) for at in exact.layers])
        if number % 50 == 0:
            print(f"{number} of {len(pool)} rows, {time.monotonic() - begun:.0f} s", flush=True)
    of_pool, of_rows = np.array(products).transpose(1, 0, 2), np.array(ours).T
    count = len(kept["rows"])
    out, begin = [], 0
    for name in names:
        seen = projected(kept["vectors"], kept[f"target {name}"])
        wanted, end = seen.mean(1), begin + seen.shape[1]
        chosen = set(np.argsort(-wanted, kind="stable")[:count])
        out += [f"{name}: {count} of {len(pool)} rows chosen", f"{'layers':10s} {'corr.':>6s} {'same':>6s}"]
        out[-1] += "".join(f"{f'in {keep:.0%}':>8s}" for keep in KEEPS)
        for each in SETS:
            at = layers_of(each, len(exact.layers))
            score = cosines(of_pool[:, :, begin:end], of_rows, lengths[:, begin:end], at)
            order = np.argsort(-score, kind="stable")
            shares = [len(chosen & set(order[:size])) / count for size in (count, *(int(k * len(pool)) for k in KEEPS))]
            out.append(f"{each:10s} {np.corrcoef(score, wanted)[0, 1]:6.2f} {shares[0]:6.2f}")
            out[-1] += "".join(f"{share:8.2f}" for share in shares[1:])
        begin = end
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the recording")
    parser.add_argument("--update", type=int, required=True, help="counted from 0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(measured(args.folder, args.update))


if __name__ == "__main__":
    main()
