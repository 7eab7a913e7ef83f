"""Shared by tests of tokenizers in GGUF files: text that is hard to split, tokenizers trained on the spot, llama.cpp's ids."""

from __future__ import annotations

import json
import pydoc_data.topics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from eval.llamacpp_tools import find_tool, tool
from exports.gguf_file import GgufTensor, write_gguf

TOPICS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
NASTY = (
    "Hello  world!\n\n\n   indented\ttabs\r\nwindows  \n def f(x):\n\treturn x**2 # don't, we'LL, IT'S, I've\n"
    "1 22 333 4444 55555 3.14159 1,000,000 0x1F ½ ² ٣ naïve café Ωμέγα Привет мир こんにちは世界 你好，世界 한국어 สวัสดี "
    "🚀 👩‍👩‍👧 🇩🇪 …“quotes” <tag/> {json: [1, 2]} a_b__c $x = `y` ~~ == != && || \u200b\u00a0\u3000end "
)


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """Text with spaces, digits, emoji, code and many scripts, and a page of Python's help."""
    return NASTY, TOPICS[3][:3000]


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[..., Path]:
    """``save_tokenizer(tokenizer, path, **settings)``: write a tokenizer's files into ``path``, which is given back."""

    def save(tokenizer: Tokenizer, path: Path, **settings: Any) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}))
        return path

    return save


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., Tokenizer]:
    """``byte_level(pre_tokenizer, size=600, **options)``: byte-level BPE trained on text made to be split."""

    def train(pre_tokenizer: pre_tokenizers.PreTokenizer, size: int = 600, **options: Any) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(**options))
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([NASTY] * 50 + TOPICS[:20], trainer)
        return tokenizer

    return train


@pytest.fixture(scope="session")
def sentencepiece() -> Callable[..., Tokenizer]:
    """``sentencepiece(prefix=True, size=500)``: BPE over characters with bytes to fall back on, as Llama 2's tokenizer.json.

    It has every merge that its pieces allow; ``prefix`` puts a space in front of a text.
    """

    def make(prefix: bool = True, size: int = 500) -> Tokenizer:
        trained = Tokenizer(models.BPE(unk_token="<unk>"))
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, limit_alphabet=80)
        trained.train_from_iterator([NASTY] * 5 + TOPICS[:20], trainer)
        learnt = sorted(trained.get_vocab().items(), key=lambda item: item[1])
        texts = [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            *(text for text, _ in learnt if text != "<unk>"),
        ]
        vocabulary = {text: number for number, text in enumerate(texts)}
        merges = [
            (text[:cut], text[cut:])
            for text in texts[259:]
            for cut in range(1, len(text))
            if text[:cut] in vocabulary and text[cut:] in vocabulary
        ]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        marks = [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *marks] if prefix else marks)
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return tokenizer

    return make


@pytest.fixture
def llama_tokenize(tmp_path: Path) -> Callable[[Path, int, str], list[int]]:
    """``llama_tokenize(directory, rows, text)``: ids by llama.cpp, of a GGUF file with that directory's tokenizer.

    The file holds next to nothing else: llama-tokenize reads no tensors. Skips the test where llama.cpp is not there.
    """
    if find_tool("llama-tokenize") is None:
        pytest.skip("needs llama.cpp's llama-tokenize: `make llamacpp`")
    made: dict[Path, Path] = {}

    def encode(directory: Path, rows: int, text: str) -> list[int]:
        if directory not in made:
            config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
            embedding = GgufTensor("token_embd.weight", "F16", (rows, 32), lambda: np.zeros((rows, 32), np.float16))
            made[directory] = tmp_path / f"{len(made)}.gguf"
            write_gguf(made[directory], config=config, tokenizer_dir=directory, tensors=[embedding], file_type=1)
        file = tmp_path / "text.txt"
        file.write_bytes(text.encode())
        command = [
            str(tool("llama-tokenize")),
            "-m",
            str(made[directory]),
            "-f",
            str(file),
            "--ids",
            "--no-escape",
            "--log-disable",
        ]
        return [int(each) for each in json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)]

    return encode
