"""Identity of things by their content: canonical JSON, row keys, model files, tensors, readable differences."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.redaction import HIDDEN, is_secret, without_secrets
from dataflex.source import named_classes, with_relative_imports

IGNORE_INDEX = -100
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_LOADED = (
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("adapter_model.safetensors", "adapter_model.bin"),
)


def canonical(value: Any) -> bytes:
    """Serialise plain data so that equal values have equal bytes: sorted keys, no spaces, no NaN.

    Raises:
        TypeError: the value holds something that JSON does not know.
        ValueError: the value holds NaN or infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """Return 32 hexadecimal digits (128 bits) that name plain data by its canonical JSON."""
    return hashlib.blake2b(canonical(value), digest_size=16, person=b"dataflex-json-v1").hexdigest()


def plain(value: Any) -> Any:
    """Return a value as plain data for `canonical`: what JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        parts = [plain(part) for part in value]
        return sorted(parts, key=str) if isinstance(value, set | frozenset) else parts
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # some configurations have limits without end
    if isinstance(value, Enum):
        return plain(value.value)
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def row_key(
    input_ids: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    attention_mask: Sequence[int] | np.ndarray | None = None,
) -> bytes:
    """Return the 16-byte key of one example as the model is fed it.

    Template, tokenizer, `cutoff_len` and masking act on the tokens and labels, so they are in the key, and
    nothing else is. A mask of ones is the same as no mask.
    """
    h = hashlib.blake2b(digest_size=16, person=b"dataflex-row-v1")
    ids = np.ascontiguousarray(input_ids, dtype="<i8")
    mask = None if attention_mask is None else np.ascontiguousarray(attention_mask, dtype="<i8")
    h.update(len(ids).to_bytes(8, "little"))  # else other tokens and labels could be the same bytes in a row
    h.update(ids.tobytes())
    h.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    if mask is not None and not (mask == 1).all():
        h.update(b"mask")
        h.update(mask.tobytes())
    return h.digest()


def text_key(prompt: str, response: str, system: str = "", tools: str = "") -> bytes:
    """Return the 16-byte key of one example as an external encoder reads it: its text.

    A row with neither system prompt nor tools has the key of its prompt and response alone.
    """
    h = hashlib.blake2b(digest_size=16, person=b"dataflex-text-v1")
    for part in (prompt, response, system, tools) if system or tools else (prompt, response):
        raw = part.encode("utf-8", "surrogatepass")
        h.update(len(raw).to_bytes(8, "little"))
        h.update(raw)
    return h.digest()


def keys_digest(keys: np.ndarray) -> str:
    """Name an ordered list of row keys, with multiplicity."""
    return hashlib.blake2b(np.ascontiguousarray(keys).tobytes(), digest_size=16, person=b"dataflex-keys-v1").hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(folder: str | os.PathLike[str], sums: Mapping[str, str] | None = None) -> str:
    """Name a model folder by its configuration, the weights that are loaded and its code, whatever it is called.

    The code is what the configuration's `auto_map` names in this folder, with what that imports relatively. The
    tokenizer is left out: it acts on the tokens, which are in the row keys.

    Args:
        folder: the folder.
        sums: SHA-256 of weight files that is known already, by their names.

    Raises:
        FileNotFoundError: the folder holds no weight file.
    """
    root = Path(folder)
    weights = _weight_files(root)
    if not weights:
        raise FileNotFoundError(f"no weight file ({', '.join(_WEIGHT_SUFFIXES)}) in {root}")
    configs = [p for p in (root / "config.json", root / "adapter_config.json") if p.is_file()]
    known = {name: sum for p in weights if (sum := (sums or {}).get(name := p.relative_to(root).as_posix()))}
    unknown = [name for p in weights if (name := p.relative_to(root).as_posix()) not in known]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing and reading leave the interpreter's lock
        known |= dict(zip(unknown, pool.map(file_digest, (root / name for name in unknown)), strict=True))
    parts: dict[str, Any] = dict(known)
    written = {p.name: json.loads(p.read_text("utf-8")) for p in configs}
    parts |= {name: plain(_without_paths(config)) for name, config in written.items()}
    own = [root / f"{module}.py" for repository, module in named_classes(written.get("config.json")) if not repository]
    return digest(parts | source_digests(root, own))


def source_digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of Python files and of what they import relatively, by their paths seen from a folder."""
    return {
        os.path.relpath(file, folder).replace(os.sep, "/"): file_digest(file) for file in with_relative_imports(files)
    }


def _weight_files(root: Path) -> list[Path]:
    """Return the files that Transformers and PEFT take the weights of a folder from, the index of shards among them.

    Both look for names in this order. Without one of them whoever loads the folder knows what it reads, so all count.
    """
    found: list[Path] = []
    for names in _LOADED:
        first = next((root / name for name in names if (root / name).is_file()), None)
        if first is not None and first.suffix == ".json":
            shards = json.loads(first.read_text("utf-8"))["weight_map"].values()
            found += [first, *(root / shard for shard in sorted(set(shards)))]
        elif first is not None:
            found.append(first)
    return found or sorted(p for p in root.iterdir() if p.suffix in _WEIGHT_SUFFIXES and _is_weight(p.name))


def _is_weight(name: str) -> bool:
    return not name.startswith(("optimizer", "scheduler", "rng_state", "training_args", "scaler", "moments"))


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in config.items() if k not in ("_name_or_path", "base_model_name_or_path", "transformers_version")
    }


def tensors_digest(tensors: Iterable[tuple[str, Any]]) -> str:
    """Name a set of torch tensors by name, dtype, shape and bytes, independent of their order and device."""

    def one(item: tuple[str, Any]) -> tuple[str, str]:
        name, tensor = item
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        h = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if flat.numel():
            import torch

            h.update(flat.view(torch.uint8).numpy().data)
        return name, h.hexdigest()

    found: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=4) as pool:
        ahead: deque[Future[tuple[str, str]]] = deque()
        for item in tensors:  # perhaps gathered as they are asked for: few are held at a time
            ahead.append(pool.submit(one, item))
            if len(ahead) > 4:
                found.update([ahead.popleft().result()])
        found.update(each.result() for each in ahead)
    return digest(found)


ABSENT = object()
"""Stands for a field that a recipe does not have."""


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List fields in which two recipes differ, by path: (dotted path, ours, theirs), `ABSENT` where there is none."""
    a, b = _flat(ours), _flat(theirs)
    pairs = [(path, a.get(path, ABSENT), b.get(path, ABSENT)) for path in sorted(a.keys() | b.keys())]
    return [(path, one, other) for path, one, other in pairs if one != other]


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """List the fields in which two recipes differ, as `dotted.path: theirs → ours`, sorted by path."""
    return [f"{path}: {_shown(path, other)} → {_shown(path, one)}" for path, one, other in differing(ours, theirs)]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        path = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            out |= _flat(item, f"{path}.")
        else:
            out[path] = item
    return out


def _shown(path: str, value: Any) -> str:
    return HIDDEN if is_secret(path) and value is not ABSENT else without_secrets(_short(value))


def _short(value: Any) -> str:
    if value is ABSENT:
        return "(none)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    hexadecimal = len(text) >= 32 and all(c in "0123456789abcdef" for c in text)
    return text[:8] if hexadecimal else text
