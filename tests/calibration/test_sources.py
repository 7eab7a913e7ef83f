"""Text sources: the split keeps the parts apart, every file and data set is read whole, bad input is named."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from calibration.hub import wikitext_articles
from calibration.sources import PARTS, TextPart, load_text
from quantize.errors import InputError

WIKITEXT_ROWS = {
    "train": [
        "",
        " = Apple = \n",
        "",
        " Apples are red . \n",
        " = = Uses = = \n",
        " Pie . \n",
        "",
        "",
        " = Pear = \n",
        "",
    ],
    "test": ["", " = Plum = \n", "", " Plums are blue . \n", ""],
    "validation": ["", " = Fig = \n", " Figs . \n"],
}


def characters(documents: Iterable[str]) -> int:
    return sum(map(len, documents))


def write_json_lines(file: Path, rows: Iterable[object]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def declare_splits(mirror: Path, config: str, files: dict[str, str]) -> None:
    """The part of a data set card that names the files of each split, as the hub's repositories have it."""
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    lines += [f"  - split: {split}\n    path: {pattern}" for split, pattern in files.items()]
    (mirror / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network and no cache but our own; the libraries read the environment once, when they are imported."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def wikitext(tmp_path: Path, offline: None) -> str:
    mirror = tmp_path / "wikitext"
    folder = mirror / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    for split, rows in WIKITEXT_ROWS.items():
        datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    declare_splits(mirror, folder.name, {split: f"{folder.name}/{split}-*" for split in WIKITEXT_ROWS})
    return str(mirror)


@pytest.fixture
def c4(tmp_path: Path, offline: None) -> str:
    mirror = tmp_path / "c4"
    (mirror / "en").mkdir(parents=True)
    for split in ("train", "validation"):
        with gzip.open(mirror / "en" / f"c4-{split}.00000-of-00001.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": f"{split} page {i}", "url": "u"}) + "\n" for i in range(5))
    declare_splits(mirror, "en", {split: f"en/c4-{split}.*.json.gz" for split in ("train", "validation")})
    return str(mirror)


@pytest.fixture
def pile(tmp_path: Path, offline: None) -> str:
    mirror = tmp_path / "pile"
    for name in ("train/00", "train/01", "val", "test"):
        write_json_lines(mirror / f"{name}.jsonl", [{"text": f"{name} text", "meta": {"pile_set_name": "Books3"}}])
    return str(mirror)


def test_builtin_parts_are_apart_and_cover_the_topics() -> None:
    train, heldout, everything = (load_text("builtin", part) for part in ("train", "heldout", "all"))
    assert not set(train.documents) & set(heldout.documents)
    assert Counter(train.documents) + Counter(heldout.documents) == Counter(everything.documents)
    assert characters(heldout.documents) == pytest.approx(0.2 * characters(everything.documents), rel=0.1)
    # Held-out topics come from the whole alphabet, not from one end of it.
    places = [everything.documents.index(document) / len(everything.documents) for document in heldout.documents]
    assert min(places) < 0.25 and max(places) > 0.75


def test_fingerprint_sees_texts_borders_and_order() -> None:
    variants = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("abc",), ("ab", "c", "")]
    assert len({TextPart(documents, "text", "all").sha256 for documents in variants}) == len(variants)
    assert load_text("builtin", "train").sha256 == load_text("builtin", "train").sha256
    assert load_text("builtin", "train").sha256 != load_text("builtin", "heldout").sha256


def test_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes("\ufeffone\r\nstill one\r\n\r\n \t\r\n  two\n\n\n\nthree\n".encode())
    part = load_text("text", "all", path=str(file))
    assert part.documents == ("one\nstill one", "  two", "three")
    assert part.text == "one\nstill one\n\n  two\n\nthree"


def test_glob_descends_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/deep/y.txt", "ignored.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    (tmp_path / "folder.txt").mkdir()
    part = load_text("text", "all", path=f"{tmp_path}/**/*.txt")
    assert part.documents == ("text of a/deep/y.txt", "text of a/z.txt", "text of b.txt")


def test_name_with_glob_characters_is_taken_literally(tmp_path: Path) -> None:
    (tmp_path / "part[1].txt").write_text("words", encoding="utf-8")
    assert load_text("text", "all", path=str(tmp_path / "part[1].txt")).documents == ("words",)


def test_json_lines_keep_documents_whole(tmp_path: Path) -> None:
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": "one\n\nstill one\u2028"}, {"text": " "}, {"text": "two"}])
    assert load_text("text", "all", path=file).documents == ("one\n\nstill one\u2028", "two")


@pytest.mark.parametrize("limit", [1, 999, 20_000, 60_000])
def test_max_characters_cuts_the_last_document(limit: int) -> None:
    whole = load_text("builtin", "heldout")
    part = load_text("builtin", "heldout", max_characters=limit)
    assert characters(part.documents) == limit
    assert part.documents[:-1] == whole.documents[: len(part.documents) - 1]
    assert whole.documents[len(part.documents) - 1].startswith(part.documents[-1])


@pytest.mark.parametrize("part", PARTS)
def test_wikitext_articles_are_the_original_file(wikitext: str, part: str) -> None:
    found = load_text("wikitext2", part, path=wikitext)
    splits = {"train": ["train"], "heldout": ["test"], "all": ["train", "test"]}[part]
    assert found.text == "".join(row or " \n" for split in splits for row in WIKITEXT_ROWS[split])
    assert len(found.documents) == {"train": 2, "heldout": 1, "all": 3}[part]


def test_wikitext_breaks_only_at_article_titles() -> None:
    articles = list(wikitext_articles(WIKITEXT_ROWS["train"]))
    assert [article.split("\n")[:3] for article in articles] == [
        [" ", " = Apple = ", " "],
        [" = Pear = ", " ", ""],
    ]
    assert list(wikitext_articles(["", ""])) == []


def test_c4_parts_are_its_splits(c4: str) -> None:
    assert load_text("c4", "train", path=c4).documents == tuple(f"train page {i}" for i in range(5))
    assert load_text("c4", "heldout", path=c4).documents == tuple(f"validation page {i}" for i in range(5))


def test_no_row_is_fetched_beyond_the_limit(c4: str) -> None:
    size = len("train page 0")
    with gzip.open(Path(c4, "en", "c4-train.00000-of-00001.json.gz"), "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in ("train page 0", "train page 1", None))
    assert len(load_text("c4", "train", path=c4, max_characters=2 * size).documents) == 2
    with pytest.raises(InputError, match="row without text"):
        load_text("c4", "train", path=c4, max_characters=2 * size + 1)


def test_pile_finds_the_validation_file_beside_the_train_folder(pile: str) -> None:
    assert load_text("pile", "train", path=pile).documents == ("train/00 text", "train/01 text")
    assert load_text("pile", "heldout", path=pile).documents == ("val text",)


@pytest.mark.parametrize("source", ["wikitext2", "c4", "pile"])
def test_unreachable_hub_proposes_local_text(source: str, offline: None) -> None:
    message = rf"calibration={source}: .*hub cannot be reached.*calibration=text calibration\.path=FILE.*LOCAL_MIRROR"
    with pytest.raises(InputError, match=message):
        load_text(source, "train", max_characters=100)


def test_mirror_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"calibration\.path=.*absent is not a folder.*Salesforce/wikitext"):
        load_text("wikitext2", "train", path=str(tmp_path / "absent"))


def test_mirror_without_the_split(tmp_path: Path, offline: None) -> None:
    write_json_lines(tmp_path / "mirror" / "train.jsonl", [{"text": "words"}])
    with pytest.raises(InputError, match=r"does not give the split 'validation' of allenai/c4 .*hf download"):
        load_text("c4", "heldout", path=str(tmp_path / "mirror"))


def test_mirror_without_the_column(tmp_path: Path, offline: None) -> None:
    for name in ("train/00", "val"):
        write_json_lines(tmp_path / "pile" / f"{name}.jsonl", [{"body": "words"}])
    with pytest.raises(InputError, match=r"row without text in the column 'text' \(columns: body\)"):
        load_text("pile", "heldout", path=str(tmp_path / "pile"))


def test_mirror_of_blank_rows(pile: str) -> None:
    write_json_lines(Path(pile, "val.jsonl"), [{"text": "  "}])
    with pytest.raises(InputError, match=r"heldout part of .* holds no text; use calibration=builtin"):
        load_text("pile", "heldout", path=pile)


def test_missing_zstd_reader_is_named(pile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("Compression type zstd not supported")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"calibration=pile: .*pip install zstandard"):
        load_text("pile", "train", path=pile)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "wiki"}, r"calibration\.source=wiki is not a text source; use one of builtin, text, wikitext2"),
        ({"part": "test"}, r"calibration\.part=test .*train, heldout, all"),
        ({"heldout_fraction": 0.0}, r"calibration\.heldout_fraction=0\.0 .*heldout_fraction=0\.2"),
        ({"heldout_fraction": 1.0}, r"calibration\.heldout_fraction=1\.0 "),
        ({"heldout_fraction": float("nan")}, r"calibration\.heldout_fraction=nan "),
        ({"max_characters": 0}, r"calibration\.max_characters=0 .*max_characters=4000000"),
        ({"source": "text"}, r"calibration\.path is not set.*calibration\.path=notes\.txt"),
        ({"path": "a.txt"}, r"calibration\.path=a\.txt is not read by calibration=builtin.*calibration=text"),
        ({"source": "c4"}, r"calibration\.max_characters is not set and c4 has .*max_characters=4000000"),
        ({"max_characters": 0, "key": "eval"}, r"eval\.max_characters=0 .*eval\.max_characters="),
    ],
)
def test_argument_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_text(**{"source": "builtin", "part": "train", **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, r"calibration\.path=.*absent\.txt does not exist; .*calibration=builtin"),
        ("*.none", None, r"calibration\.path=.*\*\.none matches no file; check the pattern"),
        ("", None, r"is a directory; name its files, for example calibration\.path=.*/\*\*/\*\.txt"),
        ("empty.txt", b"", r"empty\.txt holds no text; .*calibration=builtin"),
        ("blank.txt", b" \n\n\t\n", r"blank\.txt holds no text"),
        ("empty.jsonl", b"\n", r"empty\.jsonl holds no text"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 \(byte 0xe9 at 3\); convert it, for example: iconv"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"', r"bad\.jsonl line 2 is not JSON .*each line must be like"),
        ("keys.jsonl", b'{"body": "a", "id": 1}', r'line 1 has no string "text" \(found the keys body, id\)'),
        ("type.jsonl", b'{"text": 3}', r'line 1 has no string "text"'),
        ("list.jsonl", b"[1]", r'line 1 has no string "text" \(found list\)'),
        ("half.jsonl", b'{"text": "a \\ud800"}', r"half\.jsonl line 1 holds half of a surrogate pair"),
    ],
)
def test_unusable_file(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_text("text", "train", path=str(tmp_path / name))
    assert "\n" not in str(caught.value)
