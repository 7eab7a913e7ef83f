"""Token windows: disjoint slices of one stream, chosen by the seed, with ids the model can embed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from calibration import windows
from calibration.sources import TextPart, load_text
from calibration.windows import pack_windows, token_stream
from quantize.errors import InputError

CHAT_TEMPLATE = "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CONTEXT = 64

PART = TextPart(tuple(f"Document {i} is about the number {i * i}.\nIt ends here." for i in range(60)), "text", "train")


def make_tokenizer(**options: object) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, double line breaks among them, and a BOS that it would add if it was let."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<bos>"], show_progress=False)
    bpe.train_from_iterator([*PART.documents, "a\n\n\n\nb\n\n\n\nc\n\n\n\n"] * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", model_max_length=CONTEXT, **options)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Messages of transformers, whose logger does not propagate to the root that caplog listens to."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    level = logger.level  # other tests' commands quieten it
    logger.setLevel(logging.WARNING)
    transformers_logging.add_handler(handler)
    yield messages
    transformers_logging.remove_handler(handler)
    logger.setLevel(level)


def test_stream_is_the_text_without_special_tokens(tokenizer: PreTrainedTokenizerFast, warnings: list[str]) -> None:
    stream = token_stream(tokenizer, PART.text)
    assert stream.dtype == torch.int64 and stream.ndim == 1
    assert len(stream) > CONTEXT
    assert 0 not in stream
    assert tokenizer.decode(stream.tolist()) == PART.text
    assert warnings == []


def test_length_warning_would_be_noticed(tokenizer: PreTrainedTokenizerFast, warnings: list[str]) -> None:
    tokenizer(PART.text)
    assert any("longer than the specified maximum" in message for message in warnings)


def test_empty_text_has_an_empty_stream(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = token_stream(tokenizer, "")
    assert stream.shape == (0,) and stream.dtype == torch.int64


@pytest.mark.parametrize("separator", ["\n\n", ""])
def test_all_windows_are_the_stream_in_order(tokenizer: PreTrainedTokenizerFast, separator: str, warnings: list[str]) -> None:
    part = TextPart(PART.documents, "text", "train", separator)
    packed = pack_windows(tokenizer, part, num_samples=-1, seq_len=32, seed=0)
    stream = token_stream(tokenizer, part.text)
    assert packed.dtype == torch.int64
    assert packed.shape == (len(stream) // 32, 32)
    assert torch.equal(packed.flatten(), stream[: packed.numel()])
    assert warnings == []


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20), limit=st.integers(1, 60))
def test_blocks_are_the_joined_text(sizes: list[int], limit: int) -> None:
    documents = [chr(ord("a") + i) * size for i, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_BLOCK_CHARACTERS", limit)
        blocks = list(windows._blocks(documents, "\n\n"))
    assert "".join(blocks) == "\n\n".join(documents)
    assert all(len(block) >= limit for block in blocks[:-1])


@settings(deadline=None)
@given(num_samples=st.integers(1, 20), seq_len=st.integers(1, 40), seed=st.integers(0, 2**63 - 1))
def test_windows_are_disjoint_slices(tokenizer: PreTrainedTokenizerFast, num_samples: int, seq_len: int, seed: int) -> None:
    # Ids that count upwards tell where in the stream a window was cut.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_stream", lambda *_: torch.arange(1000))
        packed = pack_windows(tokenizer, PART, num_samples=num_samples, seq_len=seq_len, seed=seed)
    assert packed.shape == (num_samples, seq_len)
    assert (packed[:, 0] % seq_len == 0).all()
    assert torch.equal(packed, packed[:, :1] + torch.arange(seq_len))
    assert len(set(packed.flatten().tolist())) == packed.numel()


def test_seed_decides_the_choice(tokenizer: PreTrainedTokenizerFast) -> None:
    def choose(seed: int, num_samples: int = 6) -> torch.Tensor:
        return pack_windows(tokenizer, PART, num_samples=num_samples, seq_len=16, seed=seed)

    assert torch.equal(choose(1), choose(1))
    assert not torch.equal(choose(1), choose(2))
    assert torch.equal(choose(1, 9)[:6], choose(1))


def test_choice_leaves_the_global_generator_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    pack_windows(tokenizer, PART, num_samples=2, seq_len=8, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_real_text_spans_many_blocks(tokenizer: PreTrainedTokenizerFast) -> None:
    part = load_text("builtin", "heldout")
    assert len(part.text) > 2 * windows._BLOCK_CHARACTERS
    packed = pack_windows(tokenizer, part, num_samples=-1, seq_len=128, seed=0)
    whole = part.text
    assert whole.startswith(tokenizer.decode(packed.flatten().tolist())[:-4])
    assert len(whole) - len(tokenizer.decode(packed.flatten().tolist())) < 128 * 8


def test_chat_template_writes_user_turns() -> None:
    chat = make_tokenizer(chat_template=CHAT_TEMPLATE)
    packed = pack_windows(chat, PART, num_samples=-1, seq_len=10, seed=0, chat_template=True)
    # One BOS per turn: the template's, none added on top.
    assert int((packed == 0).sum()) in (len(PART.documents) - 1, len(PART.documents))
    text = chat.decode(packed.flatten().tolist())
    assert text.startswith(f"<bos>user: {PART.documents[0]}\n<bos>user: {PART.documents[1]}\n")


def test_chat_template_missing(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"calibration\.chat_template=true .*calibration\.chat_template=false"):
        pack_windows(tokenizer, PART, num_samples=1, seq_len=8, seed=0, chat_template=True)


def test_chat_template_that_refuses_a_user_turn() -> None:
    chat = make_tokenizer(chat_template="{{ raise_exception('a system turn\nmust come first') }}")
    with pytest.raises(InputError, match=r"single user turn \(a system turn must come first\); use .*=false"):
        pack_windows(chat, PART, num_samples=1, seq_len=8, seed=0, chat_template=True)


def test_too_short_text_names_what_fits(tokenizer: PreTrainedTokenizerFast) -> None:
    found = len(token_stream(tokenizer, PART.text))
    with pytest.raises(InputError) as caught:
        pack_windows(tokenizer, PART, num_samples=100, seq_len=16, seed=0, key="eval")
    assert f"gives {found} tokens but eval.num_samples=100 windows of eval.seq_len=16 need 1600" in str(caught.value)
    assert f"use eval.num_samples={found // 16} or eval.seq_len={found // 100} or a longer text" in str(caught.value)
    # Either proposal works.
    pack_windows(tokenizer, PART, num_samples=found // 16, seq_len=16, seed=0)
    pack_windows(tokenizer, PART, num_samples=100, seq_len=found // 100, seed=0)


@pytest.mark.parametrize("num_samples", [1, -1])
def test_text_shorter_than_a_window(tokenizer: PreTrainedTokenizerFast, num_samples: int) -> None:
    part = TextPart(("abc",), "text", "train")
    with pytest.raises(InputError, match=r"gives \d tokens .* need 512; use calibration\.seq_len=\d or a longer text$"):
        pack_windows(tokenizer, part, num_samples=num_samples, seq_len=512, seed=0)


def test_foreign_tokenizer_is_found_out(tokenizer: PreTrainedTokenizerFast) -> None:
    largest = int(token_stream(tokenizer, PART.text).max())
    pack = partial(pack_windows, tokenizer, PART, num_samples=1, seq_len=8, seed=0)
    with pytest.raises(InputError, match=rf"makes token id {largest} but the embedding has only {largest} rows"):
        pack(vocab_size=largest)
    pack(vocab_size=largest + 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": 0}, r"calibration\.num_samples=0 .*num_samples=128, or -1 for all"),
        ({"num_samples": -2}, r"calibration\.num_samples=-2 "),
        ({"seq_len": 0}, r"calibration\.seq_len=0 .*seq_len=2048"),
        ({"seed": -1}, r"calibration\.seed=-1 .*seed=0"),
        ({"seed": 2**63}, r"calibration\.seed=9223372036854775808 "),
    ],
)
def test_number_out_of_range(tokenizer: PreTrainedTokenizerFast, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack_windows(tokenizer, PART, **{"num_samples": 1, "seq_len": 8, "seed": 0, **changed})
