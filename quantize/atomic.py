"""Files and directories that are whole or absent. Without torch, for commands that start in a fraction of a second."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

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
        with _telling_trouble(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _fsync(temporary)
            temporary.replace(path)
            _fsync(path.parent)
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
        with _telling_trouble(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in files_below(temporary):
                _fsync(file)
            if path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _telling_trouble(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into an :class:`InputError` that names ``path``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        trouble = disk_error(path, error)
        if trouble is None:
            raise
        raise trouble from error


def files_below(directory: Path) -> list[Path]:
    """Every regular file below ``directory``, sorted by path."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
