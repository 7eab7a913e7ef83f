"""Texts as the protocols of perplexity read them, each as the program it is named after does."""

from __future__ import annotations

import re
from pathlib import Path

from calibration.sources import load_text
from quantize.errors import InputError


def read_text(text: str, part: str, heldout_fraction: float) -> str:
    """The text of a file, ``\\r\\n`` and ``\\r`` read as ``\\n``, or ``builtin``; or one part of either.

    Raises:
        InputError: the file is missing, empty or no UTF-8.
    """
    if text == "builtin" or part != "all":
        source, path = ("builtin", None) if text == "builtin" else ("text", text)
        return load_text(source, part, path=path, heldout_fraction=heldout_fraction, key="eval").text
    content = re.sub(r"\r\n?", "\n", _decoded(text, _bytes_of(text)))
    _check_content(text, content)
    return content


def read_as_llamacpp(text: str, part: str, heldout_fraction: float) -> str:
    """The text as ``llama-perplexity -f FILE`` takes it: line ends as they are, a final line feed dropped.

    Unlike llama.cpp's other programs it replaces no escapes (``tools/perplexity`` sets ``escape`` to false).

    Raises:
        InputError: the file is missing, empty or no UTF-8.
    """
    data = _bytes_of(text) if text != "builtin" and part == "all" else read_text(text, part, heldout_fraction).encode()
    content = _decoded(text, data.removesuffix(b"\n"))
    _check_content(text, content)
    return content


def join_lines(text: str) -> str:
    """The lines of a text as the GPTQ code joins WikiText's: with their line ends, blank ones empty, ``"\\n\\n"`` between.

    That is ``"\\n\\n".join(dataset["text"])`` of the GPTQ code (``datautils.py``, ``get_wikitext2``), where the data set
    ``wikitext`` on the hub has one row a line, with its line end unless it is blank.
    """
    return "\n\n".join(line if line.strip() else "" for line in re.findall(r"[^\n]*\n|[^\n]+", text))


def pages(text: str) -> list[str]:
    """A WikiText file's pages, cut before each top-level heading, as the data set ``wikitext_document_level`` has them."""
    found: list[str] = []
    lines: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if "\n".join(lines).strip():
                found.append("\n".join(lines))
            lines = []
        lines.append(line)
    return [*found, "\n".join(lines)]


# In this order: lm-eval's task ``wikitext``, version 2 (``preprocess_wikitext.py``).
_PUNCTUATION = (" : ", " ; ", " . ", " ! ", " ? ", " , ")
_BRACKETS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_LAST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(page: str) -> str:
    """A page of WikiText as plain prose: the spaces that its tokeniser put around punctuation taken out again."""
    page = page.replace("s '", "s'")
    page = re.sub(r"/' [0-9]/", r"/'[0-9]/", page)
    for mark in ("-", ",", "."):
        page = page.replace(f" @{mark}@ ", mark)
    for mark in _PUNCTUATION:
        page = page.replace(mark, mark[1:])
    for pattern, replacement in _BRACKETS:
        page = re.sub(pattern, replacement, page)
    for old, new in _LAST:
        page = page.replace(old, new)
    return page


def _bytes_of(text: str) -> bytes:
    try:
        return Path(text).read_bytes()
    except OSError as error:
        raise InputError(f"eval.text={text} cannot be read as UTF-8 text ({error}); give a text file or builtin") from error


def _decoded(text: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"eval.text={text} cannot be read as UTF-8 text ({error}); give a text file or builtin") from error


def _check_content(text: str, content: str) -> None:
    if not content.strip():
        raise InputError(f"eval.text={text} is empty; give a text file or builtin")
