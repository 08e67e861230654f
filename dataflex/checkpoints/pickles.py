"""The pickles in a Transformers checkpoint: read as tensors and plain values only, and kept without being pickles.

`frozen` puts safetensors and JSON in their place, before a store keeps a state; `thawed` writes them afresh from
these, into a folder of the run, for Transformers' loaders. So nothing that lay in a store is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.trainer_pt_utils import safe_globals

from dataflex.checkpoints.tree import Tensors, Unplain, from_tree, to_tree
from dataflex.errors import MismatchError

SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_NOT_NEEDED = ("training_args.bin", "dataflex/complete.json")
"""Files that resuming does not read: the arguments are the run file's, and the mark names the pickles."""

# The exception alone; nothing here imports the module that could unpickle anything.
_Refused: type[Exception] = torch.serialization.pickle.UnpicklingError  # type: ignore[attr-defined]


def read_pickle(path: Path) -> Any:
    """Return what `torch.save` wrote, by torch's restricted unpickler: tensors, arrays and plain values.

    Raises:
        MismatchError: the file holds anything else, which is not executed, or is damaged.
    """
    with refused(RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError), safe_globals():
        return torch.load(path, map_location="cpu", weights_only=True)  # `safe_globals` admits NumPy's random states


@contextlib.contextmanager
def refused(*damage: type[Exception]) -> Iterator[None]:
    """Report in our words that torch refused a pickle; torch's own advise to read the file unrestricted.

    Args:
        damage: other exceptions that mean a file which torch cannot read.

    Raises:
        MismatchError: torch refused a file.
    """
    try:
        yield
    except (_Refused, *damage) as error:
        named = re.search(r"(?:GLOBAL |whose module |but got <class ')([\w.]+)", str(error))
        what = f"a pickle that asks for {named[1]}" if named else f"something else ({type(error).__name__})"
        raise MismatchError(
            f"{_file_in(error)}: expected tensors and plain values, as training writes them; found {what}. Nothing of "
            "it was executed. Find out who wrote it; name another checkpoint, or train again"
        ) from error


def _file_in(error: BaseException) -> str:
    """Return the file that torch was reading, which its errors do not name."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == "torch.serialization" and "f" in frame.f_locals:
            return str(frame.f_locals["f"])
    return "a file of the model or checkpoint"


def frozen(checkpoint: Path) -> None:
    """Put `<name>.json` and `<name>.safetensors` in the place of every pickle below a checkpoint of this process.

    Raises:
        MismatchError: one holds an object that is neither tensor nor plain value.
    """
    for name in _NOT_NEEDED:
        (checkpoint / name).unlink(missing_ok=True)
    for path in [path for path in checkpoint.rglob("*") if path.suffix in SUFFIXES]:
        tensors = Tensors()
        try:
            tree = to_tree(read_pickle(path), tensors)
        except Unplain as error:
            raise MismatchError(f"{path.name}: {error}; expected tensors and plain values") from error
        path.with_name(f"{path.name}.json").write_text(json.dumps(tree, allow_nan=False), "utf-8")
        save_file(tensors.named, path.with_name(f"{path.name}.safetensors"))
        path.unlink()


def thawed(kept: Path, folder: Path) -> Path:
    """Make from a kept state the checkpoint that `frozen` was given, in a new folder; return the folder.

    Files that were no pickles are linked.

    Args:
        kept: verified files of a kept state, not written to.
        folder: does not exist yet; nobody else may write to its parent.

    Raises:
        MismatchError: there is a pickle among them, which no DataFlex keeps, or a file is not what `frozen` wrote.
    """
    names = sorted(path.relative_to(kept) for path in kept.rglob("*") if not path.is_dir())
    if planted := [name for name in names if name.suffix in SUFFIXES]:
        raise MismatchError(
            f"{kept / planted[0]}: found a pickle; expected safetensors and JSON, as states are kept. It was not "
            "opened. Remove the state's folder and run again: the run trains to the state"
        )
    pickled = [name for name in names if name.suffix == ".json" and name.with_suffix("").suffix in SUFFIXES]
    of_pickles = {*pickled, *(name.with_suffix(".safetensors") for name in pickled)}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name not in of_pickles:
            (folder / name).symlink_to((kept / name).absolute())
    for name in pickled:
        try:
            tensors = load_file(kept / name.with_suffix(".safetensors"))
            value = from_tree(json.loads((kept / name).read_text("utf-8")), tensors)
        except (Unplain, SafetensorError, OSError, ValueError, RecursionError) as error:
            raise MismatchError(f"{kept / name}: {error}; expected what DataFlex keeps of a training state") from error
        torch.save(value, folder / name.with_suffix(""))
    return folder
