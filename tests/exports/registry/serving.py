"""What the tests' HTTP servers share: bodies that come in pieces, answers, connections that break."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Made = TypeVar("Made", bound=ThreadingHTTPServer)


class Connection(BaseHTTPRequestHandler):
    """One connection; every method is answered by ``handle_all``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: Any) -> None:
        """Nothing on standard error."""

    def handle_all(self) -> None:
        """Answer one request."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Every method."""
        self.handle_all()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def body(self, into: bytearray | None = None) -> bytes:
        """Read the request's body, as far as it comes; ``into`` gets it while it comes."""
        data, left = bytearray() if into is None else into, int(self.headers.get("Content-Length", 0))
        while left and (piece := self.rfile.read1(min(left, 4096))):
            data += piece
            left -= len(piece)
        if left:
            raise ConnectionResetError
        return bytes(data)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Send the answer."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle(self) -> None:
        """All requests of a connection; one that breaks is no error."""
        try:
            super().handle()
        except OSError:
            self.close_connection = True


@contextmanager
def running(server: Made) -> Iterator[Made]:
    """Let a server run until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
