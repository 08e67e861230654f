"""What has to hold of a model that was loaded: tokens have embeddings, weights are trained, one arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from dataflex import distributed
from dataflex.errors import ConfigError
from dataflex.llamafactory.sanity import sample

log = logging.getLogger(__name__)

_BATCH = 1000  # rows whose tokens are looked at at once


def check_loaded(
    model: Any, rows: Mapping[str, Any], tokenizer: Any, model_args: Any, finetuning_args: Any, is_trained: bool
) -> None:
    """Refuse a model that cannot be trained as asked, and warn of modules and layers that it does not have.

    Every process comes to the same result, so nothing is exchanged.

    Args:
        model: with its adapters.
        rows: the training and evaluation sets that LLaMA-Factory made.
        tokenizer: as its template left it.
        model_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's.
        is_trained: whether it was loaded to be trained.

    Raises:
        ConfigError: rows have tokens without an embedding; there is no weight to train.
    """
    try:
        _check_tokens(model, rows, tokenizer, model_args.model_name_or_path)
        if is_trained:
            _check_weights(model, model_args.model_name_or_path, finetuning_args)
    except ConfigError as error:
        error.everywhere = True
        raise
    if is_trained and distributed.is_main():
        _say_what_is_missing(model, model_args, finetuning_args)


def keep_one_arithmetic(model: Any) -> None:
    """Have weights of 4 bits multiply on a CPU in evaluation mode as they do in training.

    On processors with AVX512-BF16 bitsandbytes packs them anew at the first forward pass in evaluation mode, and
    computes in bfloat16 from then on: the values of a row would depend on what ran before, and layers whose sides are
    not multiples of its blocks fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_tokens(model: Any, rows: Mapping[str, Any], tokenizer: Any, name: str) -> None:
    """Refuse rows with a token that the embedding table has no row for: torch would end in its lookup.

    A tokenizer may well have more tokens than the model, so only those count that the run makes use of.
    """
    inner = getattr(model, "pretrained_model", model)  # under a value head
    size = getattr(inner.get_input_embeddings(), "num_embeddings", None)
    if size is None:
        return
    used = [(int(tokenizer.pad_token_id), "the padding")] if tokenizer.pad_token_id is not None else []
    for key, part in rows.items():
        parts = part if isinstance(part, dict) else {key: part}
        used += [(token, each) for each, dataset in parts.items() if dataset is not None for token in _ends(dataset)]
    for token, where in used:
        if not 0 <= token < size:
            raise ConfigError(
                f"model_name_or_path: found {size} token embeddings in {name}, and the token "
                f"{_shown(token, tokenizer)} in {where}; expected tokens from 0 to {size - 1}\n"
                "  The template or the tokenizer is another model's: name the template that the model was made with. "
                "Where the token is meant to be new, resize_vocab: true gives it an embedding to train"
            )


def _ends(dataset: Any) -> Iterator[int]:
    """Give the lowest and the highest token of every batch of rows; of a stream, of the first rows."""
    if isinstance(dataset, Dataset):
        columns = [name for name in dataset.column_names if name.endswith("input_ids")]
        for batch in dataset.select_columns(columns).with_format("arrow").iter(_BATCH) if columns else ():
            for name in columns:
                tokens = batch[name]  # in Arrow, where a batch is one array, not a list of tokens for each row
                while pa.types.is_list(tokens.type) or pa.types.is_large_list(tokens.type):
                    tokens = pc.list_flatten(tokens)
                yield from (found for found in pc.min_max(tokens).as_py().values() if found is not None)
        return
    for row in sample(dataset):
        for name in (name for name in row if name.endswith("input_ids")):
            yield from (int(token) for token in row[name])


def _shown(token: int, tokenizer: Any) -> str:
    text = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    return f"{token} ({text!r})" if text is not None else str(token)


def _check_weights(model: Any, name: str, finetuning_args: Any) -> None:
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    kind = finetuning_args.finetuning_type
    keys = {"freeze": ("freeze_trainable_layers", "freeze_trainable_modules"), "full": ("freeze_language_model",)}
    asked = ", ".join(f"{key}: {getattr(finetuning_args, key, None)}" for key in keys.get(kind, ("lora_target",)))
    raise ConfigError(
        f"finetuning_type: found {kind} ({asked}), which leaves no weight of {name} to train; expected at least one"
    )


def _say_what_is_missing(model: Any, model_args: Any, finetuning_args: Any) -> None:
    """Warn of modules and layers that are asked for and that the model does not have: they are left out."""
    kind, name = finetuning_args.finetuning_type, model_args.model_name_or_path
    if kind == "freeze":
        config = model.config.get_text_config()
        layers, asked = getattr(config, "num_hidden_layers", None), finetuning_args.freeze_trainable_layers
        if layers is not None and abs(asked) > layers:
            log.warning("freeze_trainable_layers: found %d, and %d layers in %s; all are trained", asked, layers, name)
    if kind not in ("lora", "oft") or (model_args.adapter_name_or_path and not finetuning_args.create_new_adapter):
        return  # an adapter that is trained on brings its own modules
    modules = [path for path, _ in model.named_modules()]
    for key in ("oft_target" if kind == "oft" else "lora_target", "additional_target"):
        for asked in getattr(finetuning_args, key, None) or ():
            if asked != "all" and not any(path == asked or path.endswith(f".{asked}") for path in modules):
                log.warning("%s: found %s, and no such module in %s; it is left out", key, asked, name)
