"""Looking after a local registry: is everything as it should be, and what can go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exports.registry.base import Entry, NotFound
from exports.registry.contents import pickle_problem
from exports.registry.local import LocalRegistry
from exports.registry.release import parse_release
from quantize.artifact import RELEASE
from quantize.errors import InputError

GRACE = 24 * 3600.0  # seconds


@dataclass(frozen=True)
class Swept:
    """What a garbage collection removed: blobs, their bytes, and releases no tag says."""

    blobs: int
    bytes: int
    releases: int


def registry_problems(registry: LocalRegistry) -> list[str]:
    """Hash every blob that a release needs, once; everything that is wrong, by release and file. Empty: all is well."""
    problems: list[str] = []
    checked: dict[str, str | None] = {}
    for name in registry.names():
        for digest in registry.releases(name):
            where = f"{name}@{digest}"
            try:
                entries = _entries(registry, name, digest)
            except InputError as error:
                problems.append(str(error))
                continue
            for entry in entries:
                if entry.sha256 not in checked:
                    checked[entry.sha256] = _blob_problem(registry, entry)
                if checked[entry.sha256] is not None:
                    problems.append(f"{where}: {entry.name}: {checked[entry.sha256]}")
        problems += _tag_problems(registry, name)
    return problems


def _tag_problems(registry: LocalRegistry, name: str) -> Iterator[str]:
    try:
        tags = registry.tags(name)
    except InputError as error:
        yield f"{name}: a tag is damaged: {error}"
        return
    for tag, digest in tags.items():
        if digest not in registry.releases(name):
            yield f"{name}:{tag} says {digest}, which is no release of this name; publish it again"


def _blob_problem(registry: LocalRegistry, entry: Entry) -> str | None:
    blob = registry.blob(entry.sha256)
    if blob.is_symlink() or not blob.is_file():
        return f"{blob} is missing, or not an ordinary file"
    held = Entry(entry.name, entry.sha256, entry.size, entry.role, path=blob)
    try:
        for _ in held.chunks():
            pass
    except InputError:
        return f"{blob} is damaged: its bytes are not those of its name"
    return pickle_problem(blob, entry.name)


def collect_garbage(
    registry: LocalRegistry, *, grace: float = GRACE, delete_untagged: bool = False, dry_run: bool = False
) -> Swept:
    """Remove blobs that no release needs and that nobody has written or asked for within ``grace`` seconds.

    A running publisher's blobs are younger than that: asking whether the registry has one makes it young again. Should a grace
    of 0 take one away under its hands, the publisher is told when it puts its release, and nothing is half-published.

    Args:
        delete_untagged: also remove releases of which no tag speaks and that are older than ``grace``; they can then no longer
            be had by their digest.
        dry_run: only count.

    Raises:
        InputError: a release's manifest is damaged or missing. What it needs is then unknown, and nothing is removed.
    """
    if not (registry.directory / "registry.json").is_file():
        raise NotFound(f"{registry.directory} is no registry; name a directory that something was published to")
    limit = time.time() - grace
    with registry.locked(exclusive=True):
        dropped = _untagged(registry, limit) if delete_untagged else []
        needed: set[str] = set()
        for name in registry.names():
            for digest in registry.releases(name):
                if (name, digest) not in dropped:
                    needed.add(digest.removeprefix("sha256:"))
                    needed |= {entry.sha256 for entry in _entries(registry, name, digest)}
        blobs = [path for path in _blobs(registry) if path.name not in needed and path.stat().st_mtime <= limit]
        swept = Swept(len(blobs), sum(path.stat().st_size for path in blobs), len(dropped))
        if not dry_run:
            # Releases first: killed in between, a blob too many stays, and never one too few.
            for name, digest in dropped:
                (registry.directory / "names" / name / "_releases" / digest.removeprefix("sha256:")).unlink()
            for blob in blobs:
                blob.unlink()
    if not dry_run:
        registry.sweep_sessions()
    return swept


def _untagged(registry: LocalRegistry, limit: float) -> list[tuple[str, str]]:
    found = []
    for name in registry.names():
        tagged = set(registry.tags(name).values())
        folder = registry.directory / "names" / name / "_releases"
        old = [path for path in sorted(folder.iterdir()) if path.stat().st_mtime <= limit]
        found += [(name, digest) for path in old if (digest := f"sha256:{path.name}") not in tagged]
    return found


def _blobs(registry: LocalRegistry) -> Iterator[Path]:
    yield from sorted((registry.directory / "blobs" / "sha256").glob("*/*"))


def _entries(registry: LocalRegistry, name: str, digest: str) -> tuple[Entry, ...]:
    where = f"{name}@{digest}"
    return parse_release(registry.manifest(name, digest), f"{where}: {RELEASE}").entries
