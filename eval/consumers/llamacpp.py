"""llama.cpp as the consumer of GGUF files: its own programs, run on a file and read.

It answers for whole texts, not for logits, so it stands beside the registry of consumers and not in it. The programs come from
``make llamacpp`` (:mod:`eval.llamacpp_tools`). Each function runs one, within a limit of seconds, and raises
:class:`~quantize.errors.InputError` with the program's last lines where it fails; several of the programs exit with 0 after an
error, so an answer that is not there counts as a failure as well.

Perplexity is llama.cpp's protocol (``tools/perplexity``), not :mod:`eval.perplexity`'s: windows of ``context`` tokens that do
not overlap, of which the tokens behind the middle count; BOS takes the place of a window's first token where the model says so.
"""

from __future__ import annotations

import contextlib
import functools
import re
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from eval.consumers.llamacpp_output import (
    Divergence,
    Perplexity,
    Speed,
    failed,
    parse_bench,
    parse_divergence,
    parse_perplexity,
    parse_windows,
    scored_tokens,
)
from eval.llamacpp_tools import tool
from quantize.errors import InputError
from quantize.files import atomic_path

LIMIT = 3600.0  # seconds a program may take
_BATCH = 2048  # llama.cpp's default number of tokens in a batch
_LOGITS_MAGIC = b"_logits_"
_ATTEMPTS, _QUICK_ATTEMPTS, _PATIENCE = 3, 20, 30.0  # seconds
_FEWEST = 100  # tokens, below which the divergence has no statistics
_ERROR_LINE = re.compile(r"^[\d.]+ E ", re.MULTILINE)  # of llama.cpp's log
Answer = TypeVar("Answer")


def perplexity(
    model: Path, text: Path, *, context: int = 1024, chunks: int = 8, logits: Path | None = None, limit: float = LIMIT
) -> Perplexity:
    """Perplexity of a GGUF file on a text.

    Args:
        model: the GGUF file.
        text: UTF-8; it is tokenised as a whole.
        context: tokens in a window.
        chunks: windows, from the start of the text; -1 for all.
        logits: where to write the model's log-probabilities for :func:`kl_divergence`, whole or not at all: 2 bytes for each
            token scored and word of the vocabulary.
        limit: seconds.

    Raises:
        InputError: the program is missing, fails or is stopped, the text is too short for two windows, or the model diverged.
    """
    _check_file(model, "model")
    _check_file(text, "text")
    command = ["-m", str(model), "-f", str(text), "-c", str(context), "-b", str(batch_of(context)), "--chunks", str(chunks)]
    with contextlib.nullcontext() if logits is None else atomic_path(logits) as temporary:
        saving = [] if temporary is None else ["--save-all-logits", str(temporary)]
        return _answer([*command, *saving], limit, parse_perplexity, functools.partial(_check_windows, text, chunks))


def save_logits(
    model: Path, text: Path, logits: Path, *, context: int = 1024, chunks: int = 8, limit: float = LIMIT
) -> Perplexity:
    """:func:`perplexity` of the unquantized model, its predictions written to ``logits`` for :func:`kl_divergence`."""
    return perplexity(model, text, context=context, chunks=chunks, logits=logits, limit=limit)


def kl_divergence(model: Path, logits: Path, *, limit: float = LIMIT) -> Divergence:
    """Compare a GGUF file's predictions with those in ``logits``, on the tokens stored there.

    Raises:
        InputError: ``logits`` is no such file, has another vocabulary or fewer than 100 tokens, or the program fails.
    """
    _check_file(model, "model")
    context = context_of(logits)
    command = ["-m", str(model), "--kl-divergence", "--kl-divergence-base", str(logits)]

    def check(output: str) -> None:
        if "inconsistent vocabulary" in output:  # it goes on, and compares the wrong words
            raise InputError(f"{logits} was made with another vocabulary than {model}'s; make it again with save_logits")
        windows = parse_windows(output)
        if windows is not None and scored_tokens(*windows) < _FEWEST:
            raise InputError(f"{logits} has {scored_tokens(*windows)} tokens; make it of {_FEWEST} or more with save_logits")

    return _answer([*command, "-c", str(context), "-b", str(batch_of(context))], limit, parse_divergence, check)


def bench(
    model: Path,
    *,
    prompt_tokens: int = 128,
    generated_tokens: int = 32,
    repetitions: int = 3,
    threads: int | None = None,
    limit: float = LIMIT,
) -> Speed:
    """How fast llama.cpp runs a GGUF file on this machine, on its own choice of ``threads`` by default.

    Raises:
        InputError: the program is missing, fails or is stopped.
    """
    _check_file(model, "model")
    command = ["-m", str(model), "-p", str(prompt_tokens), "-n", str(generated_tokens), "-r", str(repetitions), "-o", "json"]
    command += ["-t", str(threads)] if threads else []
    output, _ = run("llama-bench", command, limit, errors_apart=True)
    return parse_bench(output)


def quantize(
    source: Path, target: Path, kind: str, *, imatrix: Path | None = None, pure: bool = False, limit: float = LIMIT
) -> float:
    """Quantize a GGUF file with ``llama-quantize``; returns its wall time in seconds.

    Args:
        source: the unquantized file.
        target: written whole or not at all.
        kind: llama.cpp's name of the type, such as ``Q4_K_M``.
        imatrix: importance matrix.
        pure: one type for all matrices, without the exceptions that llama.cpp makes for some.
        limit: seconds.

    Raises:
        InputError: a file or the program is missing, or it fails; unknown types are its to refuse.
    """
    _check_file(source, "model")
    options = ["--pure"] if pure else []
    if imatrix is not None:
        _check_file(imatrix, "imatrix")
        options += ["--imatrix", str(imatrix)]
    with atomic_path(target) as temporary:
        output, seconds = run("llama-quantize", [*options, str(source), str(temporary), kind], limit)
        if not temporary.exists():
            raise failed("llama-quantize", "wrote no file", output)
    return seconds


def importance_matrix(
    model: Path, text: Path, target: Path, *, context: int = 512, chunks: int = 64, limit: float = LIMIT
) -> float:
    """Collect an importance matrix with ``llama-imatrix`` on the first ``chunks`` windows of a text; returns its seconds.

    Raises:
        InputError: a file or the program is missing, the text is too short for two windows, or the program fails.
    """
    _check_file(model, "model")
    _check_file(text, "text")
    with atomic_path(target) as temporary:
        files = ["-m", str(model), "-f", str(text), "-o", str(temporary), "--output-format", "gguf"]
        sizes = ["-c", str(context), "-b", str(batch_of(context)), "--chunks", str(chunks)]
        output, seconds = run("llama-imatrix", [*files, *sizes, "--no-ppl"], limit)
        _check_windows(text, chunks, output)
        if not temporary.exists():
            raise failed("llama-imatrix", "wrote no file", output)
    return seconds


def batch_of(context: int) -> int:
    """Tokens in a batch: the programs abort where windows fit into one but do not fill it."""
    return _BATCH if context > _BATCH else _BATCH // context * context


def context_of(logits: Path) -> int:
    """Tokens in a window of a file of log-probabilities.

    Raises:
        InputError: it is no such file.
    """
    _check_file(logits, "logits")
    with logits.open("rb") as stream:
        head = stream.read(len(_LOGITS_MAGIC) + 4)
    if len(head) < len(_LOGITS_MAGIC) + 4 or not head.startswith(_LOGITS_MAGIC):
        raise InputError(f"{logits} holds no log-probabilities of llama-perplexity; make it with save_logits")
    context: int = struct.unpack("<I", head[len(_LOGITS_MAGIC) :])[0]
    return context


def run(name: str, arguments: Sequence[str], limit: float, *, errors_apart: bool = False) -> tuple[str, float]:
    """Run a tool; returns what it printed, and its wall time in seconds.

    Args:
        name: of the tool.
        arguments: its command line.
        limit: seconds after which it is stopped.
        errors_apart: leave its standard error out of what is returned.

    Raises:
        InputError: it is not there, fails, or is stopped.
    """
    started = time.perf_counter()
    try:
        result = subprocess.run(
            [str(tool(name)), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if errors_apart else subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise failed(name, f"was stopped after {limit:g} s", _text(error.output)) from error
    output = _text(result.stdout)
    if result.returncode:
        outcome = f"failed (exit code {result.returncode})" if result.returncode > 0 else f"died of signal {-result.returncode}"
        raise failed(name, outcome, output + _text(result.stderr))
    return output, time.perf_counter() - started


def _text(output: bytes | None) -> str:
    return (output or b"").decode("utf-8", errors="replace")


def _answer(
    arguments: Sequence[str], limit: float, parse: Callable[[str, float], Answer], check: Callable[[str], None]
) -> Answer:
    """What ``llama-perplexity`` says, asked again where its last words were lost.

    It prints from a thread that ends with the process, so a busy machine loses lines behind the last that was printed
    (https://github.com/ggml-org/llama.cpp/issues/22142).
    """
    attempts, started = 0, time.perf_counter()
    while True:
        output, seconds = run("llama-perplexity", arguments, limit)
        check(output)
        attempts += 1
        # The quicker a program ends, the more it loses.
        tried = attempts >= _ATTEMPTS and (attempts >= _QUICK_ATTEMPTS or time.perf_counter() - started > _PATIENCE)
        try:
            return parse(output, seconds)
        except InputError:
            if tried or _ERROR_LINE.search(output):
                raise


def _check_windows(text: Path, chunks: int, output: str) -> None:
    """A text that is too short is cut down without a word, and below two windows given up."""
    windows = parse_windows(output)
    found = 0 if windows is None else windows[0]
    if "you need at least" in output or 0 < found < chunks:
        what = f"found only {found} of {chunks} windows in {text}: use fewer chunks or a longer text"
        raise failed("llama.cpp", what, output)


def _check_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise InputError(f"{what} {path} does not exist; give a file")
