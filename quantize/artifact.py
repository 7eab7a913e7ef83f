"""What an artifact directory says of itself: ``manifest.json``, its files' hashes, and beside it ``evaluation.json``.

The manifest is written at export and never again. It holds what the artifact is, how it came about and the sha256 of every
file, no dates and no absolute paths, so equal artifacts have equal manifests::

    {"schema": 1, "name": ..., "container": ..., "solver": {...}, "grid": ..., "quality": ..., "bits": ...,
     "bits_per_weight": ..., "size_bytes": ..., "base": {"name": ..., "license": ..., "sha256": ...}, "recipe": {...},
     "seed": ..., "versions": {...}, "files": {"model.safetensors": {"sha256": ..., "bytes": ...}}, "fingerprint": ...}

``fingerprint`` is the sha256 over the sorted names and hashes. Figures measured later go to ``evaluation.json``, which is not
one of the hashed files and names the fingerprint it belongs to: figures of other bytes are dropped when new ones are recorded.
Nor are the files that a published release has beside the artifact's (a card, a report), which its ``release.json`` lists.
No torch here: a gate, a registry and a verifier start in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from quantize.atomic import atomic_path
from quantize.errors import InputError

SCHEMA = 1
MANIFEST = "manifest.json"
EVALUATION = "evaluation.json"
RELEASE = "release.json"
UNHASHED = (MANIFEST, EVALUATION)
_NOTHING_MEASURED: dict[str, Any] = {"divergence": None, "tasks": {}, "speed": None}
_DESCRIBED = ("name", "container", "solver", "bits", "bits_per_weight", "size_bytes", "base", "recipe", "versions")
_PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".npy", ".pickle", ".pkl", ".pt", ".pt2", ".pth")
_OPCODES = frozenset(ord(opcode.code) for opcode in pickletools.opcodes)


def write_manifest(directory: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Hash every file of an artifact and write its ``manifest.json``; returns what was written.

    Args:
        directory: the artifact, complete; links are refused.
        description: everything but ``schema``, ``files`` and ``fingerprint``; JSON values.

    Raises:
        InputError: a file is a link or a pickle, or the disk refuses the file.
        ValueError: the description lacks a field, or has a value that JSON cannot hold.
    """
    lacking = [key for key in _DESCRIBED if key not in description]
    if lacking:
        raise ValueError(f"the description of {directory} lacks {', '.join(lacking)}")
    files = _hashed(directory)
    for name in files:
        if is_pickle(directory / name):
            raise InputError(f"{directory / name} is a pickle, which no artifact may hold; write it as safetensors")
    manifest = {"schema": SCHEMA, **description, "files": files, "fingerprint": _fingerprint(files)}
    _write(directory / MANIFEST, manifest)
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """The ``manifest.json`` of an artifact, its form checked; :func:`problems` checks the files.

    Raises:
        InputError: there is none, it is damaged, or of another schema.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(f"{directory} has no {MANIFEST}; export the artifact again with `python -m quantize`")
    manifest = _read(path)
    if manifest.get("schema") != SCHEMA or "steps" in manifest:
        found = "a run's" if "steps" in manifest else f"of schema {manifest.get('schema')!r}"
        raise InputError(f"{path} is {found}, not an artifact's of schema {SCHEMA}; name a folder below variants/")
    files = manifest.get("files")
    whole = isinstance(files, dict) and all(_is_record(record) for record in files.values())
    if not whole or not isinstance(manifest.get("fingerprint"), str):
        raise InputError(f"{path} is damaged (its files or fingerprint are malformed); export the artifact again")
    return manifest


def problems(directory: Path) -> list[str]:
    """Everything that is wrong with an artifact's files, one line each, in order; none where all is as it was exported.

    Looks for changed, missing and unlisted files, links and other things that are no files, names that lead outside the
    directory, pickles, and a fingerprint that is not that of the listed hashes.

    Raises:
        InputError: there is no readable manifest.
    """
    manifest = read_manifest(directory)
    files = manifest["files"]
    found = []
    if manifest["fingerprint"] != _fingerprint(files):
        found.append(f"{MANIFEST}: its fingerprint is not that of the files it lists")
    escaping = {name for name in files if not _is_inside(name)}
    found += [f"{name}: listed, but leads outside the artifact" for name in sorted(escaping)]
    odd = _odd(directory)
    found += [f"{name}: {what}" for name, what in odd.items()]
    present = _names(directory)
    for name in sorted((files.keys() - escaping - odd.keys()) | set(present)):
        path = directory / name
        if name not in files:
            found.append(f"{name}: not listed in {MANIFEST}")
        elif name not in present:
            found.append(f"{name}: missing")
        elif path.stat().st_size != files[name]["bytes"]:
            found.append(f"{name}: changed ({path.stat().st_size:,} bytes instead of {files[name]['bytes']:,})")
        elif _sha256(path) != files[name]["sha256"]:
            found.append(f"{name}: changed (other bytes of the same number)")
        if name in present and is_pickle(path):
            found.append(f"{name}: a pickle, which can run code when it is loaded")
    return found


def fingerprint(directory: Path) -> str:
    """Hex sha256 over the sorted (name, sha256) pairs of the files as they are now; any model directory has one.

    Raises:
        InputError: the directory does not exist, or holds a link.
    """
    return _fingerprint(_hashed(directory))


def read_evaluation(directory: Path) -> dict[str, Any] | None:
    """What was measured on an artifact, ``evaluation.json``; None where nothing was.

    Whether the figures are those of the present bytes is the caller's to ask: compare ``artifact_fingerprint``.

    Raises:
        InputError: the file is damaged.
    """
    path = directory / EVALUATION
    return _read(path) if path.exists() else None


def record_evaluation(directory: Path, figures: Mapping[str, Any], *, known: str | None = None) -> dict[str, Any]:
    """Add figures to an artifact's ``evaluation.json``, replacing those of the same name; returns all of them.

    Args:
        directory: the artifact.
        figures: JSON values, such as those of :func:`eval.perplexity.evaluate_artifact`.
        known: the artifact's fingerprint where the caller has just taken it; None: the files are hashed.

    Raises:
        InputError: the disk refuses the file.
    """
    current = known or fingerprint(directory)
    result = {**_NOTHING_MEASURED, **_earlier(directory, current), **figures, "artifact_fingerprint": current}
    _write(directory / EVALUATION, result)
    return result


def is_recorded(directory: Path, figures: Mapping[str, Any], current: str) -> bool:
    """Whether ``evaluation.json`` holds these figures of the artifact whose fingerprint is ``current``."""
    earlier = _earlier(directory, current)
    return bool(earlier) and all(key in earlier and earlier[key] == value for key, value in figures.items())


def _earlier(directory: Path, current: str) -> dict[str, Any]:
    """Figures recorded of the same bytes; a damaged file has none, and is written anew."""
    try:
        found = read_evaluation(directory) or {}
    except InputError:
        return {}
    return found if found.get("artifact_fingerprint") == current else {}


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by its suffix or its content: a binary pickle, or an archive that holds one."""
    if path.suffix.lower() in _PICKLES:
        return True
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(9)
    if head.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                return any(PurePosixPath(name).suffix.lower() in _PICKLES for name in archive.namelist())
        except (zipfile.BadZipFile, OSError):
            return False
    if len(head) < 3 or head[0] != 0x80 or not 2 <= head[1] <= 5 or head[2] not in _OPCODES:
        return False
    # The length of a safetensors header may look the same; what follows it does not.
    return not (head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8)


def _hashed(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file, by name."""
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory; give an artifact's directory")
    odd = _odd(directory)
    if odd:
        name, what = next(iter(odd.items()))
        raise InputError(f"{directory / name} is {what}; put a plain file there")
    return {
        name: {"sha256": _sha256(directory / name), "bytes": (directory / name).stat().st_size} for name in _names(directory)
    }


def companions(directory: Path) -> set[str]:
    """Names of what a release has beside the artifact's own files: ``release.json``, and what it lists with another role.

    That those are as they were published is :mod:`exports.verify`'s to check.
    """
    try:
        files = json.loads((directory / RELEASE).read_bytes())["files"]
        return {RELEASE, *(name for name, record in files.items() if record["role"] not in ("artifact", "manifest"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _names(directory: Path) -> list[str]:
    """Regular files below a directory, sorted; links are not followed, and what is not hashed is left out."""
    unhashed = {*UNHASHED, *companions(directory)}
    found = []
    for folder, _, files in os.walk(directory):
        paths = [Path(folder, name) for name in files]
        found += [path.relative_to(directory).as_posix() for path in paths if path.is_file() and not path.is_symlink()]
    return sorted(name for name in found if name not in unhashed)


def _odd(directory: Path) -> dict[str, str]:
    """What is neither a directory nor a plain file, by name."""
    found = {}
    for folder, folders, files in os.walk(directory):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink():
                found[path.relative_to(directory).as_posix()] = "a link"
            elif not path.is_dir() and not path.is_file():
                found[path.relative_to(directory).as_posix()] = "neither a file nor a directory"
    return dict(sorted(found.items()))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("sha256"), str) and isinstance(record.get("bytes"), int)


def _fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    pairs = [[name, files[name]["sha256"]] for name in sorted(files)]
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())}); make the artifact again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged (no JSON object but {type(value).__name__}); make the artifact again")
    return value


def _write(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
