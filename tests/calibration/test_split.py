"""The split of a text: parts share no document, cover all of them, and the held-out part has its share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.split import split_documents
from quantize.errors import InputError

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60).filter(lambda text: bool(text.strip()))
fractions = st.floats(0.05, 0.95)


def characters(documents: Iterable[str]) -> int:
    return sum(map(len, documents))


@settings(deadline=None)
@given(st.lists(texts, min_size=2, max_size=40).filter(lambda found: len(set(found)) > 1), fractions)
def test_parts_share_no_document_and_cover_all(documents: list[str], fraction: float) -> None:
    train, heldout = split_documents(documents, fraction)
    assert train and heldout
    assert not set(train) & set(heldout)
    assert Counter(train) + Counter(heldout) == Counter(documents)
    assert (train, heldout) == split_documents(documents, fraction)


@settings(deadline=None)
@given(st.lists(texts, min_size=2, max_size=40).filter(lambda found: len(set(found)) > 1), fractions)
def test_heldout_share_is_right_to_half_a_document(documents: list[str], fraction: float) -> None:
    _, heldout = split_documents(documents, fraction)
    groups = Counter(documents)
    largest = max(len(document) * count for document, count in groups.items())
    # A part that would be empty is given the smallest document, which may be a whole one too much.
    slack = largest if 1 in (len(set(heldout)), len(groups) - len(set(heldout))) else largest / 2
    assert abs(characters(heldout) - fraction * characters(documents)) <= slack + 1e-6


@settings(deadline=None)
@given(texts.filter(lambda text: len(text.strip()) > 1), st.integers(1, 3), fractions)
def test_single_document_is_cut_in_two(document: str, copies: int, fraction: float) -> None:
    try:
        train, heldout = split_documents([document] * copies, fraction)
    except InputError:
        # Only a cut at the ideal place is left and one side of it is blank.
        assert any(map(str.isspace, document))
        return
    assert {head + tail for head, tail in zip(train, heldout, strict=True)} == {document}
    assert train[0].strip() and heldout[0].strip()


@pytest.mark.parametrize(
    ("document", "tail"),
    [
        ("a sentence here. " * 20, "a sentence here. "),
        ("word " * 100, "word "),
        ("句子在此。" * 40, "句子在此。"),
        ("x" * 100, "x"),
    ],
    ids=["sentences", "words", "no spaces", "one word"],
)
def test_cut_lands_on_a_boundary(document: str, tail: str) -> None:
    train, heldout = split_documents([document], 0.2)
    assert heldout[0].startswith(tail)
    assert train[0].endswith(tail)
    assert len(heldout[0]) == pytest.approx(0.2 * len(document), abs=0.06 * len(document))


def test_single_character_cannot_be_split() -> None:
    with pytest.raises(InputError, match=r"calibration\.path: .*single document of 1 characters.*calibration=builtin"):
        split_documents(["x"], 0.2)
