"""Files that are whole or absent: atomic writes, hashes, and the translation of disk trouble into one clear line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from quantize.errors import InputError

_DISK_TROUBLE = {
    errno.ENOSPC: "the disk is full; free some space or choose another output_dir",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another output_dir",
    errno.EROFS: "the file system is read-only; choose another output_dir",
    errno.EACCES: "permission denied; choose an output_dir you may write to",
    errno.EPERM: "permission denied; choose an output_dir you may write to",
    errno.ENOTDIR: "a part of the path is a file, not a directory; choose another output_dir",
    errno.EFBIG: "the file system refuses a file of this size; choose another output_dir",
}


def disk_error(path: Path, error: Exception) -> InputError | None:
    """The :class:`InputError` for a failed write to ``path``, or None where ``error`` is not the disk's doing."""
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError) and number is None:
        # safetensors wraps the OS error in text: "I/O error: No space left on device (os error 28)"
        number = next((code for code in _DISK_TROUBLE if f"os error {code})" in str(error)), None)
    reason = _DISK_TROUBLE.get(number) if number is not None else None
    return InputError(f"cannot write {path}: {reason}") if reason else None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success flush it to disk and rename it, on failure remove it.

    Raises:
        InputError: the disk is full, read-only or not ours to write to.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        trouble = disk_error(path, error)
        if trouble is None:
            raise
        raise trouble from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Like :func:`atomic_path` for a whole directory; an existing ``path`` is replaced only when the new one is whole.

    Every file written inside is flushed to disk before the rename.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in files_below(temporary):
            _fsync(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        trouble = disk_error(path, error)
        if trouble is None:
            raise
        raise trouble from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline, atomically. NaN and infinity are refused (not JSON)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); it is damaged: fetch it again") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors are made contiguous, order is by name (so bytes are reproducible)."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with atomic_path(path) as temporary:
        save_file(ordered, temporary, metadata=metadata)


def files_below(directory: Path) -> list[Path]:
    """Every regular file below ``directory``, sorted by path."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON (sorted keys): the key by which stages know their inputs unchanged."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
