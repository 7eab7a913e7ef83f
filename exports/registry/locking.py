"""One publisher of a tag at a time on this machine, for servers that cannot compare a tag before they move it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(*what: str) -> Iterator[None]:
    """Hold a lock that all processes of this user on this machine share; ``what``: the words that say which one.

    The lock is ``flock``'s, in a file of the system's temporary folder: the system takes it back from a killed process.
    """
    folder = Path(tempfile.gettempdir()) / f"quantize-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256("\0".join(what).encode()).hexdigest()
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
