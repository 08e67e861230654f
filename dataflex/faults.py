"""What an exception that reached the command means to people: the text to print in place of a traceback.

Only what comes from outside is told: our own errors, files and disks, memory, the network, what a user's component
raises. Anything else is a fault of the program, and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import traceback

from dataflex.errors import DataflexError, Interrupted

USERS: set[str] = set()
"""Modules of components: imported because a run file names them, or of a class that was registered."""

_ADVICE = {
    errno.ENOSPC: "make room, or write elsewhere (output_dir, dataflex.store, TMPDIR)",
    errno.EDQUOT: "make room within your quota, or write elsewhere (output_dir, dataflex.store, TMPDIR)",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "name a file or folder that you may use, or have its permissions changed",
    errno.EPERM: "name a file or folder that you may use, or have its permissions changed",
    errno.ENOENT: "it was removed meanwhile, or its name is wrong",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or lower dataloader_num_workers",
    errno.ENOMEM: "free memory, or lower dataloader_num_workers and preprocessing_num_workers",
}


_UNREACHABLE = (
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT,
)  # fmt: skip
_NO_SERVER = re.compile(r"\w*Connect\w*Error|\w*Timeout(Error)?")
"""Names of the exceptions by which HTTP libraries and object stores say that a server does not answer.

The classes have no parent in common.
"""
_LOST = re.compile(
    r"gloo/transport.*(closed by peer|reset by peer|Timed out|timed out|Broken pipe)|Connection closed by peer \["
    r"|Application timeout caused pair closure|remote process exited|Watchdog caught collective operation timeout"
    r"|recvValue failed|sendBytes failed|(wait|store->get).* timeout|Broken pipe"
    # Of the store itself, where the process that holds it is the one that is gone.
    r"|\AConnection reset by peer|failed to (recv|send), |Connection was likely closed",
    re.DOTALL | re.IGNORECASE,  # one sentence begins in capitals or not, as it is the whole message or a part of one
)
"""How gloo, NCCL and the store that processes meet at tell that another has gone; they share no class for it."""
_OF_RUST = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")
"""How tokenizers and safetensors, written in Rust, report the errors of a disk: in exceptions that are no OSError."""


def told(error: BaseException) -> tuple[str, int] | None:
    """Return what to print and the exit code; None for a fault of the program."""
    if isinstance(error, DataflexError | Interrupted):
        return str(error), error.exit_code
    if is_of_memory(error):
        where = "the device's memory" if _is_of_a_device(error) else "memory"
        least = str(error).partition("\n")[0].partition(". GPU")[0]
        advice = "lower per_device_train_batch_size, cutoff_len or dataflex.token_budget, or fewer rows and steps"
        return f"{where} ran out{': ' + least if least else ''}\n  {advice}; what was committed stays", 1
    if isinstance(error, ModuleNotFoundError) and (link := _missing_link(error.name or "")) is not None:
        return link, 1
    if not isinstance(error, OSError) and (found := _OF_RUST.search(str(error))):
        number = int(found[1] or found[2])
        error = OSError(number, os.strerror(number))
    if is_of_a_lost_process(error):
        said = " ".join(str(error).split())[:200]
        return (
            f"another process of this run is gone: {said}\n"
            "  what was committed and every checkpoint stay; see why it ended (memory? a node?), and run the same "
            "command again",
            75,
        )
    if is_unreachable(error):
        refused = getattr(error, "errno", None)
        said = os.strerror(refused) if refused in _UNREACHABLE else " ".join(str(error).split())
        advice = "see that the server runs and that its address is right (dataflex.store, model, datasets)"
        return f"a server does not answer: {said[:300]}\n  {advice}; what was committed stays", 75
    if isinstance(error, OSError) and error.errno is not None:
        files = [str(name) for name in (error.filename, error.filename2) if name is not None]
        reason = error.strerror or os.strerror(error.errno)
        advice = _ADVICE.get(error.errno, "see to it, and run the same command again")
        return f"{': '.join([*files, reason])}\n  {advice}; what was committed stays", 1
    return (found_in, 1) if (found_in := of_user_code(error)) is not None else None


def _missing_link(module: str) -> str | None:
    """Say that a package of ours whose folder lies elsewhere in the checkout is out of reach; None if it is not so."""
    name = module.removeprefix("dataflex.").partition(".")[0]
    place = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    if name not in ("pipelines", "stores") or os.path.isdir(place):
        return None
    return (
        f"{place}: found {'a file' if os.path.isfile(place) else 'nothing'}; expected a link to ../{name}, which this "
        f"checkout was made without\n  git config core.symlinks true; git checkout -- dataflex/{name}; or install "
        "without --editable, which needs no links"
    )


def of_user_code(error: BaseException) -> str | None:
    """Say where a user's component raised an error, itself or in a library that it called; None for any other."""
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        if module in USERS and module.partition(".")[0] != "dataflex":
            place = f"{frame.f_code.co_filename}, line {line}, in {frame.f_code.co_qualname}"
        elif module.partition(".")[0] == "dataflex":  # called back into our code: the fault is ours again
            place = None
    if place is None:
        return None
    text = " ".join(str(error).split())
    return (
        f"{place}: {type(error).__name__}{': ' + text if text else ''}\n"
        "  The component's own code raised it: mend it there; dataflex -v shows the traceback. What was committed stays"
    )


def is_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out, of this machine or of a device."""
    return isinstance(error, MemoryError) or _is_of_a_device(error)


def is_of_a_lost_process(error: BaseException) -> bool:
    """Say whether a collective failed because another process has ended or does not come."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def is_unreachable(error: BaseException | None) -> bool:
    """Say whether an error, or one that it came from, is a server's that does not answer. Offline mode is none."""
    while error is not None:
        is_of_network = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
        is_of_network |= isinstance(error, OSError) and error.errno in _UNREACHABLE
        is_of_network |= any(_NO_SERVER.fullmatch(cls.__name__) for cls in type(error).__mro__)
        # Hugging Face's offline mode raises errors of connections, though nobody was asked.
        is_of_this_machine = isinstance(error, BrokenPipeError) or "ffline" in f"{type(error).__name__} {error}"
        if is_of_network and not is_of_this_machine:
            return True
        error = error.__cause__ or error.__context__  # libraries drop the cause, `from None`
    return False


def _is_of_a_device(error: BaseException) -> bool:
    """Say whether it is torch's, which there can only be if torch has been imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
