"""The registry in a directory: content-addressed files, releases, tags.

::

    DIR/registry.json                       what this directory is
        blobs/sha256/ab/ab12...             every file once, by the hash of its bytes; whole from the start, never changed
        names/NAME/_releases/HEX            this name has the release whose release.json is the blob HEX
        names/NAME/_tags/TAG                the digest the tag says
        tmp/ID/                             what a running publisher has not finished; ID/lock is locked while it lives
        lock                                held shared by publishers, briefly; exclusive for tags and garbage collection

A publisher killed at any moment leaves finished blobs, which the next one finds, and a folder in ``tmp``, which it removes. The
locks are ``flock``'s, which the system takes back from the dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from exports.registry.base import ANY, MANIFEST_BYTES, Conflict, Damaged, Entry, NotFound, Registry
from exports.registry.copying import copy_hashed
from exports.registry.names import check_digest, check_name, check_tag
from quantize.atomic import atomic_path, disk_error
from quantize.errors import InputError

MARK = '{"kind": "quantize registry", "schema": 1}\n'
_FLUSHED_AT_ONCE = 4  # files copied that wait for the disk


def connect(scheme: str, location: str) -> LocalRegistry:
    """The registry in the directory ``location``; it is made when something is first pushed into it.

    Raises:
        InputError: there is something else.
    """
    return LocalRegistry(scheme, Path(location))


class LocalRegistry(Registry):
    """A registry in a directory of this machine, or of a file system that several share (``flock`` must work there)."""

    def __init__(self, scheme: str, directory: Path) -> None:
        self.scheme, self.location, self.directory = scheme, str(directory), directory
        if directory.exists() and not directory.is_dir():
            raise InputError(f"registry {directory} is a file; name a directory, such as artifacts/registry")
        mark = directory / "registry.json"
        if mark.is_file():
            if mark.read_text(encoding="utf-8", errors="replace") != MARK:
                raise InputError(
                    f"registry {directory}: registry.json is of another version, or damaged; use another directory"
                )
        elif directory.is_dir() and any(each.name not in ("lock", ".registry.json.tmp") for each in directory.iterdir()):
            raise InputError(f"{directory} is no registry and not empty; name an empty or a new directory")

    # Reading: everything read is renamed into place, so no lock is needed.

    def names(self) -> list[str]:
        """The names that have releases, sorted."""
        root = self.directory / "names"
        return sorted(path.parent.relative_to(root).as_posix() for path in root.rglob("_releases") if any(path.iterdir()))

    def tags(self, name: str) -> dict[str, str]:
        """The digest of every tag of a name."""
        folder = self._name(name) / "_tags"
        found = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if not path.name.startswith("."):
                found[path.name] = check_digest(path.read_text(encoding="ascii", errors="replace").strip())
        return found

    def releases(self, name: str) -> list[str]:
        """The digests of all releases of a name, tagged or not, sorted."""
        folder = self._name(name) / "_releases"
        return sorted(f"sha256:{path.name}" for path in folder.iterdir()) if folder.is_dir() else []

    def manifest(self, name: str, digest: str) -> bytes:
        """A release's ``release.json``, whose hash has been checked."""
        if not (self._name(name) / "_releases" / check_digest(digest).removeprefix("sha256:")).is_file():
            raise NotFound(
                f"{self.directory} has no release {digest} of {name}; it has {', '.join(self.releases(name)) or 'none'}"
            )
        blob = self.blob(digest)
        with _found(blob, f"{name}@{digest}"), blob.open("rb") as stream:
            manifest = stream.read(MANIFEST_BYTES + 1)
        entry = Entry.of_data("release.json", manifest, "manifest")
        if f"sha256:{entry.sha256}" != digest:
            raise Damaged(f"release.json of {name}@{digest} is damaged: {blob} has sha256 {entry.sha256}; publish it again")
        return manifest

    def fetch(self, name: str, digest: str, entry: Entry, target: Path) -> None:
        """Write one file to ``target``."""
        blob = self.blob(entry.sha256)
        with _found(blob, f"{entry.name} of {name}@{digest}"):
            sha256, size = copy_hashed(blob, target)
        if (sha256, size) != (entry.sha256, entry.size):
            target.unlink()
            raise Damaged(
                f"{entry.name} is damaged: {blob} has {size} bytes, sha256 {sha256}, not {entry.size}, {entry.sha256}; "
                "delete that blob and publish again"
            )

    def path(self, name: str, entry: Entry) -> Path | None:
        """The blob, where it is there."""
        blob = self.blob(entry.sha256)
        return blob if blob.is_file() else None

    def blob(self, digest: str) -> Path:
        """The path of a blob, there or not."""
        digest = digest.removeprefix("sha256:")
        return self.directory / "blobs" / "sha256" / digest[:2] / digest

    def _name(self, name: str) -> Path:
        return self.directory / "names" / check_name(name)

    # Publishing.

    def has(self, name: str, entry: Entry) -> bool:
        """Whether the blob is there; from now on garbage collection counts it as just written."""
        blob = self.blob(entry.sha256)
        if not self.directory.is_dir():
            return False
        with self.locked():
            try:
                if blob.stat().st_size != entry.size:
                    return False
                os.utime(blob)
            except FileNotFoundError:
                return False
        return True

    def push(self, name: str, entries: Sequence[Entry]) -> int:
        """Copy in what is missing: each file whole, flushed and renamed before it counts as there; bytes written."""
        check_name(name)
        try:
            self._prepare()
            with self._session() as session, ThreadPoolExecutor(1) as disk:
                return self._push(name, entries, session, disk)
        except OSError as error:
            raise disk_error(self.directory, error) or error from error

    def _push(self, name: str, entries: Sequence[Entry], session: Path, disk: ThreadPoolExecutor) -> int:
        written, waiting, known = 0, list[Future[None]](), set[str]()
        for entry in entries:
            if entry.sha256 in known or self.has(name, entry):
                for _ in entry.chunks():
                    pass
                continue
            temporary = session / entry.sha256
            if entry.path is not None:
                entry.check(*copy_hashed(entry.path, temporary))
            else:
                temporary.write_bytes(b"".join(entry.chunks()))
            known.add(entry.sha256)
            written += entry.size
            # The disk's work goes on beside the next file's copying; few at a time, so that a kill costs little.
            waiting.append(disk.submit(self._settle, temporary, self.blob(entry.sha256)))
            if len(waiting) >= _FLUSHED_AT_ONCE:
                waiting.pop(0).result()
        for future in waiting:
            future.result()
        return written

    def _settle(self, temporary: Path, blob: Path) -> None:
        temporary.chmod(0o444)
        _flush(temporary)
        if not blob.parent.is_dir():
            blob.parent.mkdir(parents=True, exist_ok=True)
            _flush(blob.parent.parent)
        temporary.replace(blob)
        _flush(blob.parent)

    def put(self, name: str, manifest: bytes, entries: Sequence[Entry]) -> str:
        """Record a release whose files are all there."""
        listed = Entry.of_data("release.json", manifest, "manifest")
        self.push(name, [listed])
        with self.locked():
            missing = [e.name for e in [*entries, listed] if not self.blob(e.sha256).is_file()]
            if missing:
                raise NotFound(f"{self.directory} lacks {', '.join(missing)} of {name}; publish it again")
            marker = self._name(name) / "_releases" / listed.sha256
            with _telling(marker):
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
                _flush(marker.parent)
        return f"sha256:{listed.sha256}"

    def set_tag(self, name: str, tag: str, digest: str, expected: str | None = ANY) -> None:
        """Move a tag under the registry's exclusive lock: one publisher after the other, each sees what the last one wrote."""
        check_tag(tag)
        if digest not in self.releases(name):
            raise NotFound(f"{self.directory} has no release {digest} of {name}; publish it first")
        with self.locked(exclusive=True):
            now = self.tags(name).get(tag)
            if now == digest:
                return
            if expected not in (ANY, now):
                raise Conflict(
                    f"{self.reference(name, tag)} was moved by somebody else: it says {now or 'nothing'}, "
                    f"not {expected or 'nothing'} as before; look at what they published, then publish again"
                )
            with atomic_path(self._name(name) / "_tags" / tag) as temporary:
                temporary.write_text(f"{digest}\n", encoding="ascii")

    def remove_tag(self, name: str, tag: str) -> None:
        """Take a tag away; the release stays, and can be had by its digest.

        Raises:
            NotFound: there is no such tag.
        """
        with self.locked(exclusive=True):
            if tag not in self.tags(name):
                raise NotFound(f"{self.reference(name, check_tag(tag))} does not exist")
            (self._name(name) / "_tags" / tag).unlink()

    @contextlib.contextmanager
    def locked(self, exclusive: bool = False) -> Iterator[None]:
        """Hold the registry's lock: many at once, or one alone."""
        with (self.directory / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield

    def _prepare(self) -> None:
        mark = self.directory / "registry.json"
        if not mark.is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            with self.locked(exclusive=True):
                if not mark.is_file():
                    temporary = self.directory / ".registry.json.tmp"
                    temporary.write_text(MARK, encoding="ascii")
                    _flush(temporary)
                    temporary.replace(mark)
                    _flush(self.directory)

    @contextlib.contextmanager
    def _session(self) -> Iterator[Path]:
        """A folder for unfinished files, locked while this process lives; those of the dead are removed first."""
        self.sweep_sessions()
        with contextlib.ExitStack() as stack:
            with self.locked():
                session = self.directory / "tmp" / uuid.uuid4().hex
                session.mkdir(parents=True)
                lock = stack.enter_context((session / "lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            stack.callback(shutil.rmtree, session, ignore_errors=True)
            yield session

    def sweep_sessions(self) -> None:
        """Remove what killed publishers left unfinished."""
        with self.locked(exclusive=True):
            for session in (self.directory / "tmp").glob("*"):
                try:
                    with (session / "lock").open() as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                except OSError:
                    pass  # killed before it had a lock; sessions begin under the shared lock, so none is beginning now
                shutil.rmtree(session, ignore_errors=True)


@contextlib.contextmanager
def _found(blob: Path, what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if error.filename is not None and Path(error.filename) == blob:
            raise NotFound(f"{what} is missing: {blob} does not exist; publish it again") from error
        raise


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) or error from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
