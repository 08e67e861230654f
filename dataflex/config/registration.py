"""The types and keys of an entry of dataset_info.json, which LLaMA-Factory reads unchecked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex.components.registry import did_you_mean
from dataflex.config.problems import Origin, Problems

REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
"""Keys that say where a dataset lies, if not in a local file."""

_ENTRY = ("file_name", *REMOTE, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags")
_TEXTS = ("prompt", "query", "response", "history", "messages", "system", "tools")
_COLUMNS = (*_TEXTS, "images", "videos", "audios", "chosen", "rejected", "kto_tag")
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")


def check_types(name: str, entry: Mapping[str, Any], info: Origin, problems: Problems) -> None:
    """Note every value of another type than LLaMA-Factory means, and every key that is nearly one it reads.

    Args:
        name: the dataset.
        entry: its registration.
        info: the file that it stands in.
        problems: takes what is wrong.
    """
    for key in ("split", *REMOTE):
        if key in entry and not isinstance(entry[key], str):
            problems.add(info, f"{name}.{key}", "a text", entry[key])
    for key in ("subset", "folder"):
        if not isinstance(entry.get(key, ""), str | None):
            problems.add(info, f"{name}.{key}", "a text", entry[key])
    if not isinstance(entry.get("ranking", False), bool):
        problems.add(info, f"{name}.ranking", "true or false", entry["ranking"])
    count = entry.get("num_samples")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        problems.add(info, f"{name}.num_samples", "a whole number, at least 1", count)
    for key, known in (("columns", _COLUMNS), ("tags", _TAGS)):
        _check_names(f"{name}.{key}", entry.get(key, {}), known, info, problems)
    for key in entry:  # LLaMA-Factory passes over others; a key that is nearly one it reads is a slip
        if key not in _ENTRY and did_you_mean(key, _ENTRY):
            problems.add_unknown(info, f"{name}.{key}", "key", _ENTRY)


def _check_names(path: str, names: Any, known: tuple[str, ...], info: Origin, problems: Problems) -> None:
    """Check the keys and values of `columns` or `tags`."""
    if not isinstance(names, dict):
        problems.add(info, path, f"a mapping with some of {', '.join(known)}", names)
        return
    for key, value in names.items():
        if key not in known:
            problems.add_unknown(info, f"{path}.{key}", "key", known)
        elif not isinstance(value, str | None):
            problems.add(info, f"{path}.{key}", "a text", value)
