"""Where a run writes: its output folder and the root of the stores.

Nothing is written to find out while a run file is checked; a command that was given tries it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex.config.problems import Origin, Problems
from dataflex.errors import ConfigError
from dataflex.stores.urls import malformed

_READ = ("tokenized_path", "cache_dir")
"""Keys of folders that a run may only read, where they are there."""
_FOLDERS = re.compile(r"checkpoint-\d+|rounds|selector_cache")
"""What DataFlex and Transformers have folders for in an output folder."""
_SUFFIXES = (
    ".json", ".jsonl", ".safetensors", ".bin", ".pt", ".pth", ".parquet", ".model", ".txt", ".jinja", ".md", ".png",
)  # fmt: skip
"""What they call files."""
_SHOWN = 5
_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # bytes, on every file system in use


def why_unwritable(folder: str | os.PathLike[str]) -> str | None:
    """Return why nothing can be written into a folder, which may have yet to be made; None if it seems that it can."""
    path = Path(os.path.abspath(os.path.expanduser(folder)))
    if len(os.fsencode(path)) > _LONGEST_PATH or any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        return f"paths have at most {_LONGEST_PATH} bytes, and names {_LONGEST_NAME}"
    try:
        above = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        if not above.is_dir():
            return f"{above} is no folder"
        if not os.access(above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            return f"{above} may not be written to"
        if (free := os.statvfs(above)).f_bavail == 0 and free.f_blocks:  # without blocks, as /proc, it counts no room
            return os.strerror(errno.ENOSPC)
    except OSError as error:
        return error.strerror
    return None


def refuse_misplaced(folder: str | os.PathLike[str]) -> None:
    """Refuse an output folder in which a folder lies where the run will write a file, or the other way round.

    A name with the suffix of a file has to be a file, or a save would fail after all the steps before it; checkpoints
    and the other folders of DataFlex have to be folders.

    Raises:
        ConfigError: with all such paths.
    """
    root = Path(folder)
    wrong: list[str] = []
    for path in _below(root, deepest=4):
        mode = path.lstat().st_mode if path.is_symlink() and not path.exists() else path.stat().st_mode
        is_in_checkpoint = path.parent != root
        if (_FOLDERS.fullmatch(path.name) or (is_in_checkpoint and path.name == "dataflex")) and not stat.S_ISDIR(mode):
            wrong.append(f"{path} is no folder; expected a folder")
        elif path.suffix in _SUFFIXES and not stat.S_ISREG(mode):
            found = "folder" if stat.S_ISDIR(mode) else "FIFO, a device or a broken link"
            wrong.append(f"{path} is a {found}; expected a file")
    if wrong:
        said = "\n  ".join([*wrong[:_SHOWN], *([f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else [])])
        raise ConfigError(f"output_dir: found what the run cannot write over; move it away\n  {said}")


def _below(folder: Path, deepest: int) -> Iterator[Path]:
    """Yield what lies in an output folder, and in its checkpoints and the folders that DataFlex makes."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        yield path
        if deepest > 1 and (_FOLDERS.fullmatch(path.name) or path.name == "dataflex"):
            yield from _below(path, deepest - 1)


def refuse_unwritable(option: str, file: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold; its folder is made.

    Raises:
        ConfigError: it is a folder or a device, or its folder cannot be written to.
    """
    if file.exists() and not file.is_file():
        kind = "folder" if file.is_dir() else "device"
        raise ConfigError(f"{option}: found the {kind} {file}; expected a file to write")
    if why := why_unwritable(file.parent):  # a file that is there is replaced, which asks its folder alone
        raise ConfigError(f"{option}: found {file}; expected a file that can be written; {why}")
    try:  # what is allowed is not always possible, as to root in /proc
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise ConfigError(
            f"{option}: found {file}; expected a file that can be written; {file.parent}: {error.strerror}"
        ) from error


def check_outputs(values: Mapping[str, Any], origin: Origin, problems: Problems) -> None:
    """Note folders that the run is to write into and cannot; a cache may be one that is only read."""
    folder = values.get("output_dir")
    if isinstance(folder, str) and not folder.strip():
        problems.add(origin, "output_dir", "a folder for the run's output", folder)
        return
    for key in ("output_dir", "logging_dir", "tokenized_path", "cache_dir"):
        folder = values.get(key)
        if not isinstance(folder, str) or not folder or "://" in folder:
            continue  # said elsewhere
        is_read = key in _READ and os.path.isdir(folder)
        if not is_read and (why := why_unwritable(folder)):
            problems.add(origin, key, f"a folder that can be written to; {why}", folder)


def check_store(store: str | None, root: str, writes: bool, origin: Origin, problems: Problems) -> None:
    """Note a root in which no store can be; whether one on an object store answers, the commands find out.

    Args:
        store: as the run file has it.
        root: path or URL, as `store_root` returns it.
        writes: whether the run is bound to put features into it.
        origin: where the run file is.
        problems: takes what is wrong.
    """
    if text := malformed(root):
        problems.say(origin, "dataflex.store", text)
    elif store and (found := re.match(r"(\w{2,}):/(?!/)", store)):
        expected = f"{found[1]}://..., or a path that does not begin like a URL (./{store})"
        problems.add(origin, "dataflex.store", expected, store)
    elif "://" in root:
        return
    elif os.path.lexists(root) and not os.path.isdir(root):
        problems.add(origin, "dataflex.store", "a folder, or one that can be made", store or root)
    elif writes and (why := why_unwritable(root)):
        expected = f"a folder that can be written to, as every update computes features and keeps them; {why}"
        advice = "To read only, set dataflex.on_missing: error or refresh.policy: static, or name another store"
        problems.add(origin, "dataflex.store", expected, store or root, why=advice)
