"""Copying a file and hashing what was written, in little more than the time of the slower of the two.

Where the file system can share blocks between files (Btrfs, XFS, bcachefs) the copy is a clone and takes no time; elsewhere the
kernel copies in a thread while this one hashes what has been copied. Either way the hash is of the copy: a source that changes
meanwhile cannot slip through.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from pathlib import Path

_PIECE = 4 * 2**20
_FICLONE = 0x40049409  # linux/fs.h
_NO_COPY_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}


def copy_hashed(source: Path, target: Path) -> tuple[str, int]:
    """Copy ``source`` to ``target``, which must not exist; the copy's sha256 (hex) and size. Not yet flushed to disk.

    Links are not followed.

    Raises:
        OSError: reading or writing failed; ``target`` may be left behind, unfinished.
    """
    with contextlib.ExitStack() as stack:
        reading = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        stack.callback(os.close, reading)
        writing = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        stack.callback(os.close, writing)
        size = os.fstat(reading).st_size
        if size <= _PIECE:
            data = _read_all(reading)
            _write_all(writing, data)
            return hashlib.sha256(data).hexdigest(), len(data)
        if _clone(reading, writing):
            with target.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest(), os.fstat(writing).st_size
        return _Pipeline(reading, writing).run()


class _Pipeline:
    """One thread copies, the caller's hashes behind it."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.copied, self.finished = 0, False
        self.error: BaseException | None = None
        self.moved = threading.Condition()

    def run(self) -> tuple[str, int]:
        thread = threading.Thread(target=self._copy, daemon=True)
        thread.start()
        try:
            return self._hash()
        finally:
            thread.join()

    def _hash(self) -> tuple[str, int]:
        digest, done, buffer = hashlib.sha256(), 0, bytearray(_PIECE)
        view = memoryview(buffer)
        while True:
            with self.moved:
                while self.copied == done and not self.finished:
                    self.moved.wait()
                available = self.copied - done
            if self.error is not None:
                raise self.error
            if not available:
                return digest.hexdigest(), done
            count = os.preadv(self.writing, [view[: min(available, _PIECE)]], done)
            digest.update(view[:count])
            done += count

    def _copy(self) -> None:
        try:
            step = _Step(self.reading, self.writing)
            while count := step():
                with self.moved:
                    self.copied += count
                    self.moved.notify()
        except BaseException as error:
            self.error = error
        with self.moved:
            self.finished = True
            self.moved.notify()


class _Step:
    """Copies the next piece and gives its size, 0 at the end: in the kernel where it can, else through a buffer."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.kernel = hasattr(os, "copy_file_range")

    def __call__(self) -> int:
        if self.kernel:
            try:
                return os.copy_file_range(self.reading, self.writing, _PIECE)
            except OSError as error:
                if error.errno not in _NO_COPY_RANGE:
                    raise
                self.kernel = False
        data = os.read(self.reading, _PIECE)
        _write_all(self.writing, data)
        return len(data)


def _clone(reading: int, writing: int) -> bool:
    try:
        import fcntl

        fcntl.ioctl(writing, _FICLONE, reading)
    except (ImportError, OSError):
        return False
    return True


def _read_all(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, _PIECE):
        parts.append(part)
    return b"".join(parts)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
