"""A record of what rows are made from: datasets by content, tokenizer, and every data argument that enters a row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafactory.data.parser import get_dataset_list

from dataflex.fingerprint import difference, digest, file_digest

# Whatever is not named here enters: a data argument that LLaMA-Factory adds is compared until it is known to be silent.
_SILENT = (
    "dataset", "eval_dataset", "dataset_dir", "media_dir",  # stand in the record by content
    "tokenized_path", "data_shared_file_system", "overwrite_cache", "streaming", "buffer_size",
    "eval_num_beams", "ignore_pad_token_for_loss",  # act on a row after it is made
)  # fmt: skip
_PACKING = ("preprocessing_batch_size", "preprocessing_num_workers")
"""Where documents are packed, these say which ones stand together; otherwise rows do not depend on them."""
_TOKENIZER_FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "legacy")


def made_from(stage: str, data_args: Any, seed: int, tokenizer: Any) -> dict[str, Any]:
    """Describe what this run's rows are made from, as plain data.

    A dataset whose registration or files are not on this machine is described by its name alone.

    Args:
        stage: `sft` or `pt`.
        data_args: LLaMA-Factory's data arguments.
        seed: of the run; it enters only where rows are drawn.
        tokenizer: as LLaMA-Factory has prepared it.
    """
    train, targets = (list(dict.fromkeys(given or [])) for given in (data_args.dataset, data_args.eval_dataset))
    silent = _SILENT if data_args.packing else _SILENT + _PACKING
    arguments = {f.name: getattr(data_args, f.name) for f in dataclasses.fields(data_args) if f.name not in silent}
    records = {name: _records(name, data_args.dataset_dir) for name in dict.fromkeys(train + targets)}
    is_drawn = (
        data_args.val_size > 0
        or data_args.mix_strategy != "concat"
        or any((about["registration"] or {}).get("num_samples") for about in records.values())
    )
    template = tokenizer.chat_template if data_args.template is None else None  # LLaMA-Factory then reads this one
    made = {
        "stage": stage,
        "dataset": train,
        "eval_dataset": targets,
        "records": records,
        "tokenizer": digest([_tokenizer(tokenizer), template]),
        "seed": seed if is_drawn else None,
        **arguments,
    }
    return dict(json.loads(json.dumps(made, default=str)))  # as it will be read back: tuples are lists


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """List the fields that differ, as `field: theirs → ours`; what one side does not know is not compared."""
    known: list[dict[str, Any]] = [{}, {}]
    for name in ours["records"].keys() & theirs["records"].keys():
        pair = ours["records"][name], theirs["records"][name]
        for field in ("registration", "files"):
            if all(about[field] is not None for about in pair):
                for side, about in zip(known, pair, strict=True):
                    side.setdefault(name, {})[field] = about[field]
    return difference({**ours, "records": known[0]}, {**theirs, "records": known[1]})


def unknown_files(made: Mapping[str, Any]) -> list[str]:
    """Return the datasets whose files are not at hand."""
    return [name for name, about in made["records"].items() if about["files"] is None]


def _records(name: str, dataset_dir: Any) -> dict[str, Any]:
    """Describe a dataset: how it is registered, and its local files by SHA-256; None for what is not at hand."""
    try:
        (attributes,) = get_dataset_list([name], dataset_dir)
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        # Not registered here, or not in a form that LLaMA-Factory reads: where records are loaded, that is said.
        return {"registration": None, "files": None}
    fields = {field: value for field, value in vars(attributes).items() if value is not None}
    if fields["load_from"] in ("file", "script"):  # such a dataset is its content, wherever it lies
        named = fields.pop("dataset_name")
        return {"registration": fields, "files": _digests(Path(str(dataset_dir)) / named)}
    return {"registration": fields, "files": _digests(Path(fields["dataset_name"]))}


def _digests(path: Path) -> dict[str, str] | None:
    if path.is_file():
        return {path.name: file_digest(path)}
    if path.is_dir():
        return {p.relative_to(path).as_posix(): file_digest(p) for p in sorted(path.rglob("*")) if p.is_file()}
    return None


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Describe what a tokenizer does to text, whatever folder it came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline: Any = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # left behind by the last call
            pipeline.pop(state, None)
    else:
        file = getattr(tokenizer, "vocab_file", None)
        pipeline = [tokenizer.get_vocab(), file_digest(file) if file and Path(file).is_file() else None]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    flags = {name: getattr(tokenizer, name, None) for name in _TOKENIZER_FLAGS}
    return {"class": type(tokenizer).__name__, "pipeline": pipeline, "special": special, "flags": flags}
