"""Errors in words for data, models, encoders and rewards that cannot be loaded.

Code that has LLaMA-Factory or its libraries load something does it inside `explained`. The library's own exception is
kept as the cause, which `dataflex -v` shows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from dataflex.errors import DataflexError, UnavailableError
from dataflex.faults import is_of_memory, is_unreachable

_LONGEST = 300  # characters of a library's text, and of what is shown of a record


@contextlib.contextmanager
def explained(
    place: str, look: Callable[[], str | None] = lambda: None, refusal: type[DataflexError] = DataflexError
) -> Iterator[None]:
    """Turn what fails while data are loaded into an error that names the place.

    Args:
        place: dataset and file.
        look: finds out what is wrong there, or returns None where it sees nothing wrong.
        refusal: the kind of error.

    Raises:
        UnavailableError: a server does not answer.
        DataflexError: of the kind `refusal`; errors of this package's own code stay as they are.
    """
    with _silent("datasets"):
        try:
            yield
        except DataflexError:
            raise
        # Converters, decoders, tokenizers and worker processes raise whatever they meet, a bare Exception among it.
        except Exception as error:
            if is_ours(error) or is_of_memory(error):  # more memory is wanted, not other data
                raise
            kind_of_error = UnavailableError if is_unreachable(error) else refusal
            raise kind_of_error(f"{place}: {look() or in_words(error)}") from error


@contextlib.contextmanager
def at_record(records: Iterable[Any], work: Callable[[Any], Any], about: Callable[[Any], str]) -> Iterator[None]:
    """Name the record that a batch failed at: the work is done again, record by record and in this process.

    Args:
        records: those of the batch.
        work: what is done with one of them.
        about: says which record it is, and what is odd about it.

    Raises:
        DataflexError: work on a record fails; where it fails on none alone, the batch's own error is left as it is.
    """
    try:
        yield
    except DataflexError:
        raise
    except Exception as error:  # as above
        if is_ours(error) or is_of_memory(error):
            raise
        for record in records:
            try:
                work(record)
            except Exception as alone:
                if is_ours(alone):
                    raise
                raise DataflexError(f"{about(record)}\n  {in_words(alone)}") from alone
        raise


def is_ours(error: BaseException) -> bool:
    """Say whether this package's own code raised an error, which is a fault of ours and not of the data."""
    return raised_in(error).partition(".")[0] == "dataflex"


def raised_in(error: BaseException) -> str:
    """Return the module whose code raised an error, "" where that is not known."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""


def in_words(error: BaseException) -> str:
    """Return what went wrong, by the error at the bottom of the chain, on one line."""
    # `datasets` wraps what a worker raised; multiprocessing's copy of the worker's traceback is no error of its own.
    while error.__cause__ is not None and not type(error.__cause__).__name__.startswith("_Remote"):
        error = error.__cause__
    text = " ".join(str(error).split()) or "no text"
    if isinstance(error, KeyError):
        text = f"found no key {text}"
    if isinstance(error, ImportError):
        text += "; install what is missing, or copy the data to a local file and register that"
    return f"{text[:_LONGEST]} ({type(error).__name__})"


def shown(record: Mapping[str, Any]) -> str:
    """Return a record's fields with their types and how they begin, on one line."""
    fields = (f"{name}: {kind(value)} {value!r:.40}" for name, value in record.items() if not name.startswith("__"))
    return ", ".join(fields)[:_LONGEST] or "no fields"


def kind(value: Any) -> str:
    """Return the name that JSON has for a value's type."""
    names = {type(None): "null", bool: "a boolean", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value)) or ("a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a library from logging the error that it raises as well."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
