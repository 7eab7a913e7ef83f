"""A proxy that drops connections, for tests of what happens then."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Forwards connections to ``127.0.0.1:port``; ``cuts`` says after how many bytes towards the server one is dropped.

    ``sent``: bytes that clients have sent so far. Each number in ``cuts`` is used for one connection, counted over all of them.
    """

    def __init__(self, port: int) -> None:
        self.target, self.sent, self.cuts = port, 0, list[int]()
        self.received, self.cuts_back = 0, list[int]()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                for source, sink, towards in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._forward, args=(source, sink, towards), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, towards: bool) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                with self._lock:
                    if towards:
                        self.sent += len(data)
                        cut = bool(self.cuts) and self.sent >= self.cuts[0] and bool(self.cuts.pop(0))
                    else:
                        self.received += len(data)
                        cut = bool(self.cuts_back) and self.received >= self.cuts_back[0] and bool(self.cuts_back.pop(0))
                sink.sendall(data)
                if cut:
                    break
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting_proxy(port: int) -> Iterator[Proxy]:
    """A proxy in front of a port of this machine."""
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
