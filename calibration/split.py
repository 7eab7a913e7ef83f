"""Train and held-out text: a deterministic split by whole documents that both parts of a run agree on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantize.errors import InputError

# Closing punctuation and the space after it, a line break, or the full stops of scripts that set no space after them.
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|\n\s*|[。！？]\s*")
_SPACE = re.compile(r"\s+")
# How far a cut may move from its ideal place, as a share of the document, to land on a boundary.
_CUT_SLACK = 0.05


def split_documents(
    documents: Sequence[str], heldout_fraction: float, *, key: str = "calibration"
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split ``documents`` in a train and a held-out part that share no document.

    Documents are taken in order and each goes to the part that is behind its share of characters, so both parts run
    through the whole sequence. Identical documents count as one and stay together. The held-out part misses
    ``heldout_fraction`` of all characters by at most half of the largest group of identical documents, unless that
    would leave one of the parts empty: then the smallest group fills it. One single distinct document is cut in two at
    the sentence end, else the white space, next to its share.

    Args:
        documents: non-blank texts, at least one.
        heldout_fraction: share of the characters that is held out, above 0 and below 1.
        key: the config group that an error names.

    Returns:
        ``(train, heldout)``, neither of them empty, each in the order of ``documents``.

    Raises:
        InputError: the text is one document that is too short to cut.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document] = sizes.get(document, 0) + len(document)
    if len(sizes) == 1:
        document = documents[0]
        cut = _cut_position(document, 1 - heldout_fraction, key)
        return (document[:cut],) * len(documents), (document[cut:],) * len(documents)
    heldout = _heldout_groups(sizes, heldout_fraction)
    return (
        tuple(document for document in documents if document not in heldout),
        tuple(document for document in documents if document in heldout),
    )


def _heldout_groups(sizes: dict[str, int], fraction: float) -> set[str]:
    """The keys of ``sizes`` (two or more, in document order) that are held out."""
    heldout: set[str] = set()
    seen = held = 0
    for document, size in sizes.items():
        seen += size
        # Error diffusion: take the group exactly when that leaves the running share nearer to its target.
        if held + size / 2 < fraction * seen:
            heldout.add(document)
            held += size
    smallest = min(sizes, key=sizes.__getitem__)
    if not heldout:
        heldout.add(smallest)
    elif len(heldout) == len(sizes):
        heldout.remove(smallest)
    return heldout


def _cut_position(document: str, share: float, key: str) -> int:
    """Where to cut ``document`` so that about ``share`` of it comes first and neither side is blank."""
    ideal = min(max(round(share * len(document)), 1), max(len(document) - 1, 1))
    slack = max(1, round(_CUT_SLACK * len(document)))
    low, high = max(0, ideal - slack), ideal + slack
    places = (
        _nearest_end(_SENTENCE_END, document, low, high, ideal),
        _nearest_end(_SPACE, document, low, high, ideal),
        ideal,
    )
    for place in places:
        if place is not None and document[:place].strip() and document[place:].strip():
            return place
    raise InputError(
        f"{key}.path: the text is a single document of {len(document)} characters, too short to hold a part of it out;"
        f" give a longer text or use {key}=builtin"
    )


def _nearest_end(pattern: re.Pattern[str], document: str, low: int, high: int, ideal: int) -> int | None:
    """The end of the match of ``pattern`` in ``document[low:high]`` that is nearest to ``ideal``."""
    ends = (match.end() for match in pattern.finditer(document, low, high))
    return min(ends, key=lambda end: abs(end - ideal), default=None)
