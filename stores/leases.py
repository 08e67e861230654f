"""Leases: who computes a fragment right now, so that another launch need not. They save work; nothing is right by them.

A lease is a small file under the store's `tmp/`, created by the first who asks and renewed while its owner works. Once
it has expired, or its owner was a process of this machine that is gone, anyone may take it. That two hold one after
all, as where clocks differ, costs a fragment computed twice: what is committed first is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator, Sequence

from dataflex.errors import DataflexError
from dataflex.stores.files import Files

SECONDS = 60.0
"""A lease holds so long; it is renewed three times as often. What another machine was at when it died waits as long."""
_WAITED = 5.0
"""Seconds for which who gives a lease back waits for the end of its last renewal."""


class Lease:
    """The right to compute one fragment, for all of its stores.

    Args:
        files: the root's files.
        paths: of the lease in each store.
    """

    def __init__(self, files: Files, paths: Sequence[str]):
        self._files = files
        self._paths = sorted(paths)  # in one order, so that two who want the same do not each hold a part

    def take(self) -> bool:
        """Take the lease if it is free or has expired; say so. One that cannot be looked at is no obstacle."""
        taken: list[str] = []
        with contextlib.suppress(OSError, DataflexError):
            for path in self._paths:
                if not self._take(path):
                    self._free(taken)
                    return False
                taken.append(path)
        return True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Renew what was taken until the end of the block, and give it back then."""
        done = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(done,), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            done.set()
            renewing.join(_WAITED)  # for no server that hangs: what is renewed after all expires
            self._free(self._paths)

    def _take(self, path: str) -> bool:
        if self._files.create(path, _document()):
            return True
        with contextlib.suppress(FileNotFoundError):
            if _is_current(self._files.read(path, 1000)):
                return False
        self._files.remove(path)
        return self._files.create(path, _document())

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(SECONDS / 3):
            # What cannot be renewed expires, and costs no more than a fragment computed twice.
            with contextlib.suppress(OSError, DataflexError):
                for path in self._paths:
                    with self._files.output(path) as file:
                        file.write(_document())

    def _free(self, paths: Sequence[str]) -> None:
        for path in paths:
            with contextlib.suppress(OSError, DataflexError):  # it expires
                self._files.remove(path)


def _document() -> bytes:
    owner = {"host": platform.node(), "pid": os.getpid(), "until": time.time() + SECONDS}
    return json.dumps({**owner, "token": uuid.uuid4().hex}).encode()  # no other's: `Files.create` compares


def _is_current(data: bytes) -> bool:
    try:
        held = json.loads(data)
        until, host, pid = float(held["until"]), str(held["host"]), int(held["pid"])
    except (ValueError, TypeError, KeyError):  # half a file, or none of ours
        return False
    # One that is far ahead is of a clock that is wrong, or of nobody who renews it.
    is_now = 0 < until - time.time() <= 2 * SECONDS
    return is_now and (host != platform.node() or _is_alive(pid))


def _is_alive(pid: int) -> bool:
    """Say whether there is a process of this number here; one of another user's counts."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
