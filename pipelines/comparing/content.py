"""Files and folders that a run reads, as what they hold: digests that are the same wherever they lie."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex.config.arguments import is_path
from dataflex.config.paths import dataset_files
from dataflex.fingerprint import file_digest, model_digest, source_digests
from dataflex.folders import folder_digest
from dataflex.pipelines.comparing.reading import json_object
from dataflex.source import named_classes

_BESIDE_WEIGHTS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.spm",
    "*.tiktoken", "tekken.json", "bpe.codes", "chat_template*", "additional_chat_templates/*", "generation_config.json",
    "*processor_config.json",
)  # fmt: skip
"""Files of a model's folder that Transformers reads its tokenizer, chat templates and generation from."""


def datasets(wanted: Sequence[str], directory: str, is_portable: bool) -> dict[str, Any]:
    """Return the registration of each dataset and the content of its files; nothing more of one that is elsewhere."""
    info = Path(directory) / "dataset_info.json"
    entries = json_object(info) if info.is_file() else {}
    found = dataset_files(wanted, directory)
    if not is_portable:
        return {
            name: [entries.get(name), {file.name: _digest(file) for file in files}] for name, files in found.items()
        }
    return {
        name: [{k: v for k, v in (entries.get(name) or {}).items() if k != "file_name" or not files},
               [_digest(file) for file in files]]
        for name, files in found.items()
    }  # fmt: skip


def arguments(given: Mapping[str, Any], is_portable: bool) -> dict[str, Any]:
    """Return arguments of LLaMA-Factory with the content of the files that they name.

    Portably, a text that can be a word as well is one, though a file of the working folder be called so.
    """
    return {name: by_content(value, is_portable, name) for name, value in given.items()}


def by_content(value: Any, is_portable: bool, argument: str | None = None) -> Any:
    """Return plain data with the content beside each text that is the path of a file; portably, in its place.

    Portably, folders are told by content as well, where the text can be nothing else than a path.

    Args:
        value: plain data.
        is_portable: whether another machine is to come to the same.
        argument: of LLaMA-Factory whose value it is; None of a parameter, where every text may be a path.
    """
    if isinstance(value, Mapping):
        scratch = {"cache_dir"} if is_portable else set()
        return {key: by_content(each, is_portable, argument) for key, each in value.items() if key not in scratch}
    if isinstance(value, list | tuple):
        return [by_content(each, is_portable, argument) for each in value]
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    is_sure = is_path(value, argument)
    if (is_sure or argument is None or not is_portable) and os.path.isfile(path):
        return {"sha256": _digest(path)} if is_portable else [value, _digest(path)]
    if is_portable and is_sure and os.path.isdir(path):
        return {"folder": _folder_digest(path.resolve(), _listed(path))}
    return value


def model(name: str) -> Any:
    """Return the content of a model's folder: weights, configuration, tokenizer. A name on the Hub stays one."""
    folder = Path(name).expanduser()
    return _model_digests(folder.resolve(), _listed(folder)) if folder.is_dir() else name


def folder_files(folder: Path) -> list[list[Any]] | None:
    """Return name, bytes and time of each file of a folder; None where there is no folder."""
    if not folder.is_dir():
        return None
    return [[each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in sorted(folder.iterdir())]


@functools.cache
def _model_digests(folder: Path, listed: tuple[Any, ...]) -> dict[str, str]:
    """Return the digests of a folder, read once as long as no file of it changes."""
    try:
        known = model_digest(folder)
    except FileNotFoundError:  # a tokenized dataset
        return {"folder": folder_digest(folder)}
    beside = sorted({each for pattern in _BESIDE_WEIGHTS for each in folder.glob(pattern) if each.is_file()})
    found = {each.relative_to(folder).as_posix(): file_digest(each) for each in beside}
    return {"weights and configuration": known, **found, **_tokenizer_code(folder)}


def _tokenizer_code(folder: Path) -> dict[str, str]:
    """Return the digests of the code in a folder that its tokenizer's configuration names."""
    config = folder / "tokenizer_config.json"
    named = named_classes(json_object(config)) if config.is_file() else ()
    return source_digests(folder, [folder / f"{module}.py" for repository, module in named if not repository])


@functools.cache
def _folder_digest(folder: Path, listed: tuple[Any, ...]) -> str:
    return folder_digest(folder)


def _listed(folder: Path) -> tuple[Any, ...]:
    """Return path, bytes and time of each file below a folder: as long as they stay, so does its content."""
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return tuple((str(each), each.stat().st_size, each.stat().st_mtime_ns) for each in files)


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file, which is read once."""
    about = file.stat()
    return _digest_of(file.resolve(), about.st_size, about.st_mtime_ns)


@functools.cache
def _digest_of(file: Path, size: int, time: int) -> str:
    return file_digest(file)
