"""What the registry's commands share: exit codes, errors on one line without secrets, a release or a directory as files.

Exit codes: 0 done, and all is as it should be; 3 the answer is no (``verify`` found damage, ``pull`` refused it, ``diff`` found
differences, ``publish`` a gate that had failed); 2 bad input, a release that is not there, a tag that somebody else moved; 1 a
defect of this program.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from exports.registry.base import Damaged, Entry, GateFailed
from exports.registry.contents import directory_names
from exports.registry.names import is_reference, parse_reference
from exports.registry.release import parse_release
from exports.registry.secrets import RedactingFilter, redact
from exports.registry.transfer import read_release
from quantize.artifact import RELEASE
from quantize.errors import InputError

REFERENCE = "a release: local:DIR//NAME[:TAG][@sha256:HEX], hub:OWNER/NAME..., oci:HOST/NAME..., mlflow:URI//NAME..."
EXIT_CODES = "Exit codes: 0 done; 3 damaged, refused or different; 2 bad input; 1 a defect of this program."


def carry_out(action: Callable[[], int]) -> int:
    """Run a command's action; its exit code, or that of its error, which is printed on one line."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(RedactingFilter())
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger().setLevel(logging.WARNING)
    try:
        return action()
    except (Damaged, GateFailed) as error:
        return _fail(str(error), 3)
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where this one stopped", 130)
    except BrokenPipeError:
        # The reader of our output has seen enough; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        logging.getLogger("exports").debug("", exc_info=True)
        return _fail(f"defect: {type(error).__name__}: {error}; please report it", 1)


def _fail(message: str, code: int) -> int:
    print(f"error: {redact(' '.join(message.split()))}", file=sys.stderr)
    return code


@dataclass(frozen=True)
class Contents:
    """A directory or a release, opened: the paths of its files by name, and the release's manifest where it has one."""

    title: str
    files: dict[str, Path]
    release: bytes | None
    digest: str | None


@contextlib.contextmanager
def opened(what: str) -> Iterator[Contents]:
    """Open an artifact's or a release's directory, or a release in a registry, for reading its files.

    A registry that has them on this machine shows them where they are; from others they are fetched. They are not verified.

    Raises:
        InputError: there is no such thing.
        Damaged: a list of files that is refused, or a link in a directory.
    """
    if not is_reference(what):
        directory = Path(what)
        files = {name: directory / name for name in directory_names(directory)}
        release = files[RELEASE].read_bytes() if RELEASE in files else None
        digest = parse_release(release, what).digest if release else None
        yield Contents(what, files, release, digest)
        return
    reference = parse_reference(what)
    registry, digest, found = read_release(reference)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for entry in found.entries:
            files[entry.name] = registry.path(reference.name, entry) or _fetched(Path(folder), entry)
            if not files[entry.name].exists():
                registry.fetch(reference.name, digest, entry, files[entry.name])
        yield Contents(str(registry.reference(reference.name, reference.tag, digest)), files, found.manifest, digest)


def _fetched(folder: Path, entry: Entry) -> Path:
    path = folder / entry.name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
