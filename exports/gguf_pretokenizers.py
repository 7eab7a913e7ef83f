"""Which of llama.cpp's pre-tokenizers splits text the way a ``tokenizer.json`` does: the value of ``tokenizer.ggml.pre``.

llama.cpp knows pre-tokenizers by name, each a list of regular expressions applied one after another (``llm_tokenizer_bpe``
in ``src/llama-vocab.cpp``). ``tokenizer.json`` writes the same steps out (https://huggingface.co/docs/tokenizers/api/pre-tokenizers).
Here its steps are brought to one spelling and looked up, so a name is given only where both split alike. llama.cpp applies no
Unicode normalization: text that NFC would change is encoded as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from quantize.errors import InputError

_DIGIT, _CJK = r"\p{N}", "[一-龥\u3040-ゟ゠-ヿ]+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# [CONTRACTIONS] stands for 's 't 're 've 'm 'll 'd in any case, however a regular expression spells it.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"[CONTRACTIONS]|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"[CONTRACTIONS]|{_WORDS}|\p{{N}}|{_REST}"
_QWEN35 = r"[CONTRACTIONS]|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_CASED_REST}"
_GPT4O = rf"{_CASED % ('[CONTRACTIONS]?', '[CONTRACTIONS]?')}|\p{{N}}{{1,3}}|{_CASED_REST}"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

# Steps and whether whole words found in the vocabulary skip the merges (llama.cpp's ignore_merges): the name.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    ((r"\p{N}{1,3}", _CJK, _DEEPSEEK3), False): "deepseek-v3",
    ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", _DIGIT), False): "deepseek-coder",
    ((_BLOOM,), False): "bloom",
    ((_BLOOM, _DIGIT), False): "viking",
}
KNOWN = tuple(dict.fromkeys(_NAMES.values()))

_CONTRACTIONS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    "'(?i:[sdmt]|ll|ve|re)",
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
)


def pre_tokenizer_name(tokenizer: Mapping[str, Any], where: str, chosen: str | None = None) -> str:
    """``tokenizer.ggml.pre`` for a byte-level BPE ``tokenizer.json``.

    Args:
        tokenizer: the parsed file.
        where: the file's path, for messages.
        chosen: a name to take as it is, whatever the file says.

    Raises:
        InputError: llama.cpp has no pre-tokenizer, known here, that splits like this one.
    """
    if chosen is not None:
        return chosen
    steps = _steps(tokenizer)
    name = _NAMES.get((steps, bool(tokenizer["model"].get("ignore_merges")))) if steps is not None else None
    if name is None:
        found = json.dumps({key: tokenizer.get(key) for key in ("normalizer", "pre_tokenizer")}, ensure_ascii=False)
        ignore = tokenizer["model"].get("ignore_merges", False)
        raise InputError(
            f"{where}: pre-tokenizer {found} with ignore_merges={ignore} is none of those known here ({', '.join(KNOWN)}); "
            "if llama.cpp has one that splits alike, name it: --pre NAME (pre=NAME in Python), like --pre gpt-2"
        )
    return name


def _steps(tokenizer: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The regular expressions that split text, in order; None where a step is no splitting by one of them."""
    normalizers = parts(tokenizer.get("normalizer"), "normalizers")
    if any(each["type"] != "NFC" for each in normalizers):
        return None
    steps: list[str] = []
    for part in parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = part["type"]
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            steps += [_GPT2] if part.get("use_regex", True) else []
        elif kind == "Digits" and part.get("individual_digits"):
            steps.append(_DIGIT)
        elif kind == "Split" and "Regex" in part["pattern"] and _isolates(part):
            steps.append(_spelled(part["pattern"]["Regex"]))
        else:
            return None
    return tuple(steps)


def _isolates(part: Mapping[str, Any]) -> bool:
    behavior, invert = part.get("behavior", "Isolated"), bool(part.get("invert"))
    # The expressions known here match every character, so removing what does not match removes nothing.
    return (behavior, invert) in (("Isolated", False), ("Removed", True))


def _spelled(regex: str) -> str:
    """One spelling for expressions that match alike."""
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    for spelling in _CONTRACTIONS:
        regex = regex.replace(spelling, "[CONTRACTIONS]")
    regex = regex.replace("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d")
    # Possessive quantifiers only forbid backtracking that these expressions never need.
    regex = re.sub(r"(?<=[\]}?+*\w])([?+*])\+", r"\1", regex)
    if regex == _GPT2.removesuffix(r"|\s+"):
        return _GPT2
    return regex


def parts(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor: a ``Sequence`` (its list is under ``key``) laid flat."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for each in step[key] for part in parts(each, key)]
    return [step]
