"""Protocols: each cuts a text as the program it is named after, and words and bytes are those of the scored tokens."""

from __future__ import annotations

import hashlib
import importlib
import re
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from eval import streams, texts
from eval.protocols import Plan, Window, plan, rolling_windows, sliding_windows
from eval.streams import Stream, tokenise
from quantize.checks import check_eval
from quantize.config import EvalConfig
from quantize.errors import InputError

PROSE = "Grüße aus  Köln, \U0001f600 said he .\nSecond line\twith a tab\r\n\r\n = Heading = \n and the end. " * 12


def planned(tokenizer: Any, path: Path, content: str | bytes, **options: Any) -> Plan:
    """The plan of a protocol on a text."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = EvalConfig(str(path), **options)
    check_eval(config)
    return plan(config, tokenizer)


def scored(windows: list[Window]) -> list[int]:
    """All scored ids, in order."""
    return [int(token) for window in windows for token in window.ids[window.first :]]


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer with BOS in front of every text."""
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


# Texts.


def test_line_ends_are_read_as_python_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"a\r\nb\rc\nd")
    with file.open(encoding="utf-8") as stream:
        assert texts.read_text(str(file), "all", 0.2) == stream.read() == "a\nb\nc\nd"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (b"one\r\ntwo\r\n", "one\r\ntwo\r"),
        (b"end\n\n", "end\n"),
        (rb"a\nb\x41\\", "a\\nb\\x41\\\\"),
    ],
)
def test_llamacpp_reads_the_bytes_as_they_are(tmp_path: Path, stored: bytes, expected: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(stored)
    assert texts.read_as_llamacpp(str(file), "all", 0.2) == expected


def test_lines_are_joined_as_rows_of_the_data_set() -> None:
    raw = " \n = Title = \n \n Some text .\nlast"
    rows = ["", " = Title = \n", "", " Some text .\n", "last"]
    assert texts.join_lines(raw) == "\n\n".join(rows)


def test_pages_are_cut_before_top_level_headings() -> None:
    raw = "\n = One = \n\n text = 3 \n = = Section = = \n more\n = Two = \n text\n"
    assert texts.pages(raw) == [" = One = \n\n text = 3 \n = = Section = = \n more", " = Two = \n text\n"]


WIKI = " the boys ' game : 3 @.@ 5 @-@ inch ( \" very small \" ) , it 's [ 12 ] ; a ' quoted ' = = Part = = \n 5 ° N x ! "


@given(st.text(alphabet=string.ascii_letters + " '\"()[]{}=@.,-:;!?\n°N5s", max_size=200))
def test_detokenising_is_lm_evals(noise: str) -> None:
    module = importlib.import_module("lm_eval.tasks.wikitext.preprocess_wikitext")
    for page in (WIKI, noise):
        assert texts.detokenize(page) == module.wikitext_detokenizer({"page": page})


# Streams.


@given(st.text(alphabet="ab é😀\n\t .", min_size=1, max_size=60), st.data())
def test_every_byte_and_word_belongs_to_one_token(
    tiny_tokenizer: PreTrainedTokenizerFast, text: str, data: st.DataObject
) -> None:
    (stream,) = tokenise(tiny_tokenizer, [text])
    count = len(stream.ids)
    assert stream.extent(0, count) == (len(text.split()), len(text.encode()))
    cut = data.draw(st.integers(0, count))
    left, right = stream.extent(0, cut), stream.extent(cut, count)
    assert None not in (*left, *right)
    assert [a + b for a, b in zip(left, right, strict=True)] == [len(text.split()), len(text.encode())]  # type: ignore[operator]


def test_tokenised_texts_are_kept_and_found_again(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenise(tiny_tokenizer, [PROSE, "", "short"], cache=tmp_path)
    monkeypatch.setattr(streams, "_stream", lambda *_: pytest.fail("tokenised again"))
    again = tokenise(tiny_tokenizer, [PROSE, "", "short"], cache=tmp_path)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert one.extent(0, len(one.ids)) == other.extent(0, len(one.ids))


def test_a_damaged_cache_is_made_again(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (expected,) = tokenise(tiny_tokenizer, [PROSE], cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(tokenise(tiny_tokenizer, [PROSE], cache=tmp_path)[0].ids, expected.ids)


# Protocols.


def test_gptq_joins_the_lines_and_scores_all_but_each_windows_first(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = planned(tiny_tokenizer, tmp_path / "text.txt", PROSE, protocol="gptq", seq_len=50, windows=-1)
    read = PROSE.replace("\r\n", "\n")
    expected = tiny_tokenizer(texts.join_lines(read))["input_ids"]
    assert [window.ids.tolist() for window in found.windows] == [
        expected[start : start + 50] for start in range(0, len(expected) - 49, 50)
    ]
    assert all(window.first == 1 for window in found.windows)
    assert found.protocol.text_sha256 == hashlib.sha256(read.encode()).hexdigest()
    assert found.protocol.tokens == 49 * len(found.windows)


@pytest.mark.parametrize(("context", "bos"), [(16, False), (17, False), (16, True)])
def test_llamacpp_scores_what_lies_behind_the_middle(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, context: int, bos: bool
) -> None:
    tokenizer = adds_bos(tiny_tokenizer) if bos else tiny_tokenizer
    found = planned(tokenizer, tmp_path / "text.txt", PROSE, protocol="llamacpp", seq_len=context, windows=3)
    expected = tokenizer(PROSE)["input_ids"]
    for number, window in enumerate(found.windows):
        ids = expected[number * context : (number + 1) * context]
        assert window.ids.tolist() == ([tokenizer.bos_token_id, *ids[1:]] if bos else ids)
        assert len(window.ids) - window.first == context - context // 2 - 1
    assert found.protocol.bos is bos
    assert found.protocol.tokens == 3 * (context - context // 2 - 1)


def test_llamacpp_takes_spelled_out_special_tokens_for_text(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = planned(tiny_tokenizer, tmp_path / "text.txt", "a </s> b " * 40, protocol="llamacpp", seq_len=16, windows=2)
    assert tiny_tokenizer.eos_token_id not in scored(found.windows)


@given(length=st.integers(2, 120), window=st.integers(3, 30), data=st.data())
def test_strided_scores_every_token_but_the_first_once(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    windows = sliding_windows(Stream(torch.arange(length)), window, stride, ragged=True)
    assert scored(windows) == list(range(1, length))
    assert all(len(each.ids) <= window for each in windows)


@given(length=st.integers(2, 120), window=st.integers(2, 30))
def test_no_window_is_without_a_scored_token(length: int, window: int) -> None:
    windows = sliding_windows(Stream(torch.arange(length)), window, window, ragged=True)
    assert all(each.first < len(each.ids) for each in windows)


@given(length=st.integers(0, 100), window=st.integers(1, 30))
def test_rolling_windows_are_lm_evals(length: int, window: int) -> None:
    utils = importlib.import_module("lm_eval.utils")
    tokens, prefix = list(range(length)), 999
    expected = [
        utils.make_disjoint_window(pair)
        for pair in utils.get_rolling_token_windows(tokens, prefix_token=prefix, max_seq_len=window, context_len=1)
    ]
    found = rolling_windows(torch.arange(length), window, prefix)
    assert [(ids[:first].tolist(), ids[first:].tolist()) for ids, first in found] == expected


def test_wikitext_scores_whole_pages_and_counts_what_is_stored(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    content = "\n = One = \n words ( in brackets ) .\n" + " = Two = \n" + "more words , and more\n" * 9
    found = planned(tiny_tokenizer, tmp_path / "text.txt", content, protocol="wikitext", seq_len=20, windows=-1)
    pages = texts.pages(content)
    assert len(pages) == 2
    assert scored(found.windows) == [t for page in pages for t in tiny_tokenizer(texts.detokenize(page))["input_ids"]]
    assert found.protocol.words == sum(len(re.split(r"\s+", page)) for page in pages)
    assert found.protocol.bytes == len(content.encode()) - 2  # the line ends before the pages
    one = planned(tiny_tokenizer, tmp_path / "text.txt", content, protocol="wikitext", seq_len=20, windows=1)
    assert one.protocol.bytes == len(pages[0].encode())


def test_a_plan_is_known_by_what_it_shows_and_asks(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    options = {"protocol": "windows", "seq_len": 32, "windows": 3}
    first = planned(tiny_tokenizer, tmp_path / "a.txt", PROSE, **options)
    assert first.fingerprint() == planned(tiny_tokenizer, tmp_path / "b.txt", PROSE, **options).fingerprint()
    assert first.fingerprint() != planned(tiny_tokenizer, tmp_path / "a.txt", "x" + PROSE, **options).fingerprint()
    assert first.fingerprint() != planned(tiny_tokenizer, tmp_path / "a.txt", PROSE, **{**options, "stride": 31}).fingerprint()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"protocol": "c4"}, "eval.protocol=c4 is unknown; use one of windows, gptq"),
        ({"protocol": "gptq", "bos": True}, "eval.bos=true is not for eval.protocol=gptq"),
        ({"protocol": "llamacpp", "stride": 4}, "eval.stride=4 is not for eval.protocol=llamacpp"),
        ({"protocol": "gptq", "stride": 4096}, "eval.stride=4096 is not for"),
        ({"windows": -2}, "eval.windows=-2 is below 1"),
        ({"protocol": "llamacpp", "seq_len": 2}, "eval.seq_len=2 is below 3"),
        ({"top_k": 0}, "eval.top_k=0 is below 1"),
        ({"protocol": "llamacpp", "seq_len": 100_000}, "needs two windows of eval.seq_len=100000; use eval.seq_len="),
        ({"protocol": "wikitext", "windows": 10_000}, r"the text has \d+ pages; use eval.windows="),
        ({"protocol": "gptq", "windows": 10_000}, r"room for \d windows of eval.seq_len=2048|room for 0 windows"),
    ],
)
def test_an_impossible_protocol_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        planned(tiny_tokenizer, tmp_path / "text.txt", PROSE, **options)
