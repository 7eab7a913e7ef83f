"""What the unquantized model said, stored once: for each scored token the likeliest tokens with their log-probabilities.

Of each scored position the file holds the ``top_k`` likeliest tokens, their log-probabilities in float32, the logarithm of the
probability that is left for all others, and the true token's log-probability. It is a NumPy archive (``numpy.load`` reads it):
``meta``, JSON as bytes, and for window ``i`` the members ``i/ids`` (uint16 or uint32 ``[n, k]``, likeliest first),
``i/logp`` (float32 ``[n, k]``), ``i/rest`` (float32 ``[n]``) and ``i/true`` (float32 ``[n]``). Windows are written and read one
at a time, so no more than one is in memory: at ``k = 256`` about 6 bytes a token and neighbour, 1.5 kB a token.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.protocols import Window
from quantize.errors import InputError, one_line
from quantize.files import atomic_path

SCHEMA = 1
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


class Top(NamedTuple):
    """Likeliest tokens of some positions: ``ids`` int64 ``[n, k]``, ``logp`` ``[n, k]``, ``rest`` ``[n]`` and ``true`` ``[n]``.

    ``logp`` and ``rest`` are the logarithms of ``k + 1`` probabilities that sum to 1.
    """

    ids: Tensor
    logp: Tensor
    rest: Tensor
    true: Tensor


def partition(logits: Tensor, ids: Tensor, targets: Tensor) -> Top:
    """The probabilities of some tokens, of all others together, and of the true ones. Overwrites ``logits``.

    Args:
        logits: float32 ``[n, vocabulary]``.
        ids: int64 ``[n, k]``, different ones in each row.
        targets: int64 ``[n]``.
    """
    chosen, true = logits.gather(1, ids), logits.gather(1, targets[:, None])[:, 0]
    # The remainder is summed by itself: 1 minus the others' sum would be rounding noise where they are nearly all.
    rest = torch.logsumexp(logits.scatter_(1, ids, -torch.inf), -1)
    normaliser = torch.logaddexp(torch.logsumexp(chosen, -1), rest)
    return Top(ids, chosen - normaliser[:, None], rest - normaliser, true - normaliser)


class ReferenceWriter:
    """A watcher that writes a reference; use :func:`writing`."""

    def __init__(self, archive: zipfile.ZipFile, top_k: int) -> None:
        self._archive, self._top_k = archive, top_k
        self._parts: list[Top] = []
        self._windows = 0
        self.vocabulary = 0

    def chunk(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Keep the likeliest tokens of some positions; ``-log p`` of the targets."""
        self.vocabulary = logits.shape[-1]
        top = logits.topk(min(self._top_k, self.vocabulary), dim=-1).indices
        part = partition(logits, top, targets)
        self._parts.append(part)
        return -part.true

    def end_window(self, window: Window) -> None:
        """Write what was kept of a window."""
        narrow = np.uint16 if self.vocabulary <= 2**16 else np.uint32
        joined = [torch.cat(list(parts)).cpu().numpy() for parts in zip(*self._parts, strict=True)] if self._parts else []
        kinds = (narrow, np.float32, np.float32, np.float32)
        for name, values, kind in zip(Top._fields, joined, kinds, strict=bool(joined)):
            self._write(f"{self._windows}/{name}", values.astype(kind))
        self._parts = []
        self._windows += 1

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Write what the reference is of; ``schema``, ``vocabulary`` and ``top_k`` are added."""
        kept = min(self._top_k, self.vocabulary)
        text = json.dumps({"schema": SCHEMA, **meta, "vocabulary": self.vocabulary, "top_k": kept}, sort_keys=True)
        self._write("meta", np.frombuffer(text.encode(), dtype=np.uint8))

    def _write(self, name: str, values: NDArray[Any]) -> None:
        # A date of its own for each run would make equal references differ.
        info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
        info.compress_type = zipfile.ZIP_DEFLATED
        with self._archive.open(info, "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, np.ascontiguousarray(values), allow_pickle=False)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def writing(path: Path, top_k: int) -> Iterator[ReferenceWriter]:
    """A writer for a reference at ``path``, which is there whole when the block ends, or not at all.

    Raises:
        InputError: the disk refuses the file.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", compresslevel=1) as archive:
        yield ReferenceWriter(archive, top_k)


class Reference:
    """A stored reference, read window by window."""

    def __init__(self, path: Path) -> None:
        """Open a file and read what it is of.

        Raises:
            InputError: it is missing, or no reference of this version.
        """
        self.path = path
        if not path.is_file():
            raise InputError(f"reference {path} does not exist; make it with --save-reference")
        try:
            self._stored = np.load(path, allow_pickle=False)
            self.meta: dict[str, Any] = json.loads(self._stored["meta"].tobytes())
            schema = self.meta["schema"]
        except (*_DAMAGE, AttributeError, TypeError) as error:
            raise InputError(
                f"{path} is no whole reference ({one_line(error)}); make it again with --save-reference"
            ) from error
        if schema != SCHEMA:
            raise InputError(f"{path} is a reference of schema {schema!r}, not {SCHEMA}; make it again with --save-reference")

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Refuse to compare what was not measured alike.

        Args:
            wanted: ``protocol`` and ``tokens_sha256`` of what is to be compared with it.

        Raises:
            InputError: names the first thing that differs.
        """
        ours, theirs = wanted["protocol"], self.meta["protocol"]
        for key, value in ours.items():
            if theirs.get(key) != value and key not in ("words", "bytes"):
                raise InputError(
                    f"{self.path} was made with {key}={theirs.get(key)!r}, not {value!r}; "
                    "use the same text and protocol, or make it again with --save-reference"
                )
        if self.meta["tokens_sha256"] != wanted["tokens_sha256"]:
            raise InputError(
                f"{self.path} was made with other token ids of the same text: the tokenizers differ; "
                "compare with the model the artifact was made from, or not at all (eval.divergence=false)"
            )

    def window(self, number: int, device: torch.device | str = "cpu") -> Top:
        """What is stored of one window.

        Raises:
            InputError: the file is damaged.
        """
        try:
            arrays = [self._stored[f"{number}/{name}"] for name in Top._fields]
            ids, logp, rest, true = (
                torch.from_numpy(array.astype(np.int64 if i == 0 else np.float32)).to(device) for i, array in enumerate(arrays)
            )
        except _DAMAGE as error:
            raise InputError(f"{self.path} is damaged ({one_line(error)}); make it again with --save-reference") from error
        if not (ids.ndim == 2 and ids.shape == logp.shape and rest.shape == true.shape == ids.shape[:1]):
            raise InputError(f"{self.path} is damaged (window {number} has odd shapes); make it again with --save-reference")
        return Top(ids, logp, rest, true)

    def close(self) -> None:
        """Close the file."""
        self._stored.close()
