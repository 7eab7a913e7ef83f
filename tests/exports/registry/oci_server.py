"""A small OCI registry in memory: what the distribution specification 1.1 says of the calls that publishing and pulling use."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

from tests.exports.registry.serving import Connection, running


class Server(ThreadingHTTPServer):
    """``blobs`` by digest, ``manifests`` by (name, tag or digest), ``log`` of (method, path), ``token`` that is asked for."""

    daemon_threads = True

    def __init__(self, token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], bytes] = {}
        self.uploads: dict[str, bytearray] = {}
        self.log: list[tuple[str, str]] = []
        self.token = token
        self.compares = True  # whether If-Match is honoured
        self.before_put: Any = None


class Handler(Connection):
    """One connection."""

    server: Server

    def handle_all(self) -> None:
        """Answer one request."""
        self.server.log.append((self.command, self.path))
        path = self.path.partition("?")[0]
        if path == "/token":
            ok = self.headers.get("Authorization", "").startswith("Basic ")
            return self.answer(200 if ok else 401, json.dumps({"token": self.server.token}).encode())
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.body()
            realm = f"http://127.0.0.1:{self.server.server_port}/token"
            return self.answer(401, b"{}", {"WWW-Authenticate": f'Bearer realm="{realm}",service="test"'})
        if path == "/v2/_catalog":
            names = sorted({name for name, _ in self.server.manifests})
            return self.answer(200, json.dumps({"repositories": names}).encode())
        if match := re.fullmatch(r"/v2/(.+)/tags/list", path):
            tags = sorted(tag for name, tag in self.server.manifests if name == match[1] and ":" not in tag)
            return self.answer(200, json.dumps({"tags": tags}).encode())
        if match := re.fullmatch(r"/v2/(.+)/manifests/(.+)", path):
            return self.manifest(match[1], match[2])
        if match := re.fullmatch(r"/v2/(.+)/blobs/uploads/(.*)", path):
            return self.upload(match[1], match[2])
        match = re.fullmatch(r"/v2/(.+)/blobs/(.+)", path)
        blob = self.server.blobs.get(match[2]) if match else None
        if blob is None:
            return self.answer(404, b'{"errors": [{"code": "BLOB_UNKNOWN"}]}')
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            return self.answer(206, blob[int(start[1]) :])
        return self.answer(200, blob)

    def manifest(self, name: str, tag: str) -> None:
        """GET or PUT a manifest."""
        manifests = self.server.manifests
        if self.command == "PUT":
            data = self.body()
            if self.server.before_put:
                self.server.before_put(name, tag)
            held = manifests.get((name, tag))
            etag = f'"sha256:{hashlib.sha256(held).hexdigest()}"' if held else None
            match, none = self.headers.get("If-Match"), self.headers.get("If-None-Match")
            if self.server.compares and ((match and match != etag) or (none and held)):
                return self.answer(412, b"{}")
            if any(layer["digest"] not in self.server.blobs for layer in json.loads(data)["layers"]):
                return self.answer(400, b'{"errors": [{"code": "MANIFEST_BLOB_UNKNOWN"}]}')
            manifests[name, tag] = manifests[name, f"sha256:{hashlib.sha256(data).hexdigest()}"] = data
            return self.answer(201)
        found = manifests.get((name, tag))
        return self.answer(404, b"{}") if found is None else self.answer(200, found)

    def upload(self, name: str, key: str) -> None:
        """POST begins, PATCH goes on, GET tells how far it is, PUT ends."""
        place = f"/v2/{name}/blobs/uploads/"
        if self.command == "POST":
            self.body()
            key = str(len(self.server.uploads))
            self.server.uploads[key] = bytearray()
            return self.answer(202, headers={"Location": place + key})
        held = self.server.uploads.get(key)
        if held is None:
            return self.answer(404, b"{}")
        headers = {"Location": place + key}
        if self.command == "DELETE":
            del self.server.uploads[key]
            return self.answer(204)
        if self.command == "PATCH":
            if int(self.headers["Content-Range"].partition("-")[0]) != len(held):
                return self.answer(416, b"{}")
            self.body(held)
        elif self.command == "PUT":
            held += self.body()
            digest = self.path.partition("digest=")[2]
            if digest != f"sha256:{hashlib.sha256(held).hexdigest()}":
                return self.answer(400, b'{"errors": [{"code": "DIGEST_INVALID"}]}')
            self.server.blobs[digest] = bytes(self.server.uploads.pop(key))
            return self.answer(201, headers={"Location": "/"})
        headers["Range"] = f"0-{max(len(held) - 1, 0)}"
        return self.answer(204 if self.command == "GET" else 202, headers=headers)


@contextmanager
def oci_server(token: str | None = None) -> Iterator[Server]:
    """A server that runs until the block ends."""
    with running(Server(token)) as server:
        yield server
