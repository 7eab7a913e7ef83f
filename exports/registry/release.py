"""A release: an artifact's files, and what a stranger needs beside them to judge and to run it.

A release's directory is the artifact's own, so that its consumer loads it as it is, with more files beside them:

    release.json      every other file with role, sha256 and size; what was published, and whether its gate passed
    SHA256SUMS        the same hashes for ``sha256sum --check``, of every file but itself, its signatures and release.json
    README.md         the model card        evaluation.json   the measured figures       recipe.yaml   the resolved recipe
    report.*          the run's report      gate.json         the gate's checks, where there were limits

``release.json`` is canonical JSON (sorted keys, no date, no machine's paths): the same files make the same bytes, and their
sha256 is the release's digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exports.provenance import provenance_problems
from exports.registry.base import CHUNK, MANIFEST_BYTES, Damaged, Entry
from exports.registry.contents import check_list, directory_names, pickle_problem
from exports.registry.secrets import holds_secret, known_secrets
from quantize.artifact import EVALUATION, MANIFEST, RELEASE, companions, read_evaluation, read_manifest
from quantize.errors import InputError

SCHEMA = 1
KIND = "quantize release"
SUMS = "SHA256SUMS"
CARD = "README.md"
_TEXT_BYTES = 64 * 2**20  # files up to this size are searched for secrets, of larger ones the head
_ROLES = {MANIFEST: "manifest", EVALUATION: "evaluation"}
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Release:
    """A release ready to be published, or as a registry has it: its entries in order of name, its manifest's bytes and facts.

    ``facts``: what ``release.json`` says besides ``files``: ``schema``, ``kind``, ``name``, ``gate`` and more.
    """

    entries: tuple[Entry, ...]
    manifest: bytes
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """``sha256:`` and the hex digits of the manifest's hash."""
        return f"sha256:{hashlib.sha256(self.manifest).hexdigest()}"

    @property
    def size(self) -> int:
        """The size of all files."""
        return sum(entry.size for entry in self.entries)


def assemble(
    artifact: Path,
    extras: Mapping[str, tuple[str, bytes]],
    facts: Mapping[str, Any],
    sign: Callable[[bytes], Mapping[str, bytes]] | None = None,
) -> Release:
    """Put a release together: nothing is copied, and weights are not read where the artifact's manifest has their hashes.

    Args:
        artifact: the artifact's directory, as it was exported.
        extras: role and bytes of the files beside it, by name.
        facts: what ``release.json`` shall say: JSON values.
        sign: gets the bytes of SHA256SUMS and gives signature files, by name.

    Raises:
        Damaged: a name that is not allowed, a link, a pickle.
        InputError: no artifact's directory, figures of other bytes, or a file with one of the environment's secrets in it.
    """
    names = _artifact_names(artifact)
    check_list([*names, *extras, SUMS, RELEASE], str(artifact))
    problems = [problem for name in names if (problem := pickle_problem(artifact / name, name))]
    if problems:
        raise Damaged(f"{artifact}: {'; '.join(problems)}")
    listed = read_manifest(artifact)["files"]
    entries = [_entry(artifact / name, name, listed.get(name)) for name in names]
    entries += [Entry.of_data(name, data, role) for name, (role, data) in extras.items()]
    _refuse_secrets(entries)
    entries.sort(key=lambda entry: entry.name)
    sums = "".join(f"{entry.sha256}  {entry.name}\n" for entry in entries).encode()
    entries.append(Entry.of_data(SUMS, sums, "sums"))
    for name, data in (sign(sums) if sign else {}).items():
        entries.append(Entry.of_data(name, data, "signature"))
    entries.sort(key=lambda entry: entry.name)
    check_list([entry.name for entry in entries] + [RELEASE], str(artifact))
    manifest = manifest_bytes(entries, facts)
    if holds_secret(manifest):
        raise InputError(f"{RELEASE} would hold a secret of the environment; take it out of the recipe")
    return Release(tuple(entries), manifest, json.loads(manifest))


def manifest_bytes(entries: Sequence[Entry], facts: Mapping[str, Any]) -> bytes:
    """``release.json``: facts and files as canonical JSON, UTF-8, with a final newline."""
    files = {entry.name: {"role": entry.role, "sha256": entry.sha256, "bytes": entry.size} for entry in entries}
    value = {**facts, "schema": SCHEMA, "kind": KIND, "files": files}
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def parse_release(manifest: bytes, where: str) -> Release:
    """Read a ``release.json`` nobody has checked yet; the entries have no bytes.

    Raises:
        Damaged: it is no manifest of this kind, or lists what may not be in a release; tells ``where``.
    """
    if len(manifest) > MANIFEST_BYTES:
        raise Damaged(f"{where}: {RELEASE} has {len(manifest)} bytes; at most {MANIFEST_BYTES} are allowed")
    try:
        value = json.loads(manifest, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where}: {RELEASE} is not valid JSON ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise Damaged(f"{where}: {RELEASE} is not a release's manifest (its kind is not {KIND!r})")
    if value.get("schema") != SCHEMA:
        raise Damaged(f"{where}: {RELEASE} has schema {value.get('schema')!r}; this version reads {SCHEMA}")
    files = value.get("files")
    if not isinstance(files, dict) or not files:
        raise Damaged(f"{where}: {RELEASE} lists no files")
    check_list([*files, RELEASE], f"{where}: {RELEASE}")
    return Release(tuple(_parse_entry(name, files[name], where) for name in sorted(files)), manifest, value)


def disagreements(release: Release, sums: bytes | None, manifest: bytes | None, statement: bytes | None = None) -> list[str]:
    """Where a release's three lists of hashes differ: release.json, ``SHA256SUMS`` and the artifact's ``manifest.json``.

    Only SHA256SUMS may be signed, and only the manifest is what a gate judged: a release whose lists differ is none of ours.
    ``sums``, ``manifest`` and ``statement`` (its provenance) are the bytes of those files, None where they are missing.
    """
    listed = {entry.name: entry.sha256 for entry in release.entries}
    own = {entry.name for entry in release.entries if entry.role in ("sums", "signature")}
    try:
        lines = (sums or b"").decode("ascii").splitlines()
        summed = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
        files = json.loads(manifest or b"{}")["files"]
        artifact = {name: record["sha256"] for name, record in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{SUMS} or {MANIFEST} is missing or damaged"]
    problems = [f"{name}: {SUMS} and {RELEASE} differ" for name in sorted((listed.keys() - own) ^ summed.keys())]
    problems += [
        f"{name}: {SUMS} has another sha256" for name in sorted(summed) if listed.get(name, "") not in ("", summed[name])
    ]
    roles = {entry.name for entry in release.entries if entry.role == "artifact"}
    problems += [f"{name}: {MANIFEST} and {RELEASE} differ" for name in sorted(roles ^ artifact.keys())]
    if statement is not None and isinstance(files, dict):
        problems += provenance_problems(statement, json.loads(manifest or b"{}"))
    return problems + [f"{name}: {MANIFEST} has another sha256" for name in sorted(roles) if artifact.get(name) != listed[name]]


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        # Two readers could each believe another one of them.
        raise ValueError("a key appears twice")
    return value


def _parse_entry(name: str, record: Any, where: str) -> Entry:
    if isinstance(record, dict):
        sha256, size, role = record.get("sha256"), record.get("bytes"), record.get("role")
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if isinstance(sha256, str) and _HEX.fullmatch(sha256) and whole and isinstance(role, str):
            assert isinstance(size, int)
            return Entry(name, sha256, size, role)
    raise Damaged(f"{where}: {RELEASE} lists {name!r} without a sha256 of 64 hex digits, a size in bytes and a role")


def _artifact_names(artifact: Path) -> list[str]:
    """The artifact's own files, its manifest and its figures; all that is listed, and nothing else."""
    manifest, evaluation = read_manifest(artifact), read_evaluation(artifact)
    if evaluation is not None and evaluation.get("artifact_fingerprint") != manifest["fingerprint"]:
        raise InputError(f"{artifact / EVALUATION} is of other bytes than {MANIFEST}; evaluate again, or delete it")
    listed = {*manifest["files"], MANIFEST, *([EVALUATION] if evaluation is not None else [])}
    found = set(directory_names(artifact)) - (companions(artifact) - listed)
    problems = [f"{name!r}: missing" for name in sorted(listed - found)]
    problems += [f"{name!r}: not listed in {MANIFEST}" for name in sorted(found - listed)]
    if problems:
        raise Damaged(f"{artifact}: {'; '.join(problems[:10])}; export the artifact again")
    return sorted(found)


def _entry(path: Path, name: str, listed: Mapping[str, Any] | None) -> Entry:
    if listed is not None:
        return Entry(name, listed["sha256"], listed["bytes"], "artifact", path=path)
    return replace(Entry.of_data(name, path.read_bytes(), _ROLES[name]), path=path, data=None)


def _refuse_secrets(entries: Sequence[Entry]) -> None:
    secrets = known_secrets()
    if not secrets:
        return
    for entry in entries:
        if entry.data is not None:
            data = entry.data
        else:
            assert entry.path is not None
            with entry.path.open("rb") as stream:
                # Text is searched whole; a file of weights has text only in its head.
                data = stream.read(_TEXT_BYTES if entry.size <= _TEXT_BYTES else CHUNK)
        if holds_secret(data, secrets):
            raise InputError(f"{entry.name} holds the value of one of the environment's secrets; take it out before publishing")
