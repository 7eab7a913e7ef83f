"""SentencePiece vocabularies for GGUF: from ``tokenizer.model``, or from a ``tokenizer.json`` that was made of one.

llama.cpp's ``llama`` tokenizer (``llm_tokenizer_spm`` in ``src/llama-vocab.cpp``) joins, again and again, the two neighbours
whose union has the highest score in the vocabulary. A ``tokenizer.json`` lists merges instead; they say the same where every
way to split a piece into two others is among them and all merges into one piece stand together. That is checked, because
llama.cpp would otherwise encode other tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exports.gguf_pretokenizers import parts
from quantize.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
# What an added token's score is does not matter: it is cut out of the text before any merge.
ADDED_SCORE = -1000.0
_BPE_MODEL = 2
# An id beyond is damage, and would have memory set aside for every id below it.
_MOST_TOKENS = 2**24


@dataclass
class Pieces:
    """A vocabulary by id: texts, scores, types (those of the format's ``tokenizer.ggml.token_type``)."""

    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    add_space_prefix: bool = True


def read_model(file: Path) -> Pieces:
    """Read ``tokenizer.model`` (protobuf; sentencepiece_model.proto of https://github.com/google/sentencepiece).

    Raises:
        InputError: damaged, or a unigram model, which llama.cpp's ``llama`` tokenizer would treat as BPE.
    """
    pieces, model_type = Pieces(), 1
    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                kind = piece.get(3, NORMAL)
                text = piece[1].decode("utf-8")
                # llama.cpp looks for user-defined pieces in the text as it comes, before it marks spaces.
                pieces.texts.append(text.replace(SPACE, " ") if kind == USER_DEFINED else text)
                pieces.scores.append(struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0])
                pieces.types.append(kind)
            elif number == 2:
                model_type = dict(_fields(value)).get(3, 1)
            elif number == 3:
                pieces.add_space_prefix = bool(dict(_fields(value)).get(3, 1))
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise InputError(f"{file} is no SentencePiece model ({type(error).__name__}); fetch it again") from error
    if not pieces.texts:
        raise InputError(f"{file} is no SentencePiece model (no pieces); fetch it again")
    if model_type != _BPE_MODEL:
        raise InputError(f"{file}: SentencePiece model_type={model_type}; llama.cpp's llama tokenizer needs BPE (2)")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of one protobuf message: number, and an int (varint) or bytes (fixed width, or with a length)."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("wire type")
        if place + size > len(data):
            raise ValueError("truncated")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a parsed ``tokenizer.json`` is BPE over characters with bytes to fall back on, as SentencePiece models become."""
    return tokenizer["model"].get("type") == "BPE" and bool(tokenizer["model"].get("byte_fallback"))


def from_tokenizer_json(tokenizer: Mapping[str, Any], where: str) -> Pieces:
    """The vocabulary of such a ``tokenizer.json``, without its added tokens' properties.

    Raises:
        InputError: its normalizer or pre-tokenizer does more than to mark spaces, or its merges are no SentencePiece
            model's.
    """
    prefix, splits = _spaces(tokenizer, where)
    model = tokenizer["model"]
    vocabulary: dict[str, int] = model["vocab"]
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks = _ranks(merges, {text for text in vocabulary if text not in added}, where)
    if splits and (inner := next((text for text in vocabulary if SPACE in text[1:] and text not in added), None)):
        raise InputError(
            f"{where}: the pre-tokenizer splits at spaces, but the vocabulary has {inner!r}, which llama.cpp would use; "
            "give a tokenizer.model, or a pre-tokenizer without split"
        )
    texts = by_id(vocabulary, where)
    pieces = Pieces(texts, [0.0] * len(texts), [UNUSED] * len(texts), prefix)
    unknown = model.get("unk_token")
    for text, number in vocabulary.items():
        pieces.scores[number] = float(-ranks.get(text, 0))
        byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        pieces.types[number] = UNKNOWN if text == unknown else BYTE if byte else NORMAL
    return pieces


def by_id(vocabulary: Mapping[str, int], where: str) -> list[str]:
    """Texts in order of their ids; "" for ids that have none.

    Raises:
        InputError: an id that is no number of a row, or two texts with one.
    """
    texts: list[str] = []
    for text, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        if not len(texts) <= number < _MOST_TOKENS:
            raise InputError(f"{where}: token {text!r} has id {number}; ids differ, and lie from 0 to {_MOST_TOKENS - 1}")
        texts += [""] * (number - len(texts))
        texts.append(text)
    return texts


def _spaces(tokenizer: Mapping[str, Any], where: str) -> tuple[bool, bool]:
    """Whether a space is put in front of the text, and whether the text is split at spaces."""
    prefix = splits = False
    for step in parts(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif step["type"] != "Replace" or step.get("pattern") != {"String": " "} or step.get("content") != SPACE:
            raise InputError(f"{where}: normalizer {step} has no counterpart in llama.cpp; it only turns spaces into {SPACE}")
    for step in parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            prefix |= step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
            splits |= step.get("split", True)
        # Spaces are gone by then where the normalizer has turned them into the mark.
        elif step["type"] != "Split" or step.get("pattern") != {"String": " "}:
            raise InputError(f"{where}: pre-tokenizer {step} has no counterpart in llama.cpp beside a SentencePiece vocabulary")
    return prefix, splits


def _ranks(merges: list[tuple[str, ...]], pieces: set[str], where: str) -> dict[str, int]:
    """For each piece that merges make its place in their order.

    llama.cpp knows pieces, not pairs: it is told the same only if all pairs are there, and a piece's pairs side by side.
    """
    ranks: dict[str, int] = {}
    last = ""
    for left, right in merges:
        text = left + right
        if text != last and text in ranks:
            raise InputError(
                f"{where}: merges into {text!r} stand apart from each other, so no scores of pieces say the same; "
                "give the SentencePiece model (tokenizer.model) that it was made of"
            )
        ranks.setdefault(text, len(ranks))
        last = text
    pairs = set(merges)
    for text in pieces:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair[0] in pieces and pair[1] in pieces and pair not in pairs:
                raise InputError(
                    f"{where}: {text!r} is a piece, but {pair} is no merge, as it would be in a SentencePiece model: llama.cpp "
                    "would encode other tokens; give the tokenizer.model that it was made of"
                )
    return ranks
