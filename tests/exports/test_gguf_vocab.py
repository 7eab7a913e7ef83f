"""Vocabularies in GGUF files: what they hold, what is refused, and that llama.cpp encodes as the tokenizer does."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from exports.gguf_sentencepiece import read_model
from exports.gguf_vocab import Vocabulary, read_vocabulary
from quantize.errors import InputError

Make = Callable[..., Tokenizer]
Save = Callable[..., Path]
Llama2 = tuple[Tokenizer, Path, Vocabulary]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def model_file(vocabulary: Vocabulary, model_type: int = 2, prefix: bool = True) -> bytes:
    """The same pieces as tokenizer.model: fields 1 (pieces: text, score, type), 2.3 (model type), 3.3 (add_dummy_prefix)."""

    def field(number: int, data: bytes) -> bytes:
        size, length = len(data), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + data

    data = b""
    for text, score, kind in zip(vocabulary.tokens, vocabulary.scores or [], vocabulary.types, strict=True):
        data += field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))
    return data + field(2, bytes([0x18, model_type])) + field(3, bytes([0x18, prefix]))


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """What llama.cpp's ``llama`` tokenizer does (llm_tokenizer_spm): join the neighbours of highest score, then bytes."""
    numbers = {piece: number for number, piece in enumerate(vocabulary.tokens)}
    scores = vocabulary.scores or []
    symbols = list(((" " if vocabulary.add_space_prefix else "") + text).replace(" ", "▁")) if text else []
    while True:
        pairs = [(-scores[numbers[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in numbers]
        if not pairs:
            break
        place = min(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    found: list[int] = []
    for symbol in symbols:
        if symbol in numbers:
            found.append(numbers[symbol])
        else:
            found += [numbers[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory, sentencepiece: Make, save_tokenizer: Save) -> Llama2:
    tokenizer = sentencepiece()
    path = save_tokenizer(
        tokenizer, tmp_path_factory.mktemp("vocab") / "llama2", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return tokenizer, path, read_vocabulary(path, {}, tokenizer.get_vocab_size())


def test_byte_level_bpe(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, {}, 304)
    backend = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]
    assert (found.model, found.pre, found.scores, found.add_space_prefix) == ("gpt2", "gpt-2", None, None)
    assert found.tokens[:2] == ["<s>", "</s>"]
    assert {text: number for number, text in enumerate(found.tokens[:300])} == backend["vocab"]
    assert found.tokens[300:] == ["[PAD300]", "[PAD301]", "[PAD302]", "[PAD303]"]
    assert found.types == [CONTROL] * 2 + [NORMAL] * 298 + [UNUSED] * 4
    assert found.merges == [" ".join(pair) for pair in backend["merges"]]
    assert found.special == {"bos": 0, "eos": 1, "pad": 1}
    assert found.add == {"bos": False, "eos": False}


def test_merges_are_read_in_both_spellings(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    pairs = read_vocabulary(tmp_path, {}, 300)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    assert isinstance(stored["model"]["merges"][0], list)
    stored["model"]["merges"] = [" ".join(pair) for pair in stored["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert read_vocabulary(tmp_path, {}, 300) == pairs


def test_tokenizers_without_tokenizer_json(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """GPT-2's old files: what transformers makes of them."""
    tiny_tokenizer.save_pretrained(tmp_path / "new")
    backend = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(backend["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in backend["merges"]))
    (old / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"})
    )
    (old / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    found, expected = read_vocabulary(old, {}, 300), read_vocabulary(tmp_path / "new", {}, 300)
    assert (found.tokens, found.merges, found.pre) == (expected.tokens, expected.merges, "gpt-2")


def test_sentencepiece_json(llama2: Llama2) -> None:
    tokenizer, _, found = llama2
    assert (found.model, found.pre, found.merges, found.add_space_prefix) == ("llama", "default", None, True)
    assert found.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert found.types[258:260] == [BYTE, NORMAL]
    assert found.tokens[13] == "<0x0A>"
    assert found.special == {"bos": 1, "eos": 2, "unk": 0}
    assert found.add == {"bos": True, "eos": False}
    assert found.scores is not None
    assert len(found.tokens) == len(found.scores) == len(found.types) == tokenizer.get_vocab_size()


@given(text=st.text(st.sampled_from("aeinorst  \n.,def(self)é🚀 ▁"), max_size=40))
def test_scores_say_what_merges_say(llama2: Llama2, text: str) -> None:
    tokenizer, _, found = llama2
    assert encode(found, text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_scores_say_what_merges_say_of_real_text(llama2: Llama2, texts: tuple[str, ...]) -> None:
    tokenizer, _, found = llama2
    for text in (texts[0], texts[1][:600]):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert len(ids) < len(text.encode())
        assert encode(found, text) == ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_model(tmp_path: Path, sentencepiece: Make, save_tokenizer: Save, prefix: bool) -> None:
    tokenizer = sentencepiece(prefix)
    path = save_tokenizer(tokenizer, tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    expected = read_vocabulary(path, {}, 800)
    assert expected.add_space_prefix == prefix
    (path / "tokenizer.model").write_bytes(model_file(read_vocabulary(path, {}, tokenizer.get_vocab_size()), prefix=prefix))
    assert read_vocabulary(path, {}, 800) == expected
    (path / "tokenizer.json").unlink()
    alone = read_vocabulary(path, {"bos_token_id": 1}, 800)
    assert (alone.tokens, alone.add, alone.special) == (expected.tokens, expected.add, expected.special)


def test_damaged_and_unigram_models_are_refused(tmp_path: Path, llama2: Llama2) -> None:
    _, _, vocabulary = llama2
    whole = model_file(vocabulary)
    file = tmp_path / "tokenizer.model"
    for data in (b"", b"\x00\x01", whole[:-3], whole[:100], b"no protobuf at all"):
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"tokenizer\.model is no SentencePiece model"):
            read_vocabulary(tmp_path, {}, 800)
    file.write_bytes(model_file(vocabulary, model_type=1))
    with pytest.raises(InputError, match=r"model_type=1; llama\.cpp's llama tokenizer needs BPE"):
        read_vocabulary(tmp_path, {}, 800)


@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_model_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.model"
    file.write_bytes(data)
    with contextlib.suppress(InputError):
        assert read_model(file).texts


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    stored = json.loads((path / "tokenizer.json").read_text())
    edit(stored)
    (path / "tokenizer.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda stored: stored["model"]["merges"].pop(), r"is a piece, but .* is no merge"),
        (lambda stored: stored["model"]["merges"].append(stored["model"]["merges"][0]), r"merges into .* stand apart"),
        (lambda stored: stored.update(normalizer={"type": "Lowercase"}), r"normalizer .*Lowercase.* has no counterpart"),
        (
            lambda stored: stored.update(pre_tokenizer={"type": "Whitespace"}),
            r"pre-tokenizer .*Whitespace.* has no counterpart",
        ),
        (lambda stored: stored["model"].update(byte_fallback=False), r"BPE without bytes"),
        (lambda stored: stored["model"].update(type="Unigram"), r"model type 'Unigram' cannot become GGUF"),
        (lambda stored: stored["model"].pop("merges"), r"are not of the form that transformers writes \(KeyError"),
        (lambda stored: stored["model"].update(vocab=[1]), r"are not of the form that transformers writes"),
        (
            lambda stored: stored["model"]["vocab"].update(x=10**12),
            r"token 'x' has id 1000000000000; ids differ, and lie from 0",
        ),
        (lambda stored: stored["model"]["vocab"].update(x=5), r"has id 5; ids differ"),
        (lambda stored: stored["added_tokens"][0].update(id=-1), r"an added token with the id -1"),
    ],
)
def test_vocabularies_that_llama_cpp_does_not_have_are_refused(
    tmp_path: Path, sentencepiece: Make, save_tokenizer: Save, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = save_tokenizer(sentencepiece(), tmp_path)
    change(path, edit)
    with pytest.raises(InputError, match=message):
        read_vocabulary(path, {}, 800)


def test_added_tokens(tmp_path: Path, sentencepiece: Make, save_tokenizer: Save, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = sentencepiece()
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["▁▁▁", "<tool>", "<|im_start|>", "<beyond>"])
    found = read_vocabulary(save_tokenizer(tokenizer, tmp_path), {}, size + 3)
    assert found.tokens[size:] == ["   ", "<tool>", "<|im_start|>"]
    assert found.types[size:] == [USER_DEFINED, USER_DEFINED, CONTROL]
    assert "['<beyond>'] have no row in the embedding" in caplog.text
    with pytest.raises(InputError, match=r"have no row in the embedding, which has 300 rows"):
        read_vocabulary(tmp_path, {}, 300)


def test_fillers_are_new_texts(tmp_path: Path, byte_level: Make, save_tokenizer: Save) -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), 300)
    tokenizer.add_tokens(["[PAD303]"])
    found = read_vocabulary(save_tokenizer(tokenizer, tmp_path), {}, 305)
    assert found.tokens[300:] == ["[PAD303]", "[PAD301]", "[PAD302]", "[[PAD303]]", "[PAD304]"]


@pytest.mark.parametrize(
    ("single", "settings", "expected"),
    [
        ("<s> $A </s>", {}, (True, True)),
        ("$A </s>", {}, (False, True)),
        ("<s> $A", {"add_bos_token": False}, (False, False)),
        ("$A", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("</s> $A", {}, (False, False)),
        ("<s> $A", {"bos_token": None}, (False, False)),
    ],
)
def test_what_is_added_to_a_text(
    tmp_path: Path, byte_level: Make, save_tokenizer: Save, single: str, settings: dict[str, Any], expected: tuple[bool, bool]
) -> None:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), 300)
    template = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    path = save_tokenizer(tokenizer, tmp_path, **{"bos_token": "<s>", "eos_token": {"content": "</s>"}, **settings})
    found = read_vocabulary(path, {}, 300)
    assert (found.add["bos"], found.add["eos"]) == expected


def test_special_tokens_come_from_files_then_from_the_configuration(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "pad_token": "<missing>"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"unk_token": {"content": "</s>"}, "bos_token": "</s>"}))
    config = {"bos_token_id": 7, "eos_token_id": [9, 10], "pad_token_id": 4000}
    assert read_vocabulary(tmp_path, config, 300).special == {"bos": 0, "eos": 9, "unk": 1}


def test_chat_templates(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    assert read_vocabulary(tmp_path, {}, 300).templates == {}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ a }}"}))
    assert read_vocabulary(tmp_path, {}, 300).templates == {"default": "{{ a }}"}
    several = [{"name": "default", "template": "{{ b }}"}, {"name": "tool use", "template": "{{ c }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    found = read_vocabulary(tmp_path, {}, 300)
    writer = gguf.GGUFWriter(None, "llama")
    found.add_to(writer)
    stored = {key: value.value for key, value in writer.kv_data[0].items()}
    assert stored["tokenizer.chat_template"] == "{{ b }}"
    assert stored["tokenizer.chat_template.tool_use"] == "{{ c }}"
    assert stored["tokenizer.chat_templates"] == ["tool_use"]
    (tmp_path / "chat_template.jinja").write_text("{{ d }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ e }}")
    assert read_vocabulary(tmp_path, {}, 300).templates == {"default": "{{ d }}", "rag": "{{ e }}"}


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no usable tokenizer"):
        read_vocabulary(tmp_path, {}, 300)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_encodes_sentencepiece_alike(
    tmp_path: Path,
    sentencepiece: Make,
    save_tokenizer: Save,
    texts: tuple[str, ...],
    llama_tokenize: Callable[[Path, int, str], list[int]],
    prefix: bool,
) -> None:
    tokenizer = sentencepiece(prefix)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<|im_start|>", normalized=False)])
    path = save_tokenizer(tokenizer, tmp_path / "spm", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for text in (*texts, "x<tool>y", "<|im_start|>y"):
        assert llama_tokenize(path, tokenizer.get_vocab_size(), text) == tokenizer.encode(text).ids
