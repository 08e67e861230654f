"""A root on an object store that cannot be used: said in two lines before anything is loaded, in bounded time."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.object_store import Proxy
from dataflex.doctor import disk
from dataflex.errors import ConfigError, UnavailableError
from dataflex.stores.root import StoreRoot, refuse_unusable
from tests.command import LAUNCHED, run
from tests.roots import LAYOUT

pytestmark = pytest.mark.usefixtures("run_file")


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections, and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """A port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def refusing(code: str) -> Callable[[Any, Proxy, str], None]:
    def order(monkeypatch: Any, proxy: Proxy, bucket: str) -> None:
        proxy.begin(code, lambda *_: True)

    return order


REFUSED: dict[str, tuple[str, str, int, Callable[[Any, Proxy, str], None] | None]] = {
    "bucket": ("s3://{bucket}-no/x", "found no bucket '{bucket}-no'; expected one that is there", 2, None),
    "rights": ("s3://{bucket}/x", "PermissionError: as ordered\n  expected a bucket", 2, refusing("403")),
    "a name": ("s3://No_Bucket/x", "", 2, None),
    "out of order": ("s3://{bucket}/x", "OSError: [Errno 16] as ordered\n  asked again for up to", 75, refusing("503")),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("verb", ["validate", "train"])
def test_what_the_server_refuses(
    verb: str, what: str, bucket: str, proxy: Proxy, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    root, expected, exit_code, order = REFUSED[what]
    root = root.format(bucket=bucket)
    if order is not None:
        order(monkeypatch, proxy, bucket)
    code, out, err = run(capsys, verb, "run.yaml", f"dataflex.store={root}")
    assert code == exit_code
    assert err.startswith(f"dataflex: {root}: ")
    assert expected.format(bucket=bucket) in err
    assert err.count("\n") <= 3
    assert "Traceback" not in err
    assert (f"{root} (float16)" in out) == (verb == "validate")  # what follows from the run file is said all the same


def test_credentials_that_are_missing(
    bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    code, _, err = run(capsys, "validate", "run.yaml", f"dataflex.store=s3://{bucket}/x")
    assert code == 2
    assert err.startswith(f"dataflex: s3://{bucket}/x: NoCredentialsError: Unable to locate credentials\n  expected")
    assert err.count("\n") == 2


@pytest.mark.parametrize("endpoint", ["closed", pytest.param("silent", marks=pytest.mark.slow), "no url"])
def test_an_endpoint_that_does_not_answer(
    endpoint: str, closed: int, silent: int, bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    port = {"closed": closed, "silent": silent}.get(endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost" if port is None else f"http://127.0.0.1:{port}")
    begun = time.monotonic()
    code, out, err = run(capsys, "validate", "run.yaml", f"dataflex.store=s3://{bucket}/x")
    assert time.monotonic() - begun < 13
    assert code == (2 if port is None else 75)
    assert err.startswith(f"dataflex: s3://{bucket}/x: ")
    assert err.count("\n") == 2
    assert "optimizer steps" in out


def test_a_root_that_can_be_used_costs_one_request(
    bucket: str, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"s3://{bucket}/x"
    StoreRoot(root).open("gradient", {"r": 1}, LAYOUT)
    proxy.begin()
    assert run(capsys, "validate", "run.yaml", f"dataflex.store={root}")[0] == 0
    assert len(proxy.seen) == 1
    assert run(capsys, "validate", "run.yaml", f"dataflex.store=s3://{bucket}/not/yet")[0] == 0
    assert not [request for request in proxy.seen if not request.startswith("GET")]


def test_the_doctor_looks_at_it_too(bucket: str) -> None:
    good, bad = disk.room({"store": f"s3://{bucket}/x", "output": f"s3://{bucket}-no/x"})
    assert good.level == "ok"
    assert bad.level == "error"
    assert "found no bucket" in bad.found


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_process_looks_for_itself(rank: str, bucket: str, capsys: Any, monkeypatch: Any) -> None:
    """One that ended alone would leave the others waiting for it, for half an hour."""
    for name, value in (LAUNCHED | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    code, _, _ = run(capsys, "featurize", "run.yaml", f"dataflex.store=s3://{bucket}-no/x")
    assert code == 2


def test_store_commands_name_what_is_wrong(bucket: str, capsys: Any) -> None:
    code, _, err = run(capsys, "store", "ls", "--root", f"s3://{bucket}-no/x")
    assert code == 2
    assert "found no bucket" in err
    code, _, err = run(capsys, "store", "ls", "--root", f"s3://{bucket}/x")
    assert code == 2
    assert f"--root: found nothing at s3://{bucket}/x" in err


def test_the_time_is_bounded_whatever_the_client_does(silent: int, bucket: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent}")
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="no answer within 1 s"):
        refuse_unusable(f"s3://{bucket}/x", 1.0)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("root", ["memory://bucket/x", "file:///tmp", "/tmp"])
def test_what_has_no_buckets_is_not_asked_for_one(root: str) -> None:
    refuse_unusable(root)


def test_a_malformed_root_is_refused_first() -> None:
    for root in ("s3://", "nosuch://x/y"):
        with pytest.raises(ConfigError, match="root of the stores: found"):
            refuse_unusable(root)
