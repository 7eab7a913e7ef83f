"""Publishing to and pulling from any registry, and checking what was pulled."""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

from exports.provenance import PROVENANCE
from exports.registry import connect
from exports.registry.base import Damaged, Entry, NotFound, Registry
from exports.registry.contents import directory_names, list_problems, pickle_problem
from exports.registry.names import Reference
from exports.registry.release import SUMS, Release, disagreements, parse_release
from quantize.artifact import MANIFEST, RELEASE
from quantize.atomic import disk_error, files_below
from quantize.errors import InputError

_LISTS = (SUMS, MANIFEST, PROVENANCE)  # what says of other files which they are
_ATTEMPTS = 3  # of pushing, where garbage collection takes files away meanwhile


def publish(registry: Registry, name: str, tag: str, release: Release) -> tuple[Reference, int]:
    """Publish a release under a name and let the tag say it; the full reference, and the bytes sent.

    Killed or cut off anywhere, the tag says what it said before, and the same call goes on with the files not yet sent.

    Raises:
        Conflict: somebody else moved the tag after this call began, to another release.
        Damaged: a file is not what the artifact's manifest says.
    """
    registry.check_tag(tag)
    before = registry.tags(name).get(tag)
    sent = 0
    for attempt in range(_ATTEMPTS):
        sent += registry.push(name, release.entries)
        try:
            digest = registry.put(name, release.manifest, release.entries)
            break
        except NotFound:
            if attempt == _ATTEMPTS - 1:
                raise
    registry.set_tag(name, tag, digest, before)
    return registry.reference(name, tag, digest), sent


def read_release(reference: Reference, registry: Registry | None = None) -> tuple[Registry, str, Release]:
    """The registry of a reference, the digest it stands for, and the release's list of files."""
    registry = registry or connect(reference.scheme, reference.location)
    digest = registry.resolve(reference)
    return registry, digest, parse_release(registry.manifest(reference.name, digest), str(reference))


def pull(reference: Reference, destination: Path) -> Release:
    """Bring a release's files, byte for byte, into the directory ``destination``, which appears whole or not at all.

    A destination that holds this very release already, unchanged, is left as it is.

    Raises:
        Damaged: a file is not what the release's list says, or is of a kind that is refused; all of them are named.
        InputError: ``destination`` holds something else, or the disk refuses.
    """
    registry, digest, release = read_release(reference)
    if os.path.lexists(destination) and not _is_empty_directory(destination):
        if _holds(destination, release):
            return release
        raise InputError(f"{destination} exists and holds something else; choose a new directory, or remove it")
    temporary = destination.with_name(f".{destination.name}.tmp-{os.getpid()}")
    try:
        _sweep(destination)
        temporary.mkdir(parents=True)
        _fetch_all(registry, reference, digest, release, temporary)
        for file in files_below(temporary):
            _flush(file)
        temporary.replace(destination)
        _flush(destination.parent)
    except OSError as error:
        raise disk_error(destination, error) or error from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return release


def _sweep(destination: Path) -> None:
    """Remove what killed pulls to the same destination, and an earlier one of this process, left behind."""
    for leftover in destination.parent.glob(f".{glob.escape(destination.name)}.tmp-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _fetch_all(registry: Registry, reference: Reference, digest: str, release: Release, folder: Path) -> None:
    problems: list[str] = []
    for entry in release.entries:
        target = folder / entry.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            registry.fetch(reference.name, digest, entry, target)
        except (Damaged, NotFound) as error:
            problems.append(str(error))
            continue
        if problem := pickle_problem(target, entry.name):
            problems.append(problem)
    if not problems:
        problems = disagreements(release, *(_bytes(folder / name) for name in _LISTS))
    if problems:
        raise Damaged(f"{reference} is refused: {'; '.join(problems)}")
    (folder / RELEASE).write_bytes(release.manifest)


def directory_problems(directory: Path) -> list[str]:
    """What is wrong with a pulled release's directory: changed, missing, unlisted or refused files; empty: nothing.

    Raises:
        InputError: no directory, or one without ``release.json``.
    """
    if not (directory / RELEASE).is_file():
        raise InputError(f"{directory} has no {RELEASE}; name the directory of a pulled release")
    try:
        names = directory_names(directory)
        release = parse_release((directory / RELEASE).read_bytes(), str(directory))
    except Damaged as error:
        return [str(error)]
    listed = {entry.name for entry in release.entries}
    problems = list_problems(names)
    problems += [f"{name}: not listed in {RELEASE}" for name in names if name not in listed and name != RELEASE]
    for entry in release.entries:
        path = directory / entry.name
        if entry.name not in names:
            problems.append(f"{entry.name}: missing")
        elif problem := changed(path, entry) or pickle_problem(path, entry.name):
            problems.append(problem)
    return problems or disagreements(release, *(_bytes(directory / name) for name in _LISTS))


def reference_problems(reference: Reference, scratch: Path) -> list[str]:
    """What is wrong with a release in a registry, every file of it read; ``scratch``: a directory for one file at a time.

    Raises:
        NotFound: there is no such release.
    """
    try:
        registry, digest, release = read_release(reference)
    except Damaged as error:
        return [str(error)]
    problems: list[str] = []
    kept: dict[str, bytes | None] = {}
    for entry in release.entries:
        target = scratch / "file"
        try:
            registry.fetch(reference.name, digest, entry, target)
            if problem := pickle_problem(target, entry.name):
                problems.append(problem)
        except (Damaged, NotFound) as error:
            problems.append(str(error))
        if entry.name in _LISTS:
            kept[entry.name] = _bytes(target)
        target.unlink(missing_ok=True)
    return problems or disagreements(release, *(kept.get(name) for name in _LISTS))


def changed(path: Path, entry: Entry) -> str | None:
    """How a file differs from its entry; None where it does not."""
    held = Entry(entry.name, entry.sha256, entry.size, entry.role, path=path)
    if path.stat().st_size != entry.size:
        return f"{entry.name}: {path.stat().st_size} bytes, not {entry.size}"
    try:
        for _ in held.chunks():
            pass
    except Damaged:
        return f"{entry.name}: changed, its sha256 is not {entry.sha256}"
    return None


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _holds(directory: Path, release: Release) -> bool:
    try:
        return (directory / RELEASE).read_bytes() == release.manifest and not directory_problems(directory)
    except (OSError, InputError):
        return False


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
