"""Tokenised texts: token ids, and how many bytes and words of the text lie before each of them; kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantize.files import atomic_path

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """One text as tokens.

    Attributes:
        ids: int64 ``[n]``.
        bytes_before: int64 ``[n + 1]``, UTF-8 bytes of the text before each token, and all of them; None where the tokenizer
            does not say where its tokens lie.
        words_before: int64 ``[n + 1]``, likewise words: runs of characters that are no white space, counted where they begin.
    """

    ids: Tensor
    bytes_before: Int64 | None = None
    words_before: Int64 | None = None

    def extent(self, low: int, high: int) -> tuple[int | None, int | None]:
        """Words and bytes of the text that tokens ``low`` to ``high`` stand for."""
        if self.bytes_before is None or self.words_before is None:
            return None, None
        return int(self.words_before[high] - self.words_before[low]), int(self.bytes_before[high] - self.bytes_before[low])


def tokenise(
    tokenizer: Any, texts: Sequence[str], *, special: bool = False, verbatim: bool = False, cache: Path | None = None
) -> list[Stream]:
    """Tokenise each text as one string.

    Args:
        tokenizer: the artifact's own.
        texts: any number of them.
        special: whether the tokenizer puts its special tokens around each.
        verbatim: whether special tokens that are spelled out in a text are read as plain text.
        cache: a directory where the result is kept, by tokenizer, texts and options; None for no such thing.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    file = cache / f"tokens-{_key(tokenizer, texts, special, verbatim)}.npz" if cache is not None and fast else None
    if file is not None and (kept := _kept(file)) is not None:
        return kept
    options = {"split_special_tokens": True} if verbatim else {}
    # A stream is longer than the context by design; the warning about it would only frighten.
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=fast,
        verbose=False,
        **options,
    )
    found = encoded.get("offset_mapping") or [None] * len(texts)
    streams = [_stream(*each) for each in zip(texts, encoded["input_ids"], found, strict=True)]
    if file is not None:
        _keep(file, streams)
    return streams


def _stream(text: str, ids: list[int], offsets: list[tuple[int, int]] | None) -> Stream:
    tokens = torch.tensor(ids, dtype=torch.int64)
    if offsets is None:
        return Stream(tokens)
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (characters > 0x7F).astype(np.int64) + (characters > 0x7FF) + (characters > 0xFFFF)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    # Special tokens say that they begin at 0, wherever they stand; several tokens of one character begin where it does.
    starts = np.array([start for start, _ in offsets], dtype=np.int64)
    bounds = np.concatenate([np.maximum.accumulate(starts), [len(text)]]) if len(starts) else np.array([len(text)])
    bounds[0] = 0 if len(starts) else bounds[0]
    words = np.array([match.start() for match in re.finditer(r"\S+", text)], dtype=np.int64)
    return Stream(tokens, bytes_before[bounds], np.searchsorted(words, bounds, side="left").astype(np.int64))


def _key(tokenizer: Any, texts: Sequence[str], special: bool, verbatim: bool) -> str:
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(json.dumps([special, verbatim, len(texts)]).encode())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def _keep(file: Path, streams: Sequence[Stream]) -> None:
    arrays = {
        "lengths": np.array([len(stream.ids) for stream in streams], dtype=np.int64),
        "ids": np.concatenate([stream.ids.numpy() for stream in streams]).astype(np.int32),
        "bytes_before": np.concatenate([stream.bytes_before for stream in streams if stream.bytes_before is not None]),
        "words_before": np.concatenate([stream.words_before for stream in streams if stream.words_before is not None]),
    }
    with atomic_path(file) as temporary, temporary.open("wb") as output:
        np.savez_compressed(output, **arrays)


def _kept(file: Path) -> list[Stream] | None:
    """What :func:`_keep` wrote; None where there is nothing whole."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            lengths, ids = stored["lengths"], torch.from_numpy(stored["ids"].astype(np.int64))
            before = stored["bytes_before"], stored["words_before"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    streams, at = [], 0
    for number, length in enumerate(lengths.tolist()):
        bounds = slice(at + number, at + number + length + 1)
        streams.append(Stream(ids[at : at + length], before[0][bounds], before[1][bounds]))
        at += length
    return streams
