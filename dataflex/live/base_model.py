"""What the base of a model in training is known by: files, code, merged adapters, draws, and how it was loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataflex.config.arguments import values
from dataflex.errors import MismatchError
from dataflex.fingerprint import model_digest, plain, source_digests
from dataflex.folders import model_folder
from dataflex.live.live_trainer import LiveTrainer
from dataflex.source import named_classes

_NO_VALUE = ("_name_or_path", "transformers_version", "use_cache", "auto_map")
"""Of a model's configuration; the code that `auto_map` names is in the digest of the model."""


def base_identity(trainer: LiveTrainer, digest_of: Callable[[Path], str]) -> dict[str, Any]:
    """Name the frozen base: its files, the adapters merged into it, and the options it was loaded with.

    Args:
        trainer: has the arguments and the model.
        digest_of: names a model folder by content.

    Raises:
        MismatchError: code that the model needs is not at hand.
    """
    args, tuning = trainer.model_arguments, trainer.finetuning_args
    hub = {"revision": args.model_revision, "cache_dir": args.cache_dir}
    adapters = list(args.adapter_name_or_path or [])
    if not tuning.create_new_adapter:
        adapters = adapters[:-1]  # the last one goes on being trained: it is among the trainable weights
    drawn = _drawn(trainer)
    folder = model_folder(args.model_name_or_path, **hub)
    config = trainer.model.config.to_dict()
    return {
        "weights": digest_of(folder),
        "code": code_elsewhere(folder, args.cache_dir) if args.trust_remote_code else {},
        "merged": [model_digest(model_folder(path, subfolder=args.adapter_folder, **hub)) for path in adapters],
        "configuration": plain({name: value for name, value in config.items() if name not in _NO_VALUE}),
        "drawn": drawn | ({"seed": trainer.args.seed} if drawn else {}),
        "options": values(("model",), args, tuning, trainer.args),
    }


def _drawn(trainer: LiveTrainer) -> dict[str, Any]:
    """Return the arguments under which frozen weights come from a random draw; none where files alone tell them."""
    found = values(("drawn", "drawn file"), trainer.model_arguments, trainer.finetuning_args)
    quiet = {"pissa_iter"} if not found.get("pissa_init") else set()  # those that act beside another alone
    if not (found.keys() - quiet - {"init_special_tokens"}):
        return {}
    return {name: value for name, value in found.items() if name not in quiet}


def reference_identity(trainer: LiveTrainer) -> list[Any]:
    """Name the models that the training loss compares with; there are some under ASFT alone."""
    args, tuning = trainer.model_arguments, trainer.finetuning_args
    if not tuning.use_asft_loss or tuning.ref_model is None:
        return []  # without a name, ASFT compares with the base
    adapters = [path.strip() for path in (tuning.ref_model_adapters or "").split(",") if path.strip()]
    folders = [model_folder(path, cache_dir=args.cache_dir) for path in (tuning.ref_model, *adapters)]
    return [*map(model_digest, folders), tuning.ref_model_quantization_bit]


def code_elsewhere(folder: Path, cache_dir: str | None) -> dict[str, dict[str, str]]:
    """Digest, by repository, the code that a model's configuration names in other repositories than its own.

    Raises:
        MismatchError: it is not at hand.
    """
    from transformers.utils.hub import cached_file

    config = json.loads((folder / "config.json").read_text("utf-8")) if (folder / "config.json").is_file() else {}
    found: dict[str, dict[str, str]] = {}
    for repository, module in sorted(set(named_classes(config))):
        if not repository:
            continue
        name, where = f"{module}.py", {"cache_dir": cache_dir, "_raise_exceptions_for_missing_entries": False}
        path = Path(repository) / name if Path(repository).is_dir() else cached_file(repository, name, **where)
        if path is None or not Path(path).is_file():
            raise MismatchError(
                f"{folder}/config.json: auto_map names {module}.py of {repository}, which is not at hand; expected its "
                "code, which values depend on. Copy it into the model's folder and name it there"
            )
        found.setdefault(repository, {}).update(source_digests(Path(path).parent, [Path(path)]))
    return found
