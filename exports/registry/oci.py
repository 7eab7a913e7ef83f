"""Releases in an OCI registry (OCI distribution specification 1.1): any that container images are pushed to.

A release is an OCI artifact (``oci_format.py``). It has a tag of its own, ``release-HEX`` with its digest, by which it is found
and that keeps it from the registry's garbage collection; ``latest`` and others are further tags of the same manifest.

What the specification cannot do: a tag is not compared before it is moved. Publishers on one machine take turns by a lock; a
tag that moved is seen before and after; servers that know ``If-Match`` get it. Two publishers on different machines, within the
time of one request, may both believe that they have won: then the tag says whole what the later one published.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from exports.registry import oci_format
from exports.registry.base import ANY, MANIFEST_BYTES, Conflict, Damaged, Entry, NotFound, Registry, check_expected
from exports.registry.locking import exclusive
from exports.registry.names import Reference, check_digest, check_name
from exports.registry.oci_client import ATTEMPTS, Client, Cut, Response
from exports.registry.oci_upload import upload
from quantize.errors import InputError

_OWN = "release-"
_NEXT = re.compile(r'<([^>]+)>\s*;\s*rel="?next"?')
_TYPES = f"{oci_format.MANIFEST_TYPE}, application/vnd.oci.image.index.v1+json"


def connect(scheme: str, location: str) -> OciRegistry:
    """The registry at ``HOST[:PORT]``; nothing is sent yet.

    Raises:
        InputError: it is no host.
    """
    return OciRegistry(scheme, location)


class OciRegistry(Registry):
    """Releases under ``HOST/NAME``."""

    def __init__(self, scheme: str, location: str) -> None:
        self.scheme, self.location, self.client = scheme, location, Client(location)

    # Reading.

    def names(self) -> list[str]:
        """The repositories the server lists (many list none to strangers) that have a release."""
        found: list[str] = []
        url = "/v2/_catalog?n=1000"
        while url:
            answer = self.client.ok(self._request("GET", url, "registry:catalog:*"), "list of names")
            found += json.loads(answer.body).get("repositories") or []
            url = _next(answer)
        return sorted(name for name in found if any(tag.startswith(_OWN) for tag in self._all_tags(name)))

    def tags(self, name: str) -> dict[str, str]:
        """The digest of every tag that speaks of a release; tags of images of other kinds are not told."""
        found = {}
        for tag in self._all_tags(name):
            if not tag.startswith(_OWN):
                try:
                    image = self._image(name, tag)
                    found[tag] = oci_format.release_digest(image, tag)
                except (NotFound, Damaged):
                    continue
        return found

    def resolve(self, reference: Reference) -> str:
        """The release a reference stands for; its digest may also be that of the image manifest, as other tools print it."""
        name, digest = reference.name, reference.digest
        if digest is not None:
            # By the release's own tag first: Docker's registry fails with 500 where a digest is a blob's and no manifest's.
            for key in (f"{_OWN}{check_digest(digest).removeprefix('sha256:')}", digest):
                with contextlib.suppress(NotFound):
                    return oci_format.release_digest(self._image(name, key), str(reference))
            return digest
        try:
            image = self._image(name, reference.tag)
        except NotFound:
            tags = ", ".join(tag for tag in self._all_tags(name) if not tag.startswith(_OWN))
            raise NotFound(f"{reference} does not exist; {f'its tags: {tags[:300]}' if tags else 'it has no tags'}") from None
        return oci_format.release_digest(image, str(reference))

    def manifest(self, name: str, digest: str) -> bytes:
        """A release's ``release.json``, whose hash has been checked."""
        received = bytearray()

        def take(piece: bytes) -> None:
            received.extend(piece)
            if len(received) > MANIFEST_BYTES:
                raise Damaged(f"release.json of {name}@{digest} has more than {MANIFEST_BYTES} bytes")

        for left in range(ATTEMPTS - 1, -1, -1):
            received.clear()
            try:
                answer = self.client.request("GET", self._blob(name, check_digest(digest)), self._scope(name), take=take)
                self.client.ok(answer, f"release {digest} of {name}")
                break
            except Cut as cut:
                if not left:
                    raise _unreachable(cut) from cut
        if f"sha256:{hashlib.sha256(received).hexdigest()}" != digest:
            raise Damaged(f"release.json of {name}@{digest} is damaged: {self.location} sent other bytes; publish it again")
        return bytes(received)

    def fetch(self, name: str, digest: str, entry: Entry, target: Path) -> None:
        """Write one file to ``target``; a broken download goes on where it stopped."""
        what = f"{entry.name} of {name}@{digest}"
        url = self._blob(name, f"sha256:{entry.sha256}")
        with target.open("xb") as stream:

            def take(piece: bytes) -> None:
                if stream.tell() + len(piece) > entry.size:
                    raise Damaged(f"{entry.name} is damaged: {self.location} sends more than its {entry.size} bytes")
                stream.write(piece)

            left, problem = ATTEMPTS, ""
            while True:
                begun = stream.tell()
                headers = {"Range": f"bytes={begun}-"} if begun else {}
                try:
                    answer = self.client.request("GET", url, self._scope(name), headers=headers, take=take)
                    self.client.ok(answer, what)
                    if not begun or answer.status == 206:
                        break
                    stream.seek(0)  # a server that cannot go on in the middle
                    stream.truncate()
                    left -= 1
                except Cut as cut:
                    # Whoever brings some bytes each time may go on; one that brings none is given up.
                    left = left - 1 if stream.tell() == begun else min(left, ATTEMPTS - 1)
                    problem = f"({cut})"
                except InputError:
                    target.unlink()
                    raise
                if left <= 0:
                    target.unlink()
                    raise InputError(f"{what}: the connection broke {problem}; the same command may succeed later")
        _check(entry, target, self.location)

    # Publishing.

    def has(self, name: str, entry: Entry) -> bool:
        """Whether the repository has the blob, in its full size."""
        answer = self._request("HEAD", self._blob(name, f"sha256:{entry.sha256}"), self._scope(name))
        return answer.status == 200 and answer.headers.get("Content-Length") in (None, str(entry.size))

    def push(self, name: str, entries: Sequence[Entry]) -> int:
        """Send the blobs that the repository lacks, in chunks; bytes sent."""
        sent, known = 0, set[str]()
        for entry in entries:
            if entry.sha256 in known or self.has(name, entry):
                for _ in entry.chunks():
                    pass
            else:
                upload(self.client, f"/v2/{check_name(name)}/blobs/uploads/", self._scope(name), entry, self.has, name)
                sent += entry.size
            known.add(entry.sha256)
        return sent

    def put(self, name: str, manifest: bytes, entries: Sequence[Entry]) -> str:
        """Put the image manifest under the release's own tag; servers refuse it where a blob is missing."""
        image, config = oci_format.manifest(manifest, entries)
        listed = Entry.of_data("release.json", manifest, "manifest")
        missing = [entry.name for entry in entries if not self.has(name, entry)]
        if missing:
            raise NotFound(f"{self.location} lacks {', '.join(missing[:10])} of {name}; publish it again")
        self.push(name, [listed, config])
        self._put_image(name, f"{_OWN}{listed.sha256}", image)
        return f"sha256:{listed.sha256}"

    def set_tag(self, name: str, tag: str, digest: str, expected: str | None = ANY) -> None:
        """Let a tag say the release; see the module about what can be compared."""
        image = self._image(name, f"{_OWN}{check_digest(digest).removeprefix('sha256:')}")
        with exclusive("oci", self.location, name):
            try:
                before = self._image(name, tag)
                found = oci_format.release_digest(before, tag)
            except NotFound:
                before, found = None, None
            except Damaged:
                raise Conflict(f"{name}:{tag} at {self.location} is an image of another kind; choose another tag") from None
            if found == digest:
                return
            check_expected(f"{name}:{tag}", expected, found)
            condition = {"If-Match": f'"sha256:{hashlib.sha256(before).hexdigest()}"'} if before else {"If-None-Match": "*"}
            self._put_image(name, tag, image, {} if expected == ANY else condition)
            if self._image(name, tag) != image:
                raise Conflict(f"{name}:{tag} was moved by somebody else at the same time; look at it, then publish again")

    # Requests.

    def _put_image(self, name: str, tag: str, image: bytes, condition: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": oci_format.MANIFEST_TYPE, **(condition or {})}
        url = f"/v2/{check_name(name)}/manifests/{quote(tag)}"
        answer = self._request("PUT", url, self._scope(name), body=image, headers=headers)
        if answer.status == 412:
            raise Conflict(f"{name}:{tag} was moved by somebody else at the same time; look at it, then publish again")
        if answer.status in (400, 404) and b"BLOB_UNKNOWN" in answer.body:
            raise NotFound(f"{self.location} lacks a file of {name} ({answer.message()}); publish it again")
        self.client.ok(answer, f"manifest of {name}:{tag}")

    def _image(self, name: str, tag: str) -> bytes:
        url = f"/v2/{check_name(name)}/manifests/{quote(tag, safe=':')}"
        answer = self.client.ok(self._request("GET", url, self._scope(name), headers={"Accept": _TYPES}), f"{name}:{tag}")
        if tag.startswith("sha256:") and f"sha256:{hashlib.sha256(answer.body).hexdigest()}" != tag:
            raise Damaged(f"{name}@{tag} is damaged: {self.location} sent another manifest")
        return answer.body

    def _all_tags(self, name: str) -> list[str]:
        found: list[str] = []
        url = f"/v2/{check_name(name)}/tags/list?n=1000"
        while url:
            answer = self._request("GET", url, self._scope(name))
            if answer.status == 404:
                break
            found += json.loads(self.client.ok(answer, f"tags of {name}").body).get("tags") or []
            url = _next(answer)
        return sorted(found)

    def _blob(self, name: str, digest: str) -> str:
        return f"/v2/{check_name(name)}/blobs/{digest}"

    def _scope(self, name: str) -> str:
        return f"repository:{name}:pull,push"

    def _request(self, *arguments: object, **options: object) -> Response:
        try:
            return self.client.request(*arguments, **options)  # type: ignore[arg-type]
        except Cut as cut:
            raise _unreachable(cut) from cut


def _unreachable(cut: Cut) -> InputError:
    return InputError(f"the registry cannot be reached ({cut}); the same command goes on where this one stopped")


def _next(answer: Response) -> str:
    found = _NEXT.search(answer.headers.get("Link", ""))
    return found[1] if found else ""


def _check(entry: Entry, target: Path, where: str) -> None:
    held = Entry(entry.name, entry.sha256, entry.size, entry.role, path=target)
    try:
        for _ in held.chunks():
            pass
    except Damaged:
        target.unlink()
        raise Damaged(
            f"{entry.name} is damaged: what {where} sent is not its {entry.size} bytes, sha256 {entry.sha256}"
        ) from None
