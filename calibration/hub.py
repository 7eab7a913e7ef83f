"""Text of public data sets, streamed through ``datasets`` from the Hugging Face hub or from a local mirror."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import InputError

# " = Title = \n" opens an article; sections inside it have two or more equals signs, " = = History = = \n".
_ARTICLE_TITLE = re.compile(r" = (?!=).* (?<!= )= ?\n?")


def wikitext_articles(rows: Iterable[str]) -> Iterator[str]:
    """Join the rows of a WikiText split, one line each, to articles.

    The data set stores the line ``" \\n"`` as an empty row; it is put back, so that the articles joined by nothing are
    the original file, whose whitespace perplexities depend on.
    """
    article: list[str] = []
    for row in rows:
        # The blank lines that open the file belong to the first article.
        if _ARTICLE_TITLE.fullmatch(row) and any(map(str.strip, article)):
            yield "".join(article)
            article = []
        article.append(row or " \n")
    if any(map(str.strip, article)):
        yield "".join(article)


def _one_per_row(rows: Iterable[str]) -> Iterator[str]:
    return (row for row in rows if row.strip())


@dataclass(frozen=True)
class Dataset:
    """A row of :data:`DATASETS`.

    Attributes:
        repo: data set repository on the hub.
        config: configuration of that repository, None for its only one.
        splits: split of the repository that serves the part "train" and the part "heldout".
        column: column that holds the text.
        data_files: files of each split, where the repository does not declare them itself.
        separator: what stands between two documents when they are read as one text.
        documents: turns rows of text into documents.
        endless: hundreds of gigabytes; nobody means to stream all of it.
    """

    repo: str
    config: str | None
    splits: Mapping[str, str]
    column: str = "text"
    data_files: Mapping[str, str] | None = None
    separator: str = "\n\n"
    documents: Callable[[Iterable[str]], Iterator[str]] = _one_per_row
    endless: bool = True


DATASETS: Mapping[str, Dataset] = {
    "wikitext2": Dataset(
        repo="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        splits={"train": "train", "heldout": "test"},
        separator="",
        documents=wikitext_articles,
        endless=False,
    ),
    "c4": Dataset(repo="allenai/c4", config="en", splits={"train": "train", "heldout": "validation"}),
    # Left to itself, `datasets` takes the folder train/ for the only split and overlooks val.jsonl.zst beside it.
    "pile": Dataset(
        repo="monology/pile-uncopyrighted",
        config=None,
        splits={"train": "train", "heldout": "validation"},
        data_files={"train": "train/*.jsonl*", "validation": "val.jsonl*"},
    ),
}


def stream_documents(source: str, part: str, *, path: str | None = None, key: str = "calibration") -> Iterator[str]:
    """The documents of a split of ``DATASETS[source]``, fetched one by one as they are asked for.

    Args:
        source: key of :data:`DATASETS`.
        part: "train" or "heldout".
        path: local folder with the files of the repository, read in its place; None reads the hub.
        key: the config group that an error names.

    Raises:
        InputError: ``path`` is no folder, or the hub or the mirror does not give the split.
    """
    if path is not None and not Path(path).expanduser().is_dir():
        raise InputError(
            f"{key}.path={path} is not a folder; {source} takes a local mirror of the data set {DATASETS[source].repo},"
            f" for example {key}.path=mirrors/{DATASETS[source].repo.split('/')[-1]}"
        )
    return DATASETS[source].documents(_rows(source, part, path, key))


def _rows(source: str, part: str, path: str | None, key: str) -> Iterator[str]:
    dataset = DATASETS[source]
    split = dataset.splits[part]
    place = str(Path(path).expanduser()) if path is not None else dataset.repo
    records = _records(dataset, split, place)
    while True:
        try:
            record = next(records, None)
        # Every layer below (fsspec, the HTTP client, pyarrow, `datasets`) raises errors of a family of its own.
        except Exception as error:
            raise _unreadable(source, split, path, error, key) from error
        if record is None:
            return
        text = record.get(dataset.column)
        if not isinstance(text, str):
            raise InputError(
                f"{key}.path={place}: split {split} has a row without text in the column {dataset.column!r} (columns:"
                f" {', '.join(sorted(record))}); {source} needs the files of {dataset.repo}, or use {key}=builtin"
            )
        yield text


def _records(dataset: Dataset, split: str, place: str) -> Iterator[dict[str, Any]]:
    # The import takes seconds, and the local sources do without it.
    from datasets import load_dataset

    yield from load_dataset(place, dataset.config, data_files=dataset.data_files, split=split, streaming=True)


def _unreadable(source: str, split: str, path: str | None, error: Exception, key: str) -> InputError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    repo = DATASETS[source].repo
    if "zstd" in str(error):
        return InputError(
            f"{key}={source}: the files of {repo} are packed with zstd and no reader is installed ({reason});"
            f" run `pip install zstandard` or use {key}=builtin"
        )
    if path is not None:
        return InputError(
            f"{key}.path={path} does not give the split {split!r} of {repo} ({reason}); it must hold the files of that"
            f" repository, README.md included: hf download {repo} --repo-type dataset --local-dir {path}"
        )
    return InputError(
        f"{key}={source}: the Hugging Face hub cannot be reached, or does not give the split {split!r} of {repo}"
        f" ({reason}); use {key}=text {key}.path=FILE, or {key}=builtin, or {key}.path=LOCAL_MIRROR of the data set"
    )
