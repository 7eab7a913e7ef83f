"""What every registry is: files by name in a release, releases by digest, tags that move.

A registry module offers ``connect(scheme, location) -> Registry``. What is the same for all of them, publishing and pulling,
is in :mod:`exports.registry.transfer` and uses only what is declared here.

A release is published in three steps, each of which may be repeated: every file is pushed (:meth:`Registry.push`; what the
registry has is not sent again), the release's manifest is put (:meth:`Registry.put`, refused where a file is missing), and the
tag is moved (:meth:`Registry.set_tag`). Only the last one is seen by those who pull by tag, and it is atomic.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exports.registry.names import Reference, check_digest, check_name
from quantize.errors import InputError

CHUNK: Final = 2**20
MANIFEST_BYTES: Final = 16 * 2**20  # of a release's manifest, at most
ANY: Final = "any"  # for set_tag's `expected`: whatever the tag says now


class Damaged(InputError):
    """Content is not what its digest, list or format says: the message names every file."""


class Conflict(InputError):
    """Somebody else moved the tag meanwhile; nothing of theirs was changed."""


class GateFailed(InputError):
    """The artifact failed its gate; it was not published."""


class NotFound(InputError):
    """The registry has no such name, tag, release or file."""


@dataclass(frozen=True)
class Entry:
    """One file of a release: its name in it, the sha256 (hex) and size its bytes must have, and the bytes.

    They are in the file ``path``, or in ``data`` where they are few. ``role``: artifact, manifest, evaluation, recipe, report,
    card, license, sums or what else a release holds.
    """

    name: str
    sha256: str
    size: int
    role: str
    path: Path | None = None
    data: bytes | None = None

    @staticmethod
    def of_data(name: str, data: bytes, role: str) -> Entry:
        """An entry whose bytes are ``data``."""
        return Entry(name, hashlib.sha256(data).hexdigest(), len(data), role, data=data)

    def chunks(self) -> Iterator[bytes]:
        """The bytes, at most a MiB at a time, for sending them on.

        Raises:
            Damaged: after the last chunk, when they were not those that ``sha256`` and ``size`` say: drop what was sent.
        """
        digest, count = hashlib.sha256(), 0
        for chunk in self._read():
            digest.update(chunk)
            count += len(chunk)
            yield chunk
        self.check(digest.hexdigest(), count)

    def check(self, sha256: str, count: int) -> None:
        """Refuse bytes that are not this entry's.

        Raises:
            Damaged: ``sha256`` or ``count`` differ from the entry's.
        """
        if (sha256, count) != (self.sha256, self.size):
            raise Damaged(
                f"{self.path or self.name} is not the file that was listed: sha256 {sha256} and {count} bytes, "
                f"not {self.sha256} and {self.size}; make the artifact again"
            )

    def _read(self) -> Iterator[bytes]:
        if self.data is not None:
            yield self.data
            return
        assert self.path is not None
        with self.path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk


def check_expected(tag: str, expected: str | None, found: str | None) -> None:
    """For :meth:`Registry.set_tag`: refuse to move a ``NAME:TAG`` that says ``found``, not what the publisher has seen.

    Raises:
        Conflict: it says something else.
    """
    if expected not in (ANY, found):
        raise Conflict(
            f"{tag} was moved meanwhile: it says {found or 'nothing'}, not {expected or 'nothing'}; "
            "look at what was published, then publish again"
        )


class Registry(ABC):
    """A place that keeps releases. All digests are ``sha256:`` and 64 hex digits."""

    scheme: str
    location: str

    def reference(self, name: str, tag: str, digest: str | None = None) -> Reference:
        """The reference of a release in this registry."""
        return Reference(self.scheme, self.location, name, tag, digest)

    def resolve(self, reference: Reference) -> str:
        """The digest a reference stands for: its own, else its tag's.

        Raises:
            NotFound: the registry has no such name or tag; the message lists the tags there are.
        """
        if reference.digest is not None:
            return check_digest(reference.digest)
        tags = self.tags(reference.name)
        if reference.tag not in tags:
            there = f"its tags: {', '.join(sorted(tags)[:10])}" if tags else "it has no tags"
            raise NotFound(f"{reference} does not exist; {there}")
        return tags[reference.tag]

    def check_name(self, name: str) -> None:
        """Refuse a name that this registry cannot have, before anything is sent.

        Raises:
            InputError: it cannot.
        """
        check_name(name, self.scheme)

    def check_tag(self, tag: str) -> None:
        """Refuse a tag that this registry cannot have, before anything is sent; the general grammar has been checked.

        Raises:
            InputError: it cannot.
        """
        return

    @abstractmethod
    def names(self) -> list[str]:
        """The names that have releases, sorted."""

    @abstractmethod
    def tags(self, name: str) -> dict[str, str]:
        """The digest of every tag of a name; empty where the name is not there."""

    @abstractmethod
    def has(self, name: str, entry: Entry) -> bool:
        """Whether the file's bytes are there already, whole. A publisher that hears yes may count on them."""

    @abstractmethod
    def push(self, name: str, entries: Sequence[Entry]) -> int:
        """Bring files in, except those that are there; give the number of bytes sent. Repeating it goes on where it stopped.

        Every file is read and checked, whether it is sent or not. On return all are there for good.

        Raises:
            Damaged: a file is not what its entry says; it is not in the registry.
        """

    @abstractmethod
    def put(self, name: str, manifest: bytes, entries: Sequence[Entry]) -> str:
        """Make a release of files that are there; its digest. Putting the same one again changes nothing.

        Raises:
            NotFound: a file is missing: push again.
        """

    @abstractmethod
    def set_tag(self, name: str, tag: str, digest: str, expected: str | None = ANY) -> None:
        """Let a tag say ``digest``, atomically, if it says ``expected`` now (None: if it does not exist; ``ANY``: in any case).

        A tag that says ``digest`` already is left alone, whatever was expected.

        Raises:
            Conflict: the tag says something else.
            NotFound: there is no such release.
        """

    @abstractmethod
    def manifest(self, name: str, digest: str) -> bytes:
        """A release's manifest (``release.json``), of at most ``MANIFEST_BYTES``. Its content is not to be trusted yet.

        Raises:
            NotFound: there is no such release under this name.
            Damaged: the bytes are not those of the digest.
        """

    def path(self, name: str, entry: Entry) -> Path | None:
        """Where a file's bytes lie on this machine, not checked and only to be read; None where they have to be fetched."""
        return None

    @abstractmethod
    def fetch(self, name: str, digest: str, entry: Entry, target: Path) -> None:
        """Write one file of the release ``digest`` to ``target``, which does not exist; ``entry`` has no bytes.

        Raises:
            NotFound: the file is missing.
            Damaged: the bytes are not the entry's.
        """
