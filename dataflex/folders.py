"""The local folder of a model or adapter, and a digest of all its files."""

from __future__ import annotations

import json
from pathlib import Path

from dataflex.errors import MismatchError, UnavailableError
from dataflex.faults import is_unreachable
from dataflex.fingerprint import digest, file_digest

_NOT_READ = (".md", ".gitattributes")


def model_folder(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None, subfolder: str | None = None
) -> Path:
    """Return the local folder of a model or adapter, a Hub name resolved to its downloaded snapshot.

    Raises:
        MismatchError: there is none.
        UnavailableError: the Hub does not answer, and nothing is in its cache.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / (subfolder or "")
    from transformers.utils.hub import cached_file

    where = {"revision": revision, "cache_dir": cache_dir, "subfolder": subfolder or ""}
    for name in ("config.json", "adapter_config.json"):
        try:
            return Path(str(cached_file(name_or_path, name, **where))).parent
        except OSError as error:  # Transformers' answer to every failure, a file that is not there among them
            if is_unreachable(error):
                raise UnavailableError(
                    f"{name_or_path}: the Hub does not answer, and its cache has no {name}; expected a folder here, or "
                    "a Hub that can be reached"
                ) from error
    raise MismatchError(f"{name_or_path}: found no configuration; expected a model or adapter, local or on the Hub")


def folder_digest(folder: Path) -> str:
    """Name a model that text is given to by all its files, the tokenizer's included, whatever it is called.

    Of an adapter the base that it names, which Transformers loads, is part of the name.

    Raises:
        MismatchError: that base is nowhere.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in _NOT_READ and p.name[0] != ".")
    parts = {p.relative_to(folder).as_posix(): file_digest(p) for p in files}
    if "adapter_config.json" in parts and "config.json" not in parts:
        named = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
        parts["the base"] = folder_digest(model_folder(str(named)))
    return digest(parts)
