"""Whether a scheduler has asked this process to stop, and where it stops: at once, or where its work is safe.

Signals are a matter of the whole process, so what is known of them is kept in this module.
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from dataflex import distributed
from dataflex.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 15.0
"""Seconds after a signal in which work that can be done again may still come to its end. torchrun kills after 30."""


class _Asked:
    """What this process knows of being asked to stop."""

    def __init__(self) -> None:
        self.owner = os.getpid()  # a forked worker inherits this object and is not meant by it
        self.by: signal.Signals | None = None  # the first signal
        self.held = 0  # blocks of `held` that are open
        self.is_leaving = False  # an `Interrupted` is on its way up
        self.is_droppable = False  # a block of `droppable` is open
        self.is_late = False  # `PATIENCE` is over
        self.is_over = False  # all is done, so a signal changes nothing any more


_now = _Asked()
_is_listening = False
_is_last = False  # what `listening` surrounds is the last that this process does


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Answer SIGTERM and SIGUSR1 until the end of the block; only the first of them counts.

    Outside of `held`, the first one raises `Interrupted` where the process is. Others are ignored: a launcher and a
    scheduler may both send one, and what the first began must come to its end. Python hands signals to the main thread
    alone, so in another one nothing is listened for.
    """
    global _now, _is_listening
    is_main = threading.current_thread() is threading.main_thread()
    _now, _is_listening = _Asked(), is_main
    kept = {number: signal.signal(number, _answer) for number in SIGNALS} if is_main else {}
    try:
        yield
    finally:
        is_over, _now, _is_listening = _now.is_over, _Asked(), False
        for number, handler in kept.items():  # ended by a signal now, a command that has done all would seem to fail
            signal.signal(number, _Ended() if is_over and _is_last else handler)


class _Ended:
    """Passes over the signals of a process that is about to end; not for ever, as something may keep it."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._since > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def over() -> None:
    """Let signals change nothing from here on: all is done, and the rest of the block is quick."""
    _now.is_over = True


def last() -> None:
    """Note that this process ends behind the next `listening`."""
    global _is_last
    _is_last = True


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Only note a signal in the block, which asks for it itself at the places where it can stop."""
    _now.held += 1
    try:
        yield
    finally:
        _now.held -= 1


@contextlib.contextmanager
def droppable() -> Iterator[None]:
    """Let work in the block be dropped, by `Interrupted`, once a signal is `PATIENCE` seconds old."""
    _now.is_droppable = True
    try:
        yield
    finally:
        _now.is_droppable = False


def is_asked() -> bool:
    """Say whether this process, or the run as far as this process has heard, is to stop."""
    return _now.by is not None or _is_announced()


def is_asked_anywhere(device: Any = None) -> bool:
    """Say whether any process of the run is to stop; the same answer on every one. Collective.

    Args:
        device: where the answers are added up; None gathers them as objects, which is slower.
    """
    asked = _now.by is not None
    if distributed.world() > 1:
        asked = any(distributed.gather(asked)) if device is None else distributed.is_any(asked, device)
    return asked


def leave(together: bool = False) -> None:
    """Raise `Interrupted`: the process has stopped where it could. Later signals change nothing.

    Args:
        together: whether every process of the run does so at the same place, so that none waits for another.
    """
    _now.is_leaving = True
    raise Interrupted(f"{name()}: stopped", together)


def name() -> str:
    """Return the name of the signal that asked this process to stop."""
    return "a signal to another process" if _now.by is None else _now.by.name


def _answer(number: int, frame: FrameType | None) -> None:
    """Handle a signal."""
    if os.getpid() != _now.owner:  # a forked child inherits this and has nothing to say
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _now.is_over:
        return
    is_first, sent = _now.by is None, signal.Signals(number)
    if is_first:
        _now.by = sent
        announce()
    if _now.is_leaving:
        return
    if not _now.held or (_now.is_late and _now.is_droppable):
        leave()
    if is_first:
        # Not by logging: the signal may have come in the middle of a line.
        os.write(2, f"dataflex: {sent.name}: stopping as soon as nothing is lost\n".encode())
        timer = threading.Timer(PATIENCE, _become_late, [_now, sent])
        timer.daemon = True
        timer.start()


def _become_late(asked: _Asked, sent: signal.Signals) -> None:
    """Send the signal once more, now that work which may be dropped is no longer waited for."""
    asked.is_late = True
    if asked is _now and asked.is_droppable and _is_listening:
        signal.pthread_kill(threading.main_thread().ident or 0, sent)  # so that a system call ends, too


def announce() -> None:
    """Ask the other processes to stop behind the piece of work at hand; they look for this between two pieces."""
    if (store := distributed.store()) is not None:
        with contextlib.suppress(RuntimeError):  # where the process that holds it is gone, no one is left to be told
            store.set("dataflex/stop", "1")


def _is_announced() -> bool:
    store = distributed.store()
    return store is not None and bool(store.check(["dataflex/stop"]))


def _from_parent_alone(_: object) -> None:
    """Keep a forked worker, as a loader's, alive when a launcher signals the whole process group.

    Its parent needs it until it has stopped, and ends it then.
    """
    if not _is_listening:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # first: what comes before the next line would end it
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_await, args=(os.getppid(),), daemon=True).start()


def _await(parent: int) -> None:
    while (found := signal.sigwaitinfo(SIGNALS)).si_pid != parent:
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.kill(os.getpid(), found.si_signo)


class _Registered:
    """An object to register with: multiprocessing keeps a registration only as long as its object lives."""


_registered = _Registered()
multiprocessing.util.register_after_fork(_registered, _from_parent_alone)
