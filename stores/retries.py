"""Which errors of a server pass, and how often and how long it is asked again."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from dataflex.errors import DataflexError
from dataflex.faults import is_unreachable

ATTEMPTS = 12
SECONDS = 60.0
"""It is the time that ends it, in which a server may be started anew; S3 says `SlowDown` for less, while it makes room.
A server that is always back at once and never well is asked no more than the number."""
FIRST, LONGEST = 0.2, 15.0
"""Seconds: of the first pause, which doubles each time, and of the longest. Half of each is chance."""

T = TypeVar("T")

_CODES = re.compile(
    r"Throttl|SlowDown|Timeout|TooManyRequests|LimitExceeded|NotComplete|InternalError|Unavailable"  # later
    r"|ConditionalRequestConflict|OperationAborted"  # another request for the same name is under way
    r"|BadDigest|IncompleteBody|SHA256Mismatch"  # lost or changed on the way
    r"|NoSuchUpload"  # the answer to its completion was lost
)
"""Parts of S3's names for errors that pass."""
_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
_BROKEN = re.compile(
    r"IncompleteRead(Error)?|ClientPayloadError|ContentLengthError|ResponseParserError|ResponseStreamingError"
    r"|HTTPClientError|FlexibleChecksumError|ChunkedEncodingError|(Remote)?ProtocolError|Service(Request|Response)Error"
)
"""Names of the exceptions by which clients say that an answer broke off; the classes have no parent in common."""


def persistently(call: Callable[[], T], seconds: float = SECONDS) -> T:
    """Return what `call` returns, which is called again while its error is one that passes.

    Args:
        call: may have had its effect although it failed, so it must be one that can be repeated.
        seconds: after the first failure, within which it is called again. What went well for a while first, as a large
            upload does, has them as well.

    Raises:
        Exception: that of the last call.
    """
    until: float | None = None
    for pause in _pauses():
        try:
            return call()
        except Exception as error:
            until = time.monotonic() + seconds if until is None else until
            if not is_passing(error) or time.monotonic() + pause > until:
                raise
        time.sleep(pause)
    return call()


def is_passing(error: BaseException) -> bool:
    """Say whether the same request may succeed a little later."""
    if isinstance(error, DataflexError | MemoryError | FileExistsError):  # the last as Azure's comes from a 409
        return False
    for each in _causes(error):
        status, code = _status_and_code(each)
        if status in _STATUSES or _CODES.search(code) or _BROKEN.fullmatch(type(each).__name__):
            return True
    return not isinstance(error, FileNotFoundError) and is_unreachable(error)


def is_of(error: BaseException, answer: int | str) -> bool:
    """Say whether an error comes from an answer with this HTTP status, or this code of S3's."""
    return any(answer in _status_and_code(each) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status_and_code(error: BaseException) -> tuple[int, str]:
    """Return the HTTP status and the code in an error of botocore, aiohttp, gcsfs or Azure; 0 and none of others."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        about, found = response.get("ResponseMetadata", {}), response.get("Error", {})
        return int(about.get("HTTPStatusCode", 0)), str(found.get("Code", ""))
    numbers = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((number for number in numbers if isinstance(number, int)), 0), ""


def _pauses() -> Iterator[float]:
    for number in range(ATTEMPTS - 1):  # not the same for all who were refused together
        yield min(FIRST * 2**number, LONGEST) * random.uniform(0.5, 1.0)
