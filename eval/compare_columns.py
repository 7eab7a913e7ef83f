"""Which figures of finished artifacts may stand in one column, and the columns that follow.

A column's figures share what decides them: perplexities the protocol and the type of arithmetic; divergences the model and the
tokens they were measured from as well; scores the task's definition and items; speeds the machine and the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.figures import comparable, difference_of
from eval.tasks_scores import compare
from quantize.errors import InputError


@dataclass(frozen=True)
class Row:
    """One artifact and its figures.

    Attributes:
        name: unique among those compared.
        path: where it was found.
        container, solver: as its manifest has them.
        base: name of the checkpoint that it was made from; None where that is not recorded.
        bits_per_weight: everything counted.
        size_bytes: of the weight files.
        figures: as ``evaluation.json`` has them.
    """

    name: str
    path: str
    container: str
    solver: str
    base: str | None
    bits_per_weight: float
    size_bytes: int
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """Figures that may stand side by side.

    Attributes:
        title: with what sets it apart from other columns of the same figure.
        figure: such as ``ppl``.
        key: what all of its figures share.
        values: by the rows' names; of a row that lacks it, none.
        notes: likewise, what stands behind the value.
    """

    title: str
    figure: str
    key: Mapping[str, Any]
    values: Mapping[str, float | None]
    notes: Mapping[str, str]


def columns_of(rows: Sequence[Row], *, by_protocol: bool = False) -> list[Column]:
    """All columns, in the order of tables.

    Args:
        rows: artifacts.
        by_protocol: give figures of different protocols a column each.

    Raises:
        InputError: figures that cannot be compared would share a column, and ``by_protocol`` is false.
    """
    tasks = list(dict.fromkeys(task for row in rows for task in row.figures.get("tasks") or {}))
    columns = []
    for figure in (*_FIGURES, *(f"task {task}" for task in tasks)):
        groups = _groups(figure, rows)
        if len(groups) > 1 and not by_protocol:
            (one, first), (other, second) = groups[:2]
            raise InputError(
                f"{figure} of {first[0].name} and {second[0].name} was measured differently ({difference_of(one, other)}), and "
                "such figures cannot stand in one column; measure one of them again, or use --by-protocol"
            )
        columns += [_column(figure, key, members, [other for other, _ in groups]) for key, members in groups]
    return columns


def _groups(figure: str, rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """The rows that have a figure, by what decides it."""
    found: list[tuple[dict[str, Any], list[Row]]] = []
    for row in rows:
        if _value(figure, row) is _ABSENT:
            continue
        key = _key(figure, row)
        group = next((members for other, members in found if not difference_of(other, key)), None)
        if group is None:
            found.append((key, [row]))
        else:
            group.append(row)
    return found


def _column(figure: str, key: Mapping[str, Any], members: Sequence[Row], keys: Sequence[Mapping[str, Any]]) -> Column:
    apart = [name for name in key if any(other.get(name) != key[name] for other in keys)]
    label = ", ".join(f"{name} {str(key[name])[:12]}" for name in apart)
    notes = _differences(figure.removeprefix("task "), members) if figure.startswith("task ") else {}
    values = {row.name: _value(figure, row) for row in members}
    title = figure.removeprefix("task ") if figure.startswith("task ") else figure
    return Column(f"{title} [{label}]" if label else title, figure, key, values, notes)


_ABSENT = object()


def _value(figure: str, row: Row) -> Any:
    """A row's figure: None where the model diverged."""
    if figure.startswith("task "):
        found = (row.figures.get("tasks") or {}).get(figure.removeprefix("task "))
        return found["value"] if found else _ABSENT
    return _FIGURES[figure](row.figures)


def _key(figure: str, row: Row) -> dict[str, Any]:
    figures = row.figures
    if figure.startswith("task "):
        found = figures["tasks"][figure.removeprefix("task ")]
        return {name: found[name] for name in ("metric", "definition", "items")}
    if figure == "decode":
        return {name: figures["speed"].get(name) for name in ("cpu", "device", "threads", "prompt", "tokens")}
    if figure == "peak RSS":
        return {}
    key = comparable(figures)
    if figure == "ppl":
        return key
    reference = figures["divergence"]["reference"]
    return {**key, **{f"reference {name}": reference.get(name) for name in ("artifact_fingerprint", "top_k", "tokens_sha256")}}


def _ratio(figures: Mapping[str, Any]) -> Any:
    against = ((figures.get("divergence") or {}).get("reference") or {}).get("ppl")
    if not against or "ppl" not in figures:
        return _ABSENT
    return None if figures["ppl"] is None else figures["ppl"] / against


def _inside(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    def find(figures: Mapping[str, Any]) -> Any:
        found: Any = figures
        for name in path:
            if not isinstance(found, Mapping) or name not in found:
                return _ABSENT
            found = found[name]
        return found

    return find


_FIGURES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "ppl": _inside("ppl"),
    "ratio": _ratio,
    "KLD": _inside("divergence", "kld_mean"),
    "top-1": _inside("divergence", "top1_agreement"),
    "peak RSS": _inside("peak_rss_bytes"),
    "decode": _inside("speed", "decode_tokens_per_second"),
}


def _differences(task: str, members: Sequence[Row]) -> dict[str, str]:
    """How each row's score differs from the unquantized one's, else from the first one's, item by item."""
    reference = next((row for row in members if row.solver == "none"), members[0])
    notes = {}
    for row in members:
        if row is reference:
            continue
        change = compare(row.figures["tasks"][task], reference.figures["tasks"][task], name=task)
        verdict = "~" if change["within_noise"] else f"p={change['p_value']:.2g}"
        notes[row.name] = f"{100 * change['difference']:+.1f} {verdict}"
    return notes
