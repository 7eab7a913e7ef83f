"""Text sources: the documents a model is calibrated on and, kept apart from them, those it is evaluated on."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from calibration.hub import DATASETS, stream_documents
from calibration.split import split_documents
from quantize.errors import InputError

__all__ = ["DATASETS", "PARTS", "SOURCES", "TextPart", "load_text"]

SOURCES = ("builtin", "text", *DATASETS)
PARTS = ("train", "heldout", "all")

# JSON can spell these, UTF-8 cannot, and tokenizers refuse them without saying where.
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_PARAGRAPH_BREAK = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True)
class TextPart:
    """Documents of one part of a text source.

    Attributes:
        documents: the texts, in the order of the source; none is blank.
        source: one of :data:`SOURCES`.
        part: one of :data:`PARTS`.
        separator: what stands between two documents when they are read as one text.
    """

    documents: tuple[str, ...]
    source: str
    part: str
    separator: str = "\n\n"

    @property
    def text(self) -> str:
        """All documents as one text."""
        return self.separator.join(self.documents)

    @property
    def sha256(self) -> str:
        """Hexadecimal fingerprint of the documents: their texts, their borders and their order."""
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


def load_text(
    source: str,
    part: str,
    *,
    path: str | None = None,
    heldout_fraction: float = 0.2,
    max_characters: int | None = None,
    key: str = "calibration",
) -> TextPart:
    """Load one part of a text source.

    The same arguments give the same documents. "builtin" and "text" are split by :func:`split_documents`, before
    ``max_characters`` applies, so their "train" and "heldout" share no document. "wikitext2", "c4" and "pile" come with
    splits of their own, which are used as they are; their "all" is the train split followed by the held-out one.

    Args:
        source: "builtin" (the help topics of Python itself: English prose on every machine, which differs a little
            between Python versions), "text" (local files) or a key of :data:`DATASETS` (streamed).
        part: "train", "heldout" or "all".
        path: for "text" a file or a glob (``**`` descends), UTF-8; documents are the paragraphs, or in a ``.jsonl``
            file the field "text" of each line. For a data set a local folder that mirrors its repository.
        heldout_fraction: share of the characters of "builtin" and "text" that is held out, above 0 and below 1.
        max_characters: keep no more characters than this, separators not counted; the document that crosses the limit
            is cut there and no further one is fetched.
        key: the config group that errors name.

    Raises:
        InputError: an argument has a value that is not allowed, a file is missing, empty or malformed, or a data set
            cannot be reached.
    """
    _check_arguments(source, part, path, heldout_fraction, max_characters, key)
    separator = "\n\n"
    documents: Iterable[str]
    if source in DATASETS:
        parts = ("train", "heldout") if part == "all" else (part,)
        documents = itertools.chain.from_iterable(stream_documents(source, name, path=path, key=key) for name in parts)
        separator = DATASETS[source].separator
    else:
        documents = _builtin_documents() if path is None else _file_documents(path, key)
        if part != "all":
            train, heldout = split_documents(documents, heldout_fraction, key=key)
            documents = train if part == "train" else heldout
    found = TextPart(tuple(_limited(documents, max_characters)), source, part, separator)
    if not found.documents:
        raise InputError(f"{key}={source}: the {part} part of {path or source} holds no text; use {key}=builtin")
    return found


def _check_arguments(
    source: str, part: str, path: str | None, heldout_fraction: float, max_characters: int | None, key: str
) -> None:
    if source not in SOURCES:
        raise InputError(f"{key}.source={source} is not a text source; use one of {', '.join(SOURCES)}")
    if part not in PARTS:
        raise InputError(f"{key}.part={part} is not a part of a text; use one of {', '.join(PARTS)}")
    if not 0 < heldout_fraction < 1:
        raise InputError(
            f"{key}.heldout_fraction={heldout_fraction} is not a share of the text; use a number above 0 and below 1,"
            f" for example {key}.heldout_fraction=0.2"
        )
    if max_characters is not None and max_characters < 1:
        raise InputError(
            f"{key}.max_characters={max_characters} leaves no text; use 1 or more, for example"
            f" {key}.max_characters=4000000, or null for no limit"
        )
    if source == "text" and not path:
        raise InputError(f"{key}.path is not set; {key}=text needs a file or a glob, for example {key}.path=notes.txt")
    if source == "builtin" and path is not None:
        raise InputError(f"{key}.path={path} is not read by {key}=builtin; leave it out or use {key}=text")
    if source in DATASETS and DATASETS[source].endless and path is None and max_characters is None:
        raise InputError(
            f"{key}.max_characters is not set and {source} has hundreds of gigabytes; set a limit, for example"
            f" {key}.max_characters=4000000"
        )


def _limited(documents: Iterable[str], max_characters: int | None) -> Iterator[str]:
    if max_characters is None:
        yield from documents
        return
    left = max_characters
    for document in documents:
        cut = document[:left]
        if cut.strip():
            yield cut
        left -= len(cut)
        if left == 0:
            return


def _builtin_documents() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return tuple(text for _, text in sorted(topics.items()) if text.strip())


def _file_documents(path: str, key: str) -> tuple[str, ...]:
    documents: list[str] = []
    for file in _matching_files(path, key):
        text = _read_utf8(file, key)
        found = _json_lines(text, file, key) if file.suffix == ".jsonl" else _paragraphs(text)
        if not found:
            raise InputError(f"{key}.path: {file} holds no text; fill it, leave it out or use {key}=builtin")
        documents += found
    return tuple(documents)


def matching_files(path: str) -> list[Path]:
    """The files behind a text path, sorted: a file itself, all files below a directory, or a glob's matches."""
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        return sorted(file for file in expanded.rglob("*") if file.is_file())
    # pathlib would need the anchor of an absolute pattern taken apart, and disagrees on what a final ** matches.
    names = [str(expanded)] if expanded.is_file() else glob.glob(str(expanded), recursive=True)  # noqa: PTH207
    return sorted(file for file in map(Path, names) if file.is_file())


def _matching_files(path: str, key: str) -> list[Path]:
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        raise InputError(
            f"{key}.path={path} is a directory; name its files, for example {key}.path={Path(path, '**', '*.txt')}"
        )
    files = matching_files(path)
    if files:
        return files
    if glob.has_magic(str(expanded)):
        raise InputError(
            f"{key}.path={path} matches no file; check the pattern, where ** descends into folders, or use"
            f" {key}=builtin, which needs no file"
        )
    raise InputError(f"{key}.path={path} does not exist; give a text file or a glob, or use {key}=builtin")


def _read_utf8(file: Path, key: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{key}.path: {file} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); convert it, for"
            f" example: iconv -f latin1 -t utf-8 {file.name} > utf8.txt"
        ) from error
    except OSError as error:
        raise InputError(
            f"{key}.path: {file} cannot be read ({error.strerror}); make it readable or use {key}=builtin"
        ) from error


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip("\n") for paragraph in _PARAGRAPH_BREAK.split(text) if paragraph.strip()]


def _json_lines(text: str, file: Path, key: str) -> list[str]:
    documents: list[str] = []
    # Not splitlines: JSON strings may hold U+2028 and its kin unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f'{key}.path: {file} line {number} is not JSON ({error.msg}); each line must be like {{"text": "..."}}'
            ) from error
        document = row.get("text") if isinstance(row, dict) else None
        if not isinstance(document, str):
            found = f"the keys {', '.join(row) or '(none)'}" if isinstance(row, dict) else type(row).__name__
            raise InputError(
                f'{key}.path: {file} line {number} has no string "text" (found {found}); each line must be like'
                f' {{"text": "..."}}'
            )
        if _LONE_SURROGATE.search(document):
            raise InputError(
                f"{key}.path: {file} line {number} holds half of a surrogate pair, which is no character; write both"
                " halves, the character itself or \\ufffd"
            )
        if document.strip():
            documents.append(document)
    return documents
