"""Protocols of perplexity, by name: which tokens are scored, each from which context.

``windows``   Windows of ``seq_len`` tokens start every ``stride`` tokens (default: ``seq_len``, so that they do not overlap);
              only full ones are used. In each, tokens count that no earlier window scored.
``gptq``      The GPTQ paper's code: WikiText-2's lines joined by a blank line, the tokenizer's own special tokens around the
              whole, windows of 2048 that do not overlap, the first token of each not scored.
``llamacpp``  ``llama-perplexity -c N``: the file as it is, windows of N that do not overlap, the tokens behind the middle of
              each scored; BOS takes the place of each window's first token where the tokenizer adds one.
``strided``   The sliding window of transformers' documentation: as ``windows`` with ``stride = seq_len / 2``, and a last window
              that ends with the text, so that every token but the first is scored.
``wikitext``  lm-eval's task: each page by itself, its tokeniser's spaces taken out, every token scored, in windows of
              ``seq_len`` that follow one another; the first begins with BOS. Words and bytes are those of the page as stored.

Figures of different protocols cannot be compared, so every result carries its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval import texts
from eval.streams import Stream, tokenise
from quantize.config import PROTOCOLS, EvalConfig
from quantize.errors import InputError


@dataclass(frozen=True)
class Window:
    """What a model reads at once.

    Attributes:
        ids: int64 ``[n]``; the last is only a target, so a model reads ``ids[:-1]``.
        first: the first index scored, 1 or more; all behind it are scored too.
        words: words of the text that the scored tokens stand for; None where they cannot be told.
        bytes: UTF-8 bytes, likewise.
    """

    ids: Tensor
    first: int
    words: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Protocol:
    """How perplexity was measured.

    Attributes:
        name: one of :data:`quantize.config.PROTOCOLS`.
        text: ``builtin`` or the name of a file.
        text_sha256: of the text as read, before the protocol changes anything.
        part: ``all`` of the text, or the part that calibration never sees, ``heldout``.
        window: tokens in a window.
        stride: tokens between the starts of windows.
        bos: whether a window's first token is BOS.
        windows: how many were read.
        tokens: tokens scored.
        words: words they stand for; None where the tokenizer cannot tell.
        bytes: UTF-8 bytes they stand for, likewise.
    """

    name: str
    text: str
    text_sha256: str
    part: str
    window: int
    stride: int
    bos: bool
    windows: int
    tokens: int
    words: int | None
    bytes: int | None


@dataclass(frozen=True)
class Plan:
    """A protocol and the windows it consists of."""

    protocol: Protocol
    windows: list[Window]

    def fingerprint(self) -> str:
        """Hex sha256 of every window's ids and first scored index: what a model is shown, and asked for."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(len(window.ids).to_bytes(8, "little") + window.first.to_bytes(8, "little"))
            digest.update(window.ids.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def plan(
    config: EvalConfig, tokenizer: Any, *, part: str | None = None, heldout_fraction: float = 0.2, cache: Path | None = None
) -> Plan:
    """Read and tokenise the text of a protocol, and cut it in windows.

    Args:
        config: checked by :func:`quantize.checks.check_eval`.
        tokenizer: the artifact's own.
        part: ``all``, ``train`` or ``heldout``; None: ``heldout`` of the built-in text, all of a file.
        heldout_fraction: the size of the held-out part.
        cache: where tokenised texts are kept; None: nowhere.

    Raises:
        InputError: the text is missing or too short, or the tokenizer has no BOS where the protocol needs one.
    """
    part = part or ("heldout" if config.text == "builtin" else "all")
    read = texts.read_as_llamacpp if config.protocol == "llamacpp" else texts.read_text
    content = read(config.text, part, heldout_fraction)
    windows, stride, bos = _CUT[config.protocol](config, tokenizer, content, cache)
    words = [window.words for window in windows]
    sizes = [window.bytes for window in windows]
    protocol = Protocol(
        name=config.protocol,
        text=config.text if config.text == "builtin" else Path(config.text).name,
        text_sha256=hashlib.sha256(content.encode()).hexdigest(),
        part=part,
        window=window_length(config),
        stride=stride,
        bos=bos,
        windows=len(windows),
        tokens=sum(len(window.ids) - window.first for window in windows),
        words=None if None in words else sum(word or 0 for word in words),
        bytes=None if None in sizes else sum(size or 0 for size in sizes),
    )
    return Plan(protocol, windows)


def window_length(config: EvalConfig) -> int:
    """Tokens in a window: ``eval.seq_len``, or the protocol's own."""
    return config.seq_len or PROTOCOLS[config.protocol]


Cut = tuple[list[Window], int, bool]  # windows, tokens between them, whether they begin with BOS


def _windows(config: EvalConfig, tokenizer: Any, content: str, cache: Path | None) -> Cut:
    (stream,) = tokenise(tokenizer, [content], cache=cache)
    length, bos = window_length(config), _wanted_bos(config, tokenizer)
    stride = config.stride or length
    return sliding_windows(stream, length, stride, limit=_limit(config), bos=bos), stride, config.bos


def _strided(config: EvalConfig, tokenizer: Any, content: str, cache: Path | None) -> Cut:
    (stream,) = tokenise(tokenizer, [content], cache=cache)
    length, bos = window_length(config), _wanted_bos(config, tokenizer)
    stride = config.stride or max(length // 2, 1)
    return sliding_windows(stream, length, stride, limit=_limit(config), bos=bos, ragged=True), stride, config.bos


def _gptq(config: EvalConfig, tokenizer: Any, content: str, cache: Path | None) -> Cut:
    (stream,) = tokenise(tokenizer, [texts.join_lines(content)], special=True, cache=cache)
    length = window_length(config)
    return sliding_windows(stream, length, length, limit=_limit(config)), length, False


def _llamacpp(config: EvalConfig, tokenizer: Any, content: str, cache: Path | None) -> Cut:
    (stream,) = tokenise(tokenizer, [content], special=True, verbatim=True, cache=cache)
    length = window_length(config)
    if len(stream.ids) < 2 * length:
        raise InputError(
            f"the text has {len(stream.ids)} tokens, and eval.protocol=llamacpp needs two windows of eval.seq_len={length}; "
            f"use eval.seq_len={max(len(stream.ids) // 2, 2)} or less, or a longer text"
        )
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    found = []
    for start in _starts(len(stream.ids), length, length, _limit(config)):
        ids = stream.ids[start : start + length].clone()
        ids[0] = bos if adds else ids[0]
        first = length // 2 + 1
        found.append(Window(ids, first, *stream.extent(start + first, start + length)))
    return found, length, adds


def _wikitext(config: EvalConfig, tokenizer: Any, content: str, cache: Path | None) -> Cut:
    wanted, found = _limit(config), texts.pages(content)
    if wanted is not None and wanted > len(found):
        raise InputError(f"the text has {len(found)} pages; use eval.windows={len(found)} or less, or -1 for all")
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise InputError("eval.protocol=wikitext begins with BOS or EOS, and the tokenizer has neither; use protocol=windows")
    found = found[:wanted]
    streams = tokenise(tokenizer, [texts.detokenize(page) for page in found], special=True, cache=cache)
    length, windows = window_length(config), []
    for page, stream in zip(found, streams, strict=True):
        rolled = rolling_windows(stream.ids, length, prefix)
        size = (len(re.split(r"\s+", page)), len(page.encode()))
        windows += [Window(ids, first, *(size if number == 0 else (0, 0))) for number, (ids, first) in enumerate(rolled)]
    return windows, length, True


_CUT: dict[str, Callable[[EvalConfig, Any, str, Path | None], Cut]] = {
    "windows": _windows,
    "gptq": _gptq,
    "llamacpp": _llamacpp,
    "strided": _strided,
    "wikitext": _wikitext,
}


def sliding_windows(
    stream: Stream, window: int, stride: int, *, limit: int | None = None, bos: int | None = None, ragged: bool = False
) -> list[Window]:
    """Windows of ``window`` tokens, ``stride`` apart; in each, the tokens count that no earlier one scored.

    Args:
        stream: the tokenised text.
        window: tokens in a window.
        stride: tokens between windows, at most ``window``.
        limit: at most this many; None for all.
        bos: a token put before each window, so that its first can be scored too; None for none.
        ragged: whether a last, shorter window ends with the text.

    Raises:
        InputError: the text has not even one window, or fewer than ``limit``.
    """
    length = len(stream.ids)
    starts = _starts(length, window, stride, limit, ragged=ragged)
    found = []
    for start in starts:
        end = min(start + window, length)
        ids, first = stream.ids[start:end], 0 if start == 0 else window - stride
        if bos is not None:
            ids, first = torch.cat([torch.tensor([bos]), ids]), first + 1
        first = max(first, 1)
        behind = len(ids) - first
        found.append(Window(ids, first, *stream.extent(end - behind, end)))
    return found


def _starts(length: int, window: int, stride: int, limit: int | None, *, ragged: bool = False) -> list[int]:
    starts = list(range(0, length - window + 1, stride))
    behind = starts[-1] + stride if starts else 0
    # One token behind the last window has nothing in front of it where windows do not overlap.
    if ragged and length - behind > 1 and (not starts or starts[-1] + window < length):
        starts.append(behind)
    if not starts or (limit is not None and len(starts) < limit):
        raise InputError(
            f"the text has {length} tokens, room for {len(starts)} windows of eval.seq_len={window}; "
            f"use eval.windows={max(len(starts), 1)}, a smaller eval.seq_len or a longer text"
        )
    return starts[:limit]


def rolling_windows(ids: Tensor, window: int, prefix: int) -> list[tuple[Tensor, int]]:
    """Windows in which every token of a text is scored once, and the first scored index of each.

    lm-eval's ``get_rolling_token_windows`` with a context of one token: the first window is ``prefix`` and the text's first
    tokens; each further one scores up to ``window`` tokens, and the last is filled up from its left.
    """
    found, predicted = [], min(window, len(ids))
    if predicted:
        found.append((torch.cat([torch.tensor([prefix]), ids[:predicted]]), 1))
    while predicted < len(ids):
        new = min(len(ids) - predicted, window)
        predicted += new
        found.append((ids[predicted - window - 1 : predicted], window + 1 - new))
    return found


def _limit(config: EvalConfig) -> int | None:
    return None if config.windows == -1 else config.windows


def _wanted_bos(config: EvalConfig, tokenizer: Any) -> int | None:
    if config.bos and tokenizer.bos_token_id is None:
        raise InputError("eval.bos=true, but the artifact's tokenizer has no BOS token; use eval.bos=false")
    return tokenizer.bos_token_id if config.bos else None
