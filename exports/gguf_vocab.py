"""A checkpoint's tokenizer as the ``tokenizer.ggml.*`` keys of a GGUF file.

Two of llama.cpp's tokenizers are written (``src/llama-vocab.cpp`` there): ``gpt2``, byte-level BPE with merges and a named
pre-tokenizer, and ``llama``, a SentencePiece vocabulary with scores. Sources are ``tokenizer.json``, ``tokenizer.model``, and,
where there is neither, what transformers makes of the directory.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exports import gguf_sentencepiece as spm
from exports.gguf_pretokenizers import parts, pre_tokenizer_name
from quantize.checkpoint import load_tokenizer
from quantize.errors import InputError, one_line
from quantize.files import read_json

log = logging.getLogger(__name__)

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
# Tokens that steer although their tokenizers do not mark them as special; llama.cpp would render and match them as text.
_STEERING = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
_FILLER_SCORE = -10000.0


@dataclass
class Vocabulary:
    """What the file says of the tokenizer.

    Attributes:
        model: ``gpt2`` or ``llama``.
        pre: the pre-tokenizer's name; ``default`` with ``llama``.
        tokens: texts by id; as many as the embedding has rows.
        types: ``tokenizer.ggml.token_type`` of each (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte).
        scores: of each token, with ``llama``.
        merges: pairs joined by a space, in order, with ``gpt2``.
        special: ids by role: bos, eos, unk, sep, pad, mask.
        add: whether bos and eos are added to a text.
        add_space_prefix: whether a text gets a space in front, with ``llama``.
        templates: chat templates by name; ``default`` is the one used.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)
    add_space_prefix: bool | None = None
    templates: dict[str, str] = field(default_factory=dict)

    def add_to(self, writer: Any) -> None:
        """Add the keys to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for role, number in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{_SPECIAL[role]}_token_id", number)
        for role, value in self.add.items():
            writer.add_bool(f"tokenizer.ggml.add_{role}_token", value)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if others := sorted(set(self.templates) - {"default"}):
            writer.add_array("tokenizer.chat_templates", others)
        for name in sorted(self.templates):
            key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
            writer.add_string(key, self.templates[name])


def read_vocabulary(directory: Path, config: Mapping[str, Any], rows: int, pre: str | None = None) -> Vocabulary:
    """The tokenizer of a checkpoint's directory.

    Args:
        directory: where ``tokenizer.json``, ``tokenizer.model``, ``tokenizer_config.json`` lie.
        config: ``config.json``, for ids of special tokens that the tokenizer's files do not name.
        rows: rows of the embedding: ids without a token are filled with unused ones, added tokens beyond are left out.
        pre: name of llama.cpp's pre-tokenizer, where it is not to be found out.

    Raises:
        InputError: no tokenizer there, or one that llama.cpp does not have.
    """
    try:
        return _read(directory, config, rows, pre)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"{directory}: its tokenizer's files are not of the form that transformers writes ({type(error).__name__}: "
            f"{one_line(error)}); fetch them again"
        ) from error


def _read(directory: Path, config: Mapping[str, Any], rows: int, pre: str | None) -> Vocabulary:
    settings = _object(directory / "tokenizer_config.json")
    tokenizer = _object(directory / "tokenizer.json")
    if not tokenizer and not (directory / "tokenizer.model").exists():
        backend = getattr(load_tokenizer(directory, directory), "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"{directory} has no tokenizer.json and no tokenizer.model; put one of them there")
        tokenizer = json.loads(backend.to_str())
    where = str(directory / "tokenizer.json")
    if tokenizer and not spm.is_sentencepiece(tokenizer):
        vocabulary = _byte_level(tokenizer, where, pre)
    else:
        vocabulary = _sentencepiece(directory, tokenizer, settings, where)
    _set_added(vocabulary, _added_tokens(directory, tokenizer, settings), rows)
    _fit(vocabulary, rows, where)
    vocabulary.special = _special_tokens(vocabulary, directory, settings, config)
    vocabulary.add = _additions(tokenizer, settings, vocabulary)
    vocabulary.templates = _chat_templates(directory, settings)
    return vocabulary


def _object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f"{file} holds no JSON object but {type(value).__name__}; it is damaged: fetch it again")
    return value


def _byte_level(tokenizer: Mapping[str, Any], where: str, pre: str | None) -> Vocabulary:
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise InputError(f"{where}: model type {model.get('type')!r} cannot become GGUF here; BPE can")
    steps = [*parts(tokenizer.get("pre_tokenizer"), "pretokenizers"), *parts(tokenizer.get("normalizer"), "normalizers")]
    if not any(step["type"] == "ByteLevel" for step in steps):
        raise InputError(f"{where}: BPE without bytes (no ByteLevel step, byte_fallback=false) cannot become GGUF")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise InputError(f"{where}: {key}={model[key]!r} has no counterpart in llama.cpp; it must be empty")
    tokens = spm.by_id(model["vocab"], where)
    merges = [
        merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge) for merge in model["merges"]
    ]
    types = [spm.NORMAL if text else spm.UNUSED for text in tokens]
    return Vocabulary("gpt2", pre_tokenizer_name(tokenizer, where, pre), tokens, types, merges=merges)


def _sentencepiece(directory: Path, tokenizer: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> Vocabulary:
    file = directory / "tokenizer.model"
    pieces = spm.read_model(file) if file.exists() else spm.from_tokenizer_json(tokenizer, where)
    prefix = settings.get("add_prefix_space")
    return Vocabulary(
        "llama",
        "default",
        pieces.texts,
        pieces.types,
        scores=pieces.scores,
        add_space_prefix=pieces.add_space_prefix if prefix is None else bool(prefix),
    )


def _added_tokens(directory: Path, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Text and whether it is special, by id; the file that is read first by transformers comes last and wins."""
    added = {int(number): (text, False) for text, number in _object(directory / "added_tokens.json").items()}
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        added[int(number)] = token["content"], bool(token.get("special"))
    for token in tokenizer.get("added_tokens") or []:
        added[int(token["id"])] = token["content"], bool(token.get("special"))
    return added


def _set_added(vocabulary: Vocabulary, added: Mapping[int, tuple[str, bool]], rows: int) -> None:
    if any(number < 0 for number in added):
        raise ValueError(f"an added token with the id {min(added)}")
    outside = [text for number, (text, _) in added.items() if number >= rows]
    if outside:
        log.warning("added tokens %s have no row in the embedding (%d rows): left out", outside, rows)
    for number, (text, special) in sorted(added.items()):
        if number >= rows:
            continue
        _grow(vocabulary, number + 1)
        if vocabulary.types[number] == spm.UNKNOWN:
            continue
        control = special or _STEERING.fullmatch(text) is not None
        vocabulary.types[number] = spm.CONTROL if control else spm.USER_DEFINED
        # llama.cpp looks for such tokens in the text as it comes, before it marks spaces.
        vocabulary.tokens[number] = text if control or vocabulary.model == "gpt2" else text.replace(spm.SPACE, " ")
        if vocabulary.scores is not None:
            vocabulary.scores[number] = spm.ADDED_SCORE


def _grow(vocabulary: Vocabulary, size: int) -> None:
    missing = max(0, size - len(vocabulary.tokens))
    vocabulary.tokens += [""] * missing
    vocabulary.types += [spm.UNUSED] * missing
    if vocabulary.scores is not None:
        vocabulary.scores += [_FILLER_SCORE] * missing


def _fit(vocabulary: Vocabulary, rows: int, where: str) -> None:
    """Give the vocabulary as many tokens as the embedding has rows, each with a text of its own."""
    while len(vocabulary.tokens) > rows and not vocabulary.tokens[-1]:
        vocabulary.tokens.pop()
    beyond = [text for text, kind in zip(vocabulary.tokens[rows:], vocabulary.types[rows:], strict=False) if kind != spm.UNUSED]
    if beyond:
        raise InputError(
            f"{where}: {len(beyond)} tokens from {beyond[0]!r} on have no row in the embedding, which has {rows} rows"
        )
    del vocabulary.tokens[rows:], vocabulary.types[rows:]
    if vocabulary.scores is not None:
        del vocabulary.scores[rows:]
    _grow(vocabulary, rows)
    taken = set(vocabulary.tokens)
    for number, text in enumerate(vocabulary.tokens):
        if not text:
            filler = f"[PAD{number}]"
            while filler in taken:
                filler = f"[{filler}]"
            vocabulary.tokens[number], vocabulary.types[number] = filler, spm.UNUSED
    seen: dict[str, int] = {}
    for number, text in enumerate(vocabulary.tokens):
        if text in seen:
            raise InputError(f"{where}: tokens {seen[text]} and {number} are both {text!r}; llama.cpp needs texts that differ")
        seen[text] = number


def _special_tokens(
    vocabulary: Vocabulary, directory: Path, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, int]:
    """Ids by role: what the tokenizer's files name, then ``config.json``; ids without a row are left out."""
    numbers = {text: number for number, text in enumerate(vocabulary.tokens)}
    named = {**_object(directory / "special_tokens_map.json"), **settings}
    inner = config.get("text_config") or {}
    special = {}
    for role in _SPECIAL:
        token = named.get(f"{role}_token")
        number = numbers.get(str(token["content"] if isinstance(token, Mapping) else token)) if token else None
        if number is None:
            number = config.get(f"{role}_token_id", inner.get(f"{role}_token_id"))
            number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < len(vocabulary.tokens):
            special[role] = number
    return special


def _additions(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, bool]:
    """Whether bos and eos are put around a text: what ``tokenizer_config.json`` says, else the post-processor's template.

    A vocabulary without ``tokenizer.json`` gets what LlamaTokenizer does: bos, no eos.
    """
    ends = {"bos": not tokenizer and vocabulary.model == "llama", "eos": False}
    for step in parts(tokenizer.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing" and len(step.get("single", [])) > 1:
            for role, place in (("bos", 0), ("eos", -1)):
                text = step["single"][place].get("SpecialToken", {}).get("id")
                ends[role] = (
                    text is not None and role in vocabulary.special and (text == vocabulary.tokens[vocabulary.special[role]])
                )
    for role in ends:
        if isinstance(settings.get(f"add_{role}_token"), bool):
            ends[role] = settings[f"add_{role}_token"]
        # llama.cpp stops on a token it is told to add but not told of.
        ends[role] = ends[role] and role in vocabulary.special
    return ends


def _chat_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    template = settings.get("chat_template")
    if (directory / "chat_template.jinja").exists():
        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    elif template is None:
        template = _object(directory / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        template = [{"name": "default", "template": template}]
    templates = {str(each["name"]): str(each["template"]) for each in template or []}
    others = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    templates |= {file.stem: file.read_text(encoding="utf-8") for file in others}
    return {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in templates.items()}
