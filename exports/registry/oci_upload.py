"""Sending one blob to an OCI registry in chunks, going on after a broken connection (distribution 1.1, "Pushing blobs")."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from urllib.parse import urljoin

from exports.registry.base import Damaged, Entry
from exports.registry.oci_client import ATTEMPTS, PAUSE, Client, Cut, Response
from quantize.errors import InputError

CHUNK_BYTES = 16 * 2**20
_RANGE = re.compile(r"(?:bytes=)?0-(\d+)")


class _Lost(Exception):
    """The server has dropped the upload: begin it anew."""


def upload(client: Client, begin: str, scope: str, entry: Entry, has: Callable[[str, Entry], bool], name: str) -> None:
    """Send a blob that is not there; on return the server has it and has checked its digest.

    A connection that breaks between chunks or in one goes on with what the server says it has. A server that drops an upload
    broken in the middle of a chunk (Docker's does) gets this blob from its start again.

    Args:
        client: the connection to the registry.
        begin: the URL that begins an upload.
        scope: of the token.
        entry: the blob.
        has: whether a repository has it: the answer to the last request may have been lost.
        name: the repository.

    Raises:
        Damaged: the file is not what its entry says; the upload is cancelled.
        InputError: the registry refuses it, or cannot be reached.
    """
    pause = PAUSE
    for attempt in range(ATTEMPTS):
        try:
            _Upload(client, begin, scope, entry).run()
            return
        except (_Lost, Cut) as error:
            if attempt == ATTEMPTS - 1:
                raise InputError(
                    f"sending {entry.name} to {client.host} broke off {ATTEMPTS} times ({error}); "
                    "the same command goes on with the files not yet there"
                ) from error
            time.sleep(pause)
            pause *= 2
        if has(name, entry):
            return


class _Upload:
    def __init__(self, client: Client, begin: str, scope: str, entry: Entry) -> None:
        self.client, self.scope, self.entry = client, scope, entry
        answer = client.ok(client.request("POST", begin, scope, body=b""), f"an upload of {entry.name}")
        self._follow(answer)

    def run(self) -> None:
        done = 0
        try:
            for chunk in _rechunk(self.entry.chunks(), CHUNK_BYTES):
                if done == 0 and len(chunk) == self.entry.size:
                    break  # small: it goes with the closing request
                self._send(chunk, done)
                done += len(chunk)
        except Damaged:
            self.client.request("DELETE", self.url, self.scope)
            raise
        rest = b"" if done else b"".join(self.entry.chunks())
        url = f"{self.url}{'&' if '?' in self.url else '?'}digest=sha256:{self.entry.sha256}"
        headers = {"Content-Type": "application/octet-stream"}
        answer = self.client.request("PUT", url, self.scope, body=rest, headers=headers, attempts=1)
        if answer.status == 404 or answer.status >= 500:
            raise _Lost(answer.message())
        if b"DIGEST_INVALID" in answer.body:
            raise _Lost("the server received other bytes than were sent")
        self.client.ok(answer, f"{self.entry.name} (sha256 {self.entry.sha256})")

    def _send(self, chunk: bytes, start: int) -> None:
        """Send the bytes from ``start`` on, as often as the server gets further."""
        offset = 0
        for _ in range(ATTEMPTS):
            first, last = start + offset, start + len(chunk) - 1
            headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{first}-{last}"}
            try:
                answer = self.client.request("PATCH", self.url, self.scope, body=chunk[offset:], headers=headers, attempts=1)
            except Cut:
                answer = None
            if answer is not None and answer.status != 416:
                if answer.status == 404 or answer.status >= 500:
                    raise _Lost(answer.message())
                self._follow(self.client.ok(answer, f"a chunk of {self.entry.name}"))
                return
            # 416: the server was still reading what came before the connection broke when it was last asked.
            time.sleep(PAUSE)
            offset = self._received() - start
            if not 0 <= offset <= len(chunk):
                raise _Lost(f"the server has {start + offset} bytes, of which {start} had been told")
            if offset == len(chunk):
                return
        raise _Lost("the connection breaks at every attempt")

    def _received(self) -> int:
        """How many bytes the server has of this upload, from its status."""
        answer = self.client.request("GET", self.url, self.scope)
        if answer.status != 204:
            raise _Lost(answer.message())
        found = _RANGE.fullmatch(answer.headers.get("Range", ""))
        self._follow(answer)
        # "0-0" is told both for one byte and for none; of these, none is the one that costs nothing to assume.
        return int(found[1]) + 1 if found and found[1] != "0" else 0

    def _follow(self, answer: Response) -> None:
        if location := answer.headers.get("Location"):
            self.url = urljoin(self.client.base, location)


def _rechunk(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) > size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)
