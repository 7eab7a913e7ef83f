"""Token windows: documents become one stream of token ids, and the stream is cut in windows of equal length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calibration.sources import TextPart
from quantize.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters that are tokenised as one string: long enough for the borders between strings not to matter.
_BLOCK_CHARACTERS = 1 << 15
# Strings per tokenizer call: enough to fill its threads; its bookkeeping takes far more memory than the ids.
_BATCH = 64


def token_stream(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokenise one text as one string, without special tokens: what perplexity is measured on.

    Returns:
        int64 ``[n]``, n the number of tokens, which may exceed the model's context.
    """
    return _stream(tokenizer, [text])


def pack_windows(
    tokenizer: PreTrainedTokenizerBase,
    part: TextPart,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    chat_template: bool = False,
    vocab_size: int | None = None,
    key: str = "calibration",
) -> Tensor:
    """Pack the documents of ``part`` into windows of tokens.

    The documents form one stream, without special tokens and with ``part.separator`` between them; the stream is cut in
    windows that do not overlap, and a seeded permutation chooses among them. A longer choice with the same seed starts
    with the shorter one. The same arguments give equal tensors.

    Args:
        tokenizer: tokenizer of the model.
        part: the text.
        num_samples: windows to return, 1 or more; -1 for all of them, in the order of the text.
        seq_len: tokens in a window, 1 or more.
        seed: seed of the choice, 0 or more.
        chat_template: write each document as a user turn of the tokenizer's chat template, special tokens included.
        vocab_size: rows of the model's embedding, to check the token ids against.
        key: the config group that errors name.

    Returns:
        int64 ``[num_samples, seq_len]`` on the CPU.

    Raises:
        InputError: a number is out of range, the text is too short, the tokenizer has no chat template, or a token id
            has no row in the embedding.
    """
    _check_numbers(num_samples, seq_len, seed, key)
    strings = _chat_turns(tokenizer, part.documents, key) if chat_template else _blocks(part.documents, part.separator)
    stream = _stream(tokenizer, strings)
    found = stream.numel()
    if found < seq_len * max(num_samples, 1):
        raise _too_short(part, found, num_samples, seq_len, key)
    if vocab_size is not None and (largest := int(stream.max())) >= vocab_size:
        raise InputError(
            f"{key}: the tokenizer makes token id {largest} but the embedding has only {vocab_size} rows; the tokenizer"
            " belongs to another model: use the tokenizer files that came with the checkpoint"
        )
    windows = stream[: found // seq_len * seq_len].view(-1, seq_len)
    if num_samples == -1:
        return windows
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)[:num_samples]]


def _check_numbers(num_samples: int, seq_len: int, seed: int, key: str) -> None:
    if num_samples != -1 and num_samples < 1:
        raise InputError(
            f"{key}.num_samples={num_samples} is not a number of windows; use 1 or more, for example"
            f" {key}.num_samples=128, or -1 for all"
        )
    if seq_len < 1:
        raise InputError(f"{key}.seq_len={seq_len} is not a window length; use 1 or more, for example {key}.seq_len=2048")
    if not 0 <= seed < 2**63:
        raise InputError(f"{key}.seed={seed} is out of range; use 0 to 2**63-1, for example {key}.seed=0")


def _too_short(part: TextPart, found: int, num_samples: int, seq_len: int, key: str) -> InputError:
    wanted = max(num_samples, 1)
    fits = []
    if found >= seq_len:
        fits.append(f"{key}.num_samples={found // seq_len}")
    if found >= wanted:
        fits.append(f"{key}.seq_len={found // wanted}")
    fits.append("a longer text")
    return InputError(
        f"{key}: {part.source} ({part.part}) gives {found} tokens but {key}.num_samples={num_samples} windows of"
        f" {key}.seq_len={seq_len} need {wanted * seq_len}; use {' or '.join(fits)}"
    )


def _blocks(documents: Sequence[str], separator: str) -> Iterator[str]:
    """Join documents to strings of a fair length; the strings in a row are ``separator.join(documents)``.

    Tokenizers merge a separator with what is left or right of it, each in its own way: only inside one string is it
    tokenised as the model saw it in training. A single string for all would keep the tokenizer on one thread.
    """
    block: list[str] = []
    size = 0
    for number, document in enumerate(documents):
        if size >= _BLOCK_CHARACTERS:
            yield "".join(block)
            block, size = [], 0
        block.append(document if number == 0 else separator + document)
        size += len(document)
    if block:
        yield "".join(block)


def _chat_turns(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], key: str) -> Iterator[str]:
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{key}.chat_template=true but the tokenizer has no chat template; use {key}.chat_template=false or the"
            " tokenizer of a chat model"
        )
    for document in documents:
        try:
            yield tokenizer.apply_chat_template([{"role": "user", "content": document}], tokenize=False)
        except TemplateError as error:
            raise InputError(
                f"{key}.chat_template=true but the tokenizer's chat template does not take a single user turn"
                f" ({' '.join(str(error).split())}); use {key}.chat_template=false"
            ) from error


def _stream(tokenizer: PreTrainedTokenizerBase, strings: Iterable[str]) -> Tensor:
    pieces = [torch.empty(0, dtype=torch.int64)]
    remaining = iter(strings)
    while batch := list(islice(remaining, _BATCH)):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            # A stream is longer than the context by design; the warning about it would only frighten.
            verbose=False,
        )
        pieces += [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]
    return torch.cat(pieces)
