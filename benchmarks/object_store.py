"""An S3 server of this machine's, and a proxy before it that counts requests and breaks the one that it is told to."""

from __future__ import annotations

import contextlib
import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "tested",
    "AWS_SECRET_ACCESS_KEY": "tested",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
REFUSALS = {
    "400": "RequestTimeout", "409": "ConditionalRequestConflict", "429": "TooManyRequests", "500": "InternalError",
    "503": "SlowDown", "403": "AccessDenied",
}  # fmt: skip
"""Status that a request is refused with -> S3's name for it."""
FAULTS = ("400", "409", "429", "500", "503", "dropped", "lost", "lost 500", "cut", "hangs")
"""What becomes of a request: refused; dropped before the server sees it; done, and the answer is lost, or is another;
the answer breaks off in its middle; there is no answer."""


@contextlib.contextmanager
def serving(environment: MutableMapping[str, str]) -> Iterator[Proxy]:
    """Give a proxy before a server that starts and ends with the block, and set what clients find it by."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    environment.update(ENVIRONMENT, AWS_ENDPOINT_URL=proxy.url)
    try:
        yield proxy
    finally:
        proxy.stop()
        server.stop()


@dataclass
class Proxy:
    """Passes requests on to a server.

    Attributes:
        port: of the server.
        fault: what becomes of the requests that are chosen; one of `FAULTS`.
        chosen: of all requests, by number from 0, method and path.
        seconds: for which one hangs.
        seen: method and path of each request.
        struck: how many were chosen.
    """

    port: int
    fault: str = ""
    chosen: Callable[[int, str, str], bool] = lambda number, method, path: False
    seconds: float = 1.5
    seen: list[str] = field(default_factory=list)
    struck: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            def forward(self) -> None:
                proxy.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def begin(
        self, fault: str = "", chosen: Callable[[int, str, str], bool] | None = None, seconds: float = 1.5
    ) -> None:
        """Forget what was seen, and break what is chosen from now on."""
        with self.lock:
            self.fault, self.chosen = fault, chosen or (lambda number, method, path: False)
            self.seen, self.struck, self.seconds = [], 0, seconds

    def make_bucket(self, name: str) -> None:
        """Make a bucket, as no client of ours does."""
        server = http.client.HTTPConnection("127.0.0.1", self.port)
        server.request("PUT", f"/{name}")
        assert server.getresponse().status == 200
        server.close()

    def stop(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: _Handler) -> None:
        """Pass one request on, or do what was ordered instead."""
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        with self.lock:
            number = len(self.seen)
            self.seen.append(f"{request.command} {request.path}")
            fault = self.fault if self.chosen(number, request.command, request.path) else ""
            self.struck += bool(fault)
        if fault in ("hangs", "slow"):
            time.sleep(self.seconds)
        if fault in ("hangs", "dropped"):
            request.close_connection = True
            return
        if fault in REFUSALS:
            request.reply(int(fault), {}, _refusal(REFUSALS[fault]))
            return
        server = http.client.HTTPConnection("127.0.0.1", self.port)
        server.request(request.command, request.path, body, dict(request.headers))
        answer = server.getresponse()
        data, headers = answer.read(), dict(answer.getheaders())
        server.close()
        if fault == "lost":
            request.close_connection = True
        elif fault == "lost 500":
            request.reply(500, {}, _refusal("InternalError"))
        else:
            request.reply(answer.status, headers, data, is_cut=fault == "cut")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms for each answer otherwise

    def forward(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.forward()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def reply(self, status: int, headers: dict[str, str], data: bytes, is_cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        if self.command == "HEAD":
            self.send_header("Content-Length", headers.get("Content-Length") or headers.get("content-length") or "0")
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
        self.close_connection |= is_cut

    def log_message(self, *_: Any) -> None:
        pass


def _refusal(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as ordered</Message></Error>".encode()
