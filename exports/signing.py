"""Signed releases: a signature of SHA256SUMS beside it, made after publishing or before, and checked with a public key.

The signature's comment, which is signed too, names the digest that the release has without signatures. So what ``release.json``
says besides its list of files (whether the gate passed) is covered as well. A signature that minisign itself made of the file
covers the files alone.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from exports import minisign
from exports.registry import Registry
from exports.registry.base import Damaged, Entry, NotFound
from exports.registry.names import Reference
from exports.registry.release import SUMS, Release, manifest_bytes, parse_release
from exports.registry.transfer import directory_problems, pull, read_release
from quantize.artifact import RELEASE
from quantize.atomic import atomic_path
from quantize.errors import InputError

SIGNATURE = f"{SUMS}{minisign.SUFFIX}"
_COMMENT = re.compile(r"quantize release (sha256:[0-9a-f]{64})")
_LISTED = ("files", "kind", "schema")


def unsigned(release: Release) -> Release:
    """The same release without its signatures."""
    return _with(release, ())


def comment_of(release: Release) -> str:
    """What a signature of a release says, signed, about it."""
    return f"quantize release {unsigned(release).digest}"


def sign_release(release: Release, key: minisign.SecretKey) -> Release:
    """The same release with a signature, before it is published; its entries keep their bytes."""
    sums = next(entry for entry in release.entries if entry.name == SUMS)
    signature = minisign.sign(key, b"".join(sums.chunks()), comment_of(release))
    return _with(release, (Entry.of_data(SIGNATURE, signature, "signature"),))


def sign_directory(directory: Path, *, key: minisign.SecretKey | None = None, signature: bytes | None = None) -> Release:
    """Put a signature into the directory of a pulled release, in place of an earlier one; the release as it is now.

    Args:
        directory: it is verified first.
        key: signs; or
        signature: the signature file that minisign made of SHA256SUMS elsewhere.

    Raises:
        Damaged: the directory is not what its release.json says.
        InputError: there is no release.
    """
    problems = directory_problems(directory)
    if problems:
        raise Damaged(f"{directory} is not signed: {'; '.join(problems[:10])}")
    release = parse_release((directory / RELEASE).read_bytes(), str(directory))
    if signature is None:
        assert key is not None
        signature = minisign.sign(key, (directory / SUMS).read_bytes(), comment_of(release))
    signed = _with(release, (Entry.of_data(SIGNATURE, signature, "signature"),))
    for name, data in ((SIGNATURE, signature), (RELEASE, signed.manifest)):
        with atomic_path(directory / name) as temporary:
            temporary.write_bytes(data)
    return signed


def sign_published(
    reference: Reference, *, key: minisign.SecretKey | None = None, signature: bytes | None = None
) -> tuple[Reference, Release]:
    """Sign a release in a registry: it is pulled, signed, and published under the same tag. Its digest becomes another one.

    Raises:
        Damaged: a file is not what was published.
        Conflict: the tag speaks of another release by then.
    """
    registry, digest, _ = read_release(reference)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "release"
        pull(registry.reference(reference.name, reference.tag, digest), directory)
        release = sign_directory(directory, key=key, signature=signature)
        entries = [Entry(e.name, e.sha256, e.size, e.role, path=directory / e.name) for e in release.entries]
        registry.push(reference.name, entries)
        made = registry.put(reference.name, release.manifest, entries)
        registry.set_tag(reference.name, reference.tag, made, digest)
    return registry.reference(reference.name, reference.tag, made), release


def directory_signature_problems(directory: Path, key: minisign.PublicKey) -> list[str]:
    """Why a release's directory is not signed with this key; empty: it is. That its files are whole is not asked here."""
    if not (directory / RELEASE).is_file():
        raise InputError(f"{directory} has no {RELEASE}; only releases are signed")
    release = parse_release((directory / RELEASE).read_bytes(), str(directory))
    files = {name: directory / name for name in (SUMS, SIGNATURE)}
    return _problems(release, key, {name: path.read_bytes() for name, path in files.items() if path.is_file()})


def reference_signature_problems(reference: Reference, key: minisign.PublicKey) -> list[str]:
    """The same of a release in a registry."""
    registry, digest, release = read_release(reference)
    found = {}
    for entry in release.entries:
        if entry.name in (SUMS, SIGNATURE):
            try:
                found[entry.name] = _fetched(registry, reference.name, digest, entry)
            except (Damaged, NotFound) as error:
                return [str(error)]
    return _problems(release, key, found)


def _problems(release: Release, key: minisign.PublicKey, files: dict[str, bytes]) -> list[str]:
    if SIGNATURE not in files or SUMS not in files:
        return [f"{SIGNATURE}: missing; the release is not signed"]
    try:
        comment = minisign.check(key, files[SUMS], files[SIGNATURE], SIGNATURE)
    except Damaged as error:
        return [str(error)]
    named = _COMMENT.fullmatch(comment)
    if named and named[1] != unsigned(release).digest:
        return [f"{RELEASE}: changed after signing; what was signed is {named[1]}"]
    return []


def _fetched(registry: Registry, name: str, digest: str, entry: Entry) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        registry.fetch(name, digest, entry, Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def _with(release: Release, signatures: tuple[Entry, ...]) -> Release:
    entries = [entry for entry in release.entries if entry.role != "signature"]
    entries = sorted([*entries, *signatures], key=lambda entry: entry.name)
    facts = {key: value for key, value in release.facts.items() if key not in _LISTED}
    manifest = manifest_bytes(entries, facts)
    return Release(tuple(entries), manifest, parse_release(manifest, "the release").facts)
