"""What may be in a release: names that stay below its directory, ordinary files, no pickles.

A pickle runs code when it is read, so it is refused by its name and by its first bytes, whatever it is called. Everything else
of the list concerns names: a release is unpacked on other people's machines, whose file systems may fold upper and lower case,
forbid characters, or follow links.
"""

from __future__ import annotations

import pickletools
import re
import stat
import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exports.registry.base import Damaged
from quantize.artifact import is_pickle
from quantize.errors import InputError

MOST_FILES = 10_000
_MOST_CHARACTERS = 240  # of a whole name
_PART = re.compile(r"[A-Za-z0-9_+=@(),\[\] .-]+")
_RESERVED = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?")  # device names on Windows
_PICKLES = re.compile(r"(?i).*\.(?:bin|pkl|pickle|pk|p|pt|pt2|pth|ckpt|joblib|dill|npy|npz|mar|t7)")
_ARCHIVE_HEADS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd")
_WORTH_PARSING = 2**20  # bytes of a file that are searched for a pickle without a header
_GLOBALS = {"GLOBAL", "INST", "STACK_GLOBAL"}
_CALLS = {"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"}


def name_problem(name: Any) -> str | None:
    """Why a file's name is not allowed in a release; None where it is.

    Allowed are relative POSIX paths of plain ASCII parts, none of them hidden, empty, ``.`` or ``..``.
    """
    if not isinstance(name, str) or not name:
        return f"{name!r}: a name is a text that is not empty"
    shown = repr(name[:_MOST_CHARACTERS])
    if len(name) > _MOST_CHARACTERS:
        return f"{shown}: a name has at most {_MOST_CHARACTERS} characters"
    if name.startswith(("/", "~")) or "\\" in name or re.match(r"[A-Za-z]:", name):
        return f"{shown}: a name is relative, with '/' between its parts"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"{shown}: a name stays below its directory; no empty part, '.' or '..'"
        if not _PART.fullmatch(part):
            return f"{shown}: a name is of plain letters, digits, spaces and _+=@(),[].-"
        if part.startswith(".") or part != part.strip() or part.endswith("."):
            return f"{shown}: no part of a name is hidden, ends in '.', or has spaces around it"
        if _RESERVED.fullmatch(part):
            return f"{shown}: a device's name on some systems"
    return None


def list_problems(names: Iterable[Any]) -> list[str]:
    """Everything that is wrong with a list of names: single ones, doubles, doubles after folding case, a file as a folder."""
    names = list(names)
    if len(names) > MOST_FILES:
        return [f"{len(names)} files; a release has at most {MOST_FILES}"]
    problems = [problem for name in names if (problem := name_problem(name))]
    if problems:
        return problems
    folded: dict[str, str] = {}
    for name in names:
        other = folded.get(_fold(name))
        folded[_fold(name)] = name
        if other is not None:
            doubled = f"{name!r} and {other!r}: the same name where case is folded"
            problems.append(f"{name!r}: twice" if other == name else doubled)
    for name in names:
        folders = [_fold(name[:index]) for index, letter in enumerate(name) if letter == "/"]
        files = [folded[folder] for folder in folders if folder in folded]
        problems += [f"{name!r}: {file!r} is a file and cannot be a folder as well" for file in files]
    return problems


def _fold(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def check_list(names: Iterable[Any], where: str) -> None:
    """Refuse a list of names.

    Raises:
        Damaged: tells ``where`` and every problem, up to ten.
    """
    problems = list_problems(names)
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise Damaged(f"{where}: {'; '.join(problems[:10])}{more}")


def pickle_problem(path: Path, name: str | None = None) -> str | None:
    """Why a file counts as a pickle or hides one; None where it does not.

    By name (``.pkl``, ``.pt``, ``.bin`` ...); by content: the header of protocols 2 to 5, an archive (PyTorch's
    format is a zip file with a pickle inside, and no other archive belongs into an artifact), or, in the older protocols
    without a header, text that is a program of pickle's machine from first to last instruction and imports something.
    """
    name = path.name if name is None else name
    if _PICKLES.fullmatch(name.rpartition("/")[2]):
        return f"{name}: a pickle by its name; only safetensors and GGUF hold tensors here"
    with path.open("rb") as stream:
        head = stream.read(16)
        if head.startswith(b"PK\x03\x04") or (head.startswith(b"PK") and zipfile.is_zipfile(path)):
            return f"{name}: a zip file by its content, as PyTorch's pickles are; unpack what belongs into the artifact"
        if head.startswith(_ARCHIVE_HEADS):
            return f"{name}: a compressed archive by its content; unpack what belongs into the artifact"
        stream.seek(0)
        if is_pickle(path) or _is_old_pickle(stream.read(_WORTH_PARSING)):
            return f"{name}: a pickle by its content; only safetensors and GGUF hold tensors here"
    return None


def _is_old_pickle(data: bytes) -> bool:
    imports = calls = False
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _GLOBALS:
                imports |= argument is None or re.fullmatch(r"[\w.]+ [\w.]+", str(argument)) is not None
            calls |= opcode.name in _CALLS
    except Exception:  # any text makes the parser fail in its own way
        return False
    return imports and calls


def directory_names(directory: Path) -> list[str]:
    """The names of all files below a directory, sorted.

    Raises:
        Damaged: something below it is neither a file nor a folder (a symbolic link, a device, a pipe); names all of them.
        InputError: it is no directory.
    """
    if directory.is_symlink() or not directory.is_dir():
        raise InputError(f"{directory} is not a directory; name an artifact's or a release's directory")
    names, problems = [], []
    for path in sorted(directory.rglob("*")):
        name, mode = path.relative_to(directory).as_posix(), path.lstat().st_mode
        if stat.S_ISLNK(mode):
            problems.append(f"{name!r}: a symbolic link")
        elif stat.S_ISREG(mode):
            names.append(name)
        elif not stat.S_ISDIR(mode):
            problems.append(f"{name!r}: neither a file nor a folder")
    if problems:
        raise Damaged(f"{directory}: {'; '.join(problems[:10])}; only ordinary files may be in it")
    return names
