"""Roots that cannot be reached, read or written: one message that names the URL, whatever the backend raises."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dataflex.errors import ConfigError, DataflexError, UnavailableError
from dataflex.stores.files import Files, LocalFiles
from dataflex.stores.remote_files import RemoteFiles
from dataflex.stores.root import open_files, refuse_unusable


@pytest.fixture(scope="module")
def closed() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number: int = found.getsockname()[1]
    return number


@pytest.mark.parametrize("protocol", ["ftp", "http", "webhdfs"])
def test_a_server_that_does_not_answer_is_named(protocol: str, closed: int) -> None:
    url = f"{protocol}://127.0.0.1:{closed}/stores"
    with pytest.raises(UnavailableError, match=url):
        refuse_unusable(url, 3.0)


@pytest.mark.parametrize(
    "url", ["arrow_hdfs://h/x", "cached://x", "data://x", "dbfs://a/b", "dir://x", "generic://x", "jupyter://h/x",
            "reference://x", "simplecache://x", "tar:///x", "zip:///x"],
)  # fmt: skip
def test_a_backend_that_cannot_be_a_root_is_refused(url: str) -> None:
    with pytest.raises(DataflexError, match=url):
        open_files(url).create("runs/x", b"1")


@pytest.mark.parametrize("protocol", ["file", "local"])
def test_a_url_of_this_machine_is_a_folder(protocol: str, tmp_path: Any) -> None:
    files = open_files(f"{protocol}://{tmp_path}/new")
    assert isinstance(files, LocalFiles)
    assert files.create("a/b", b"1")


class Refusing(MemoryFileSystem):  # type: ignore[misc]
    """Raises what it is given from everything that asks a server."""

    cachable = False

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise self.error

    ls = find = info = cat_file = pipe_file = put_file = rm_file = _refuse


def written(files: Files) -> None:
    with files.output("a/b") as file:
        file.write(b"1")


OPERATIONS: dict[str, Callable[[Files], Any]] = {
    "create": lambda files: files.create("a/b", b"1"),
    "output": written,
    "open": lambda files: files.open("a/b"),
    "read": lambda files: files.read("a/b"),
    "fetch": lambda files: files.fetch([("a/b", 0, 1)]),
    "names": lambda files: files.names(""),
    "stored": lambda files: files.stored(""),
    "exists": lambda files: files.exists(),
    "remove": lambda files: files.remove("a/b"),
}
CLIENTS: dict[str, tuple[type[DataflexError], type[Exception]]] = {  # as botocore, aiohttp and httpx call them
    "NoCredentialsError": (ConfigError, Exception),
    "PartialCredentialsError": (ConfigError, Exception),
    "Forbidden": (ConfigError, PermissionError),
    "NotImplementedByBackend": (ConfigError, NotImplementedError),
    "EndpointConnectionError": (UnavailableError, Exception),
    "ConnectTimeoutError": (UnavailableError, Exception),
    "ServerTimeoutError": (UnavailableError, TimeoutError),
    "ConnectError": (UnavailableError, Exception),
    "NoName": (UnavailableError, socket.gaierror),
}


def refusing(error: Exception) -> RemoteFiles:
    files = RemoteFiles("memory://bucket/x")
    files.fs = Refusing(error)
    files.patience = 0
    return files


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_errors_of_client_libraries_are_told(operation: str, name: str) -> None:
    expected, base = CLIENTS[name]
    error = type(name, (base,), {})("why\nit is")
    with pytest.raises(expected) as caught:
        OPERATIONS[operation](refusing(error))
    said = str(caught.value)
    assert said.startswith(f"memory://bucket/x: {name}: why it is\n  ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("operation", ["create", "output"])
def test_a_bucket_that_is_missing_is_told(operation: str) -> None:
    with pytest.raises(ConfigError, match=r"memory://bucket/x: FileNotFoundError: no such bucket\n.*written to"):
        OPERATIONS[operation](refusing(FileNotFoundError("no such bucket")))


def test_what_is_absent_is_no_error() -> None:
    files = refusing(FileNotFoundError("gone"))
    files.remove("a/b")
    assert files.names("") == []
    with pytest.raises(FileNotFoundError):
        files.open("a/b")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_memory_that_runs_out_is_left_as_it_is(operation: str) -> None:
    with pytest.raises(MemoryError):
        OPERATIONS[operation](refusing(MemoryError()))
