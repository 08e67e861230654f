"""Which errors are asked again about, how often and how long."""

from __future__ import annotations

import errno
import socket
import time

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError

from dataflex.errors import UnavailableError
from dataflex.stores import retries
from dataflex.stores.retries import is_passing, persistently


def of_s3(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


def translated(error: Exception, into: Exception) -> Exception:
    into.__cause__ = error
    return into


class Answered(Exception):
    """As gcsfs and Azure's client have them."""

    def __init__(self, code: int):
        super().__init__("answered")
        self.code = code


PASSING = [
    *(of_s3(status, "x") for status in (408, 409, 429, 500, 502, 503, 504)),
    *(
        of_s3(400, code)
        for code in ("RequestTimeout", "SlowDown", "ThrottlingException", "BadDigest", "IncompleteBody")
    ),
    translated(of_s3(404, "NoSuchUpload"), FileNotFoundError("no such upload")),
    translated(of_s3(503, "SlowDown"), OSError(errno.EBUSY, "slow down")),
    EndpointConnectionError(endpoint_url="http://x"),
    ReadTimeoutError(endpoint_url="http://x"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    socket.gaierror(-2, "unknown"),
    TimeoutError(),
    Answered(503),
    Answered(429),
    *(type(name, (Exception,), {})() for name in ("ClientPayloadError", "IncompleteReadError", "ServiceRequestError")),
]
LASTING = [
    *(of_s3(status, code) for status, code in ((403, "AccessDenied"), (404, "NoSuchKey"), (404, "NoSuchBucket"))),
    *(of_s3(status, code) for status, code in ((412, "PreconditionFailed"), (416, "InvalidRange"))),
    of_s3(501, "NotImplemented"),
    translated(of_s3(412, "PreconditionFailed"), FileExistsError("there")),
    translated(Answered(409), FileExistsError("as Azure says it")),
    NoCredentialsError(),
    UnavailableError("said already"),
    MemoryError(),
    Answered(404),
    OSError(errno.ENOSPC, "no space"),
    ValueError("5xx"),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_passes(error: Exception) -> None:
    assert is_passing(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_stays(error: Exception) -> None:
    assert not is_passing(error)


class Failing:
    """Fails as often as it is told."""

    def __init__(self, times: int, error: Exception | None = None, seconds: float = 0.0):
        self.left, self.calls, self.error, self.seconds = times, 0, error or TimeoutError(), seconds

    def __call__(self) -> int:
        self.calls += 1
        if self.seconds:
            time.sleep(self.seconds)
        if self.left:
            self.left -= 1
            raise self.error
        return self.calls


def test_it_is_bounded_in_number_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr("dataflex.stores.retries.time.sleep", lambda seconds: pauses.append(seconds))
    assert persistently(Failing(11)) == 12 == retries.ATTEMPTS
    longest = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15, 15, 15, 15]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    for_good = Failing(100)
    with pytest.raises(TimeoutError):
        persistently(for_good)
    assert for_good.calls == 12
    lasting = Failing(100, ValueError())
    with pytest.raises(ValueError, match=r"^$"):
        persistently(lasting)
    assert lasting.calls == 1
    monkeypatch.setattr("dataflex.stores.retries.time.sleep", sleep)
    assert persistently(Failing(1, seconds=0.6), 0.5) == 2  # the time begins with the first failure
    slow = Failing(100, seconds=0.3)
    with pytest.raises(TimeoutError):
        persistently(slow, 0.5)
    assert slow.calls == 2
