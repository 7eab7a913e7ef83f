"""Which of llama.cpp's pre-tokenizers a tokenizer.json is given, and that it splits alike."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from exports.gguf_pretokenizers import KNOWN, pre_tokenizer_name
from exports.gguf_vocab import read_vocabulary
from quantize.checkpoint import load_tokenizer
from quantize.demo_model import demo_model
from quantize.errors import InputError

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(*regexes: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(each), behavior, invert) for each in regexes), BYTES])


# As the published tokenizers write them, and whether they ignore merges.
PRE_TOKENIZERS: dict[str, tuple[pre_tokenizers.PreTokenizer, bool, str]] = {
    "gpt2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
    "smollm": (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        False,
        "smollm",
    ),
    "llama-3": (split(rf"{ANY_CASE}|{LETTERS}|\p{{N}}{{1,3}}{REST}"), True, "llama-bpe"),
    "phi-4": (
        split(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        False,
        "dbrx",
    ),
    "qwen2": (split(rf"{ANY_CASE}|{LETTERS}|\p{{N}}{REST}"), False, "qwen2"),
    "qwen2-inverted": (split(rf"{ANY_CASE}|{LETTERS}|\p{{N}}{REST}", behavior="removed", invert=True), False, "qwen2"),
    "qwen3.5": (
        split(ANY_CASE + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        False,
        "qwen35",
    ),
    "mistral-nemo": (split(CASED % ("", "", r"\p{N}")), True, "tekken"),
    "gpt-4o": (split(CASED % (f"{ANY_CASE}?", f"{ANY_CASE}?", r"\p{N}{1,3}")), False, "gpt-4o"),
    "deepseek-coder": (
        pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(each), "isolated") for each in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+")),
                pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-\ud7ff]+"), "isolated"),
                pre_tokenizers.Digits(individual_digits=True),
                BYTES,
            ]
        ),
        False,
        "deepseek-coder",
    ),
    "deepseek-v3": (
        split(
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        False,
        "deepseek-v3",
    ),
    "bloom": (split(r" ?[^(\s|.,!?…。，、।۔،)]+"), False, "bloom"),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_recognized(name: str) -> None:
    pre_tokenizer, ignore_merges, expected = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    stored = json.loads(tokenizer.to_str())
    assert pre_tokenizer_name(stored, "tokenizer.json") == expected
    stored["normalizer"] = {"type": "NFC"}
    assert pre_tokenizer_name(stored, "tokenizer.json") == expected
    assert expected in KNOWN
    for changed in ({"normalizer": {"type": "Lowercase"}}, {"model": {**stored["model"], "ignore_merges": not ignore_merges}}):
        if name in ("llama-3", "phi-4") and "model" in changed:
            continue  # llama.cpp has this one both ways
        with pytest.raises(InputError, match="none of those known here"):
            pre_tokenizer_name({**stored, **changed}, "tokenizer.json")


def test_unknown_pre_tokenizers_are_refused_unless_named(
    tmp_path: Path, byte_level: Callable[..., Tokenizer], save_tokenizer: Callable[..., Path]
) -> None:
    tokenizer = byte_level(split(r"\p{L}+|\s+"), 300)
    path = save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(InputError) as caught:
        read_vocabulary(path, {}, 300)
    message = str(caught.value)
    assert str(path / "tokenizer.json") in message
    assert r"\\p{L}+|\\s+" in message
    assert "--pre gpt-2" in message
    assert read_vocabulary(path, {}, 300, pre="falcon").pre == "falcon"


@pytest.mark.slow
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_splits_alike(
    tmp_path: Path,
    byte_level: Callable[..., Tokenizer],
    save_tokenizer: Callable[..., Path],
    texts: tuple[str, ...],
    llama_tokenize: Callable[[Path, int, str], list[int]],
    name: str,
) -> None:
    pre_tokenizer, ignore_merges, _ = PRE_TOKENIZERS[name]
    tokenizer = byte_level(pre_tokenizer, 1500, ignore_merges=ignore_merges)
    path = save_tokenizer(tokenizer, tmp_path / name, bos_token="<s>", eos_token="</s>")
    for text in texts:
        if name in ("mistral-nemo", "gpt-4o"):
            # llama.cpp's expressions for these two know no combining marks.
            text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("M"))
        assert llama_tokenize(path, tokenizer.get_vocab_size(), text) == tokenizer.encode(text).ids


@pytest.mark.slow
def test_llama_cpp_encodes_the_demo_model_alike(
    texts: tuple[str, ...], llama_tokenize: Callable[[Path, int, str], list[int]]
) -> None:
    path = demo_model()
    tokenizer = load_tokenizer(path, path)
    for text in (*texts, "<|im_start|>user\nHello  there<|im_end|>\n"):
        assert llama_tokenize(path, 49152, text) == tokenizer(text)["input_ids"]
