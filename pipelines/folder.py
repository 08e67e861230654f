"""Where the files of a model or adapter lie."""

from __future__ import annotations

from pathlib import Path

from dataflex.errors import MismatchError


def model_folder(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None, subfolder: str | None = None
) -> Path:
    """Return the local folder of a model or adapter, a Hub name resolved to its downloaded snapshot.

    Raises:
        MismatchError: there is none.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / (subfolder or "")
    from transformers.utils.hub import cached_file

    where = {"revision": revision, "cache_dir": cache_dir, "subfolder": subfolder or ""}
    for name in ("config.json", "adapter_config.json"):
        found = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **where)
        if found is not None:
            return Path(found).parent
    raise MismatchError(f"{name_or_path}: found no configuration; expected a model or adapter, local or on the Hub")
