"""Calls to the Hugging Face Hub through huggingface_hub, with failures told as errors of the user's.

What a message tells is the status and the Hub's own words: never a URL, which may be signed, and never a header.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, RepoFile, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    hf_raise_for_status,
    http_backoff,
)

from exports.registry.base import Conflict, Entry, NotFound
from exports.registry.secrets import redact
from quantize.errors import InputError

_LIBRARYS = (LocalTokenNotFoundError, FileMetadataError, XetDownloadError)
_BATCH = 256  # files in one request
_IN_MEMORY = 12 * 2**20  # bytes; larger files never travel inside a commit, where the Hub takes 10 MB
_LFS = "application/vnd.git-lfs+json"
_ENDPOINT = re.compile(r"https?://[^/@\s]+(?:/[^@\s]*)?")
_ATTEMPTS = 3  # of a download that the library gave up


class Hub:
    """The Hub at ``HF_ENDPOINT``, else huggingface.co; the token is ``HF_TOKEN``, else the one that `hf auth login` saved."""

    def __init__(self) -> None:
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        if not _ENDPOINT.fullmatch(self.endpoint):
            raise InputError("HF_ENDPOINT is https://HOST or http://HOST:PORT, without a password in it; use HF_TOKEN for that")
        self.api = HfApi(endpoint=self.endpoint)
        # Warnings of retries, and HTTP's own log, tell the addresses of storage, which are signed.
        for logger, level in (("huggingface_hub", logging.ERROR), ("httpx", logging.WARNING), ("httpx2", logging.WARNING)):
            logging.getLogger(logger).setLevel(level)
        if not sys.stderr.isatty():
            disable_progress_bars()

    def lacking(self, name: str, entries: Sequence[Entry]) -> set[str]:
        """The sha256 of the files whose bytes the repository's large-file store does not have (Git LFS batch API)."""
        missing: set[str] = set()
        sizes = {entry.sha256: entry.size for entry in entries}
        for start in range(0, len(sizes), _BATCH):
            objects = [{"oid": oid, "size": size} for oid, size in list(sizes.items())[start : start + _BATCH]]
            asked = {"operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256", "objects": objects}
            with self.telling(f"the files of {name}"):
                headers = {**build_hf_headers(), "Accept": _LFS, "Content-Type": _LFS}
                url = f"{self.endpoint}/{name}.git/info/lfs/objects/batch"
                answer = http_backoff("POST", url, headers=headers, json=asked)
                hf_raise_for_status(answer)
                told = answer.json()["objects"]
            missing |= {each["oid"] for each in told if "actions" in each or "error" in each}
        return missing

    def tree(self, name: str, commit: str) -> dict[str, RepoFile]:
        """The files of a commit, by name."""
        with self.telling(f"the files of {name}"):
            found = self.api.list_repo_tree(name, recursive=True, revision=commit)
            return {each.path: each for each in found if isinstance(each, RepoFile)}

    def download(self, name: str, commit: str, filename: str, folder: Path) -> Path:
        """A file of a commit in ``folder``, not checked; after a break the library goes on, or it is fetched anew."""
        for left in range(_ATTEMPTS - 1, -1, -1):
            try:
                with self.telling(f"{filename} of {name}"):
                    # A cache of its own: what lies in the user's is not asked.
                    got = self.api.hf_hub_download(
                        name, filename, revision=commit, local_dir=folder, cache_dir=folder / ".cache"
                    )
                    return Path(got)
            except Unreachable:
                if not left:
                    raise
        raise AssertionError("unreachable")

    def read(self, name: str, commit: str, filename: str, most: int) -> bytes | None:
        """A small file of a commit, not checked; None where there is none.

        Raises:
            InputError: it has more than ``most`` bytes.
        """
        with self.telling(f"{filename} of {name}"):
            found = self.api.get_paths_info(name, [filename], revision=commit)
        if not found or not isinstance(found[0], RepoFile):
            return None
        if found[0].size > most:
            raise InputError(f"{filename} of {name} has {found[0].size} bytes; at most {most} are read")
        with tempfile.TemporaryDirectory() as folder:
            return self.download(name, commit, filename, Path(folder)).read_bytes()

    @contextlib.contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Failures of the Hub and of the network as errors of the user's.

        Raises:
            NotFound: the Hub has no such repository, revision or file, or shows it to nobody without a token.
            Conflict: somebody else was faster (409, 412).
            Unreachable: the connection failed or broke off.
            InputError: the Hub refuses.
        """
        try:
            yield
        except InputError:
            raise
        except LocalEntryNotFoundError as error:
            raise self._failure(error.__cause__, what) from None
        except (HTTPError, EntryNotFoundError, OSError, *_LIBRARYS) as error:
            if not _is_of_the_network(error):
                raise
            raise self._failure(error, what) from None
        except RuntimeError as error:  # of an upload, around what went wrong; of Xet's library, by itself
            raise self._failure(error.__cause__ or error, what) from None
        except ValueError as error:  # the Hub's answer makes no sense, or it refuses a model card
            raise InputError(redact(f"{self.endpoint} and huggingface_hub disagree about {what}: {_line(error)}")) from None

    def _failure(self, error: BaseException | None, what: str) -> InputError:
        if isinstance(error, LocalTokenNotFoundError):
            return InputError(f"{what} at {self.endpoint} needs a token; set HF_TOKEN, or use `hf auth login`")
        if isinstance(error, OfflineModeIsEnabled):
            return InputError(f"{what}: HF_HUB_OFFLINE is set; unset it to use {self.endpoint}")
        if not isinstance(error, HfHubHTTPError):
            return Unreachable(
                f"{self.endpoint} cannot be reached, or broke off at {what} ({type(error).__name__}); the same command goes on"
            )
        status, said = error.response.status_code, redact(_line(error.server_message or ""))
        said = f"status {status}{': ' if said else ''}{said[:300]}"
        if status == 404 or isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
            hint = "; a private one is seen with HF_TOKEN only" if isinstance(error, RepositoryNotFoundError) else ""
            return NotFound(f"{self.endpoint} does not have {what} ({said}){hint}")
        if status in (401, 403):
            return InputError(
                f"{self.endpoint} refuses access to {what} ({said}); set HF_TOKEN to a token that may write there, "
                "or use `hf auth login`"
            )
        if status in (409, 412):
            return Conflict(f"{what} at {self.endpoint} was changed by somebody else at the same time; publish again")
        if status == 429 or status >= 500:
            return Unreachable(f"{self.endpoint} is busy at {what} ({said}); the same command goes on")
        return InputError(f"{self.endpoint} refuses {what} ({said})")


class Unreachable(InputError):
    """The connection failed or the Hub is busy; the same call may succeed."""


def addition(entry: Entry) -> CommitOperationAdd:
    """A file as the library sends it. Small files are read and checked here; of large ones the Hub checks the hash.

    Raises:
        Damaged: a small file is not what its entry says.
        NotFound: the entry has no bytes.
    """
    if entry.path is None and entry.data is None:
        raise NotFound(f"{entry.name} is not there to be sent; publish it again")
    if entry.path is None or entry.size <= _IN_MEMORY:
        return CommitOperationAdd(entry.name, b"".join(entry.chunks()))
    made = CommitOperationAdd(entry.name, entry.path)
    made.upload_info.sha256 = bytes.fromhex(entry.sha256)  # known: the library would read the file once more for it
    return made


def _is_of_the_network(error: BaseException) -> bool:
    kinds = (HTTPError, EntryNotFoundError, ConnectionError, TimeoutError, *_LIBRARYS)
    # The library's own check of a download's size is an OSError without a number.
    return isinstance(error, kinds) or (type(error) is OSError and error.errno is None)


def _line(error: object) -> str:
    return re.sub(r"https?://\S+", "...", " ".join(str(error).split()))
