"""The report's chart: artifact size against perplexity, drawn straight to PNG bytes without any global plot state."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

LOG_SPAN = 5.0
"""Perplexities whose largest is more than this many times the smallest are drawn on a logarithmic axis."""

_DPI = 160
_MIN_RELATIVE_SPAN = 0.05
_INK, _MUTED, _ACCENT, _GRID = "#1f2937", "#6b7280", "#2563eb", "#e5e7eb"
_LABEL_POINTS = 9.5
# Offsets of a label from its point, in typographic points; past the first ring a thin line ties the two together.
_RINGS = (7.0, 16.0, 27.0, 40.0, 56.0, 74.0, 94.0)
# Right of and above the point first: where a reader looks for a label.
_ANGLES = (0, 45, 90, 315, 270, 135, 180, 225, 22, 67, 337, 292, 112, 157, 202, 247)


class _Spot(NamedTuple):
    """A candidate place for a label, in pixels."""

    box: Bbox
    centre: tuple[float, float]
    tie: Any
    """(n, 2) points along the line to the marker; empty in the first ring, which needs no line."""
    ring: int
    preference: int


def render_chart(report: Mapping[str, Any]) -> bytes:
    """Draw artifact size (MB, 10^6 bytes, x) against perplexity (y) for the variants of a report.

    Args:
        report: what :func:`eval.report.build_report` returns. Variants whose ``ppl`` is null are named in a footnote.

    Returns:
        A PNG of 1360 x 880 pixels; equal reports give equal bytes, whatever the user's matplotlib settings.
    """
    with style.context("default"):
        figure = Figure(figsize=(8.5, 5.5), dpi=_DPI, layout="constrained", facecolor="white")
        canvas = FigureCanvasAgg(figure)
        _draw(figure, canvas, report)
        buffer = io.BytesIO()
        # Without this the matplotlib version would be stamped into the file.
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def axis_limits(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """Limits that leave room for labels around ``values`` (at least one; all positive where ``log``).

    The span is never below 5 % of the largest value, so that equal values get an axis at all and differences of
    a hair are not blown up to the height of the chart.
    """
    low, high = min(values), max(values)
    if log:
        factor = (high / low) ** 0.15
        return low / factor, high * factor
    span = max(high - low, _MIN_RELATIVE_SPAN * abs(high)) or 1.0
    centre = low / 2 + high / 2
    return centre - 0.68 * span, centre + 0.68 * span


def pareto_front(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the rows that no other beats: smaller or equal and better or equal, one of them strictly.

    Args:
        rows: mappings with ``name``, ``size_bytes`` and ``ppl``; a row whose ``ppl`` is None is never on the front.
    """
    alive = [(row["name"], (row["size_bytes"], row["ppl"])) for row in rows if row["ppl"] is not None]
    return [
        name
        for name, mine in alive
        if not any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for _, other in alive)
    ]


def model_name(report: Mapping[str, Any]) -> str:
    """What to call the model in titles."""
    return str(report["model"].get("name", "model"))


def staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the Pareto front through ``points``: (size, ppl) pairs in any order.

    A step, not a slope: between two artifacts nothing smaller than the larger one reaches its quality.
    """
    ordered = sorted(points)
    corners = list(ordered[:1])
    for (_, last_y), (x, y) in itertools.pairwise(ordered):
        corners += [(x, last_y), (x, y)]
    return corners


def _draw(figure: Any, canvas: Any, report: Mapping[str, Any]) -> None:
    shown = [variant for variant in report["variants"] if variant["ppl"] is not None]
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.add_subplot()
    _dress(axes, model_name(report))
    _footnote(figure, [variant["name"] for variant in report["variants"] if variant["ppl"] is None])
    if not shown:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no variant has a finite perplexity", transform=axes.transAxes, ha="center", color=_MUTED)
        return
    points = [(variant["size_bytes"] / 1e6, variant["ppl"]) for variant in shown]
    _scale(axes, points)
    on_front = [variant["name"] in report["pareto"] for variant in shown]
    front = [point for point, kept in zip(points, on_front, strict=True) if kept]
    dominated = [point for point, kept in zip(points, on_front, strict=True) if not kept]
    corners = staircase(front)
    if front:
        axes.plot(*zip(*corners, strict=True), color=_ACCENT, alpha=0.45, linewidth=1.5, zorder=2)
        axes.scatter(*zip(*front, strict=True), s=58, color=_ACCENT, zorder=4, label="Pareto front")
    if dominated:
        style_ = {"facecolors": "white", "edgecolors": _MUTED, "linewidths": 1.5}
        axes.scatter(*zip(*dominated, strict=True), s=52, zorder=3, label="dominated", **style_)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.012, 1.0),
        ncols=2,
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
        labelcolor=_MUTED,
    )
    # Labels are placed in pixels, so the layout must be final first.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _label(axes, canvas.get_renderer(), points, [variant["name"] for variant in shown], corners)


def _dress(axes: Any, model: str) -> None:
    title = f"{_shorten(model, 60)}: artifact size against perplexity"
    axes.set_title(title, loc="left", pad=26, fontsize=12.5, fontweight="bold", color=_INK, parse_math=False)
    axes.set_xlabel("artifact size (MB = 10⁶ bytes)", color=_INK, labelpad=8)
    axes.set_ylabel("perplexity (per token)", color=_INK, labelpad=8)
    note = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "fontsize": 9, "color": _MUTED}
    axes.text(1.0, 1.018, "↙ lower left is better", **note)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9ca3af")


def _footnote(figure: Any, diverged: Sequence[str]) -> None:
    if not diverged:
        return
    text = textwrap.fill(f"Not shown, perplexity diverged: {', '.join(_shorten(name) for name in diverged)}.", 120)
    lines = text.count("\n") + 1
    reserved = (0.03 * lines) + 0.015
    figure.get_layout_engine().set(rect=(0, reserved, 1, 1 - reserved))
    figure.text(0.012, 0.014, text, fontsize=9, color=_MUTED, va="bottom", parse_math=False)


def _scale(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    sizes, ppls = zip(*points, strict=True)
    axes.set_xlim(*axis_limits(sizes))
    log = min(ppls) > 0 and max(ppls) / min(ppls) > LOG_SPAN
    if log:
        axes.set_yscale("log")
        axes.set_ylabel("perplexity (per token, log scale)", color=_INK, labelpad=8)
        decades = math.log10(max(ppls) / min(ppls))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(*axis_limits(ppls, log=log))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if abs(value) < 1e7 else f"{value:g}"))


def _label(
    axes: Any,
    renderer: Any,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    corners: Sequence[tuple[float, float]],
) -> None:
    """Write each name beside its point, clear of the other names, the markers and the front's line."""
    scale = _DPI / 72
    pixels = axes.transData.transform(points)
    markers = [Bbox.from_extents(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in pixels]
    ink = _along(axes.transData.transform(corners)) if len(corners) > 1 else np.empty((0, 2))
    frame = axes.get_window_extent(renderer)
    taken: list[Bbox] = []
    # Points drawn on one another share one label of several lines: apart, their names could not be told apart anyway.
    together: dict[tuple[int, int], list[int]] = {}
    for index, (x, y) in enumerate(pixels):
        together.setdefault((round(x), round(y)), []).append(index)
    for _, members in sorted(together.items()):
        point = pixels[members[0]]
        text = "\n".join(_shorten(names[index]) for index in members)
        spots = _spots(point, _text_size(axes, renderer, text), scale)
        costs = [(_cost(spot, taken, markers, ink, frame), spot) for spot in spots]
        spot = min(costs, key=lambda pair: pair[0])[1]
        taken.append(spot.box)
        ink = np.concatenate([ink, spot.tie])
        label = axes.annotate(
            text,
            xy=points[members[0]],
            xytext=spot.centre,
            textcoords="figure pixels",
            ha="center",
            va="center",
            multialignment="left",
            fontsize=_LABEL_POINTS,
            color=_INK,
            parse_math=False,
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": "#9ca3af", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
            if spot.ring
            else None,
        )
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _spots(point: Any, size: tuple[float, float], scale: float) -> Iterator[_Spot]:
    for ring, offset in enumerate(_RINGS):
        for preference, degrees in enumerate(_ANGLES):
            direction = np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
            half = np.array(size) / 2
            centre = point + direction * (offset * scale + half)
            box = Bbox([centre - half, centre + half])
            tie = _along(np.array([centre, point])) if ring else np.empty((0, 2))
            yield _Spot(box, (float(centre[0]), float(centre[1])), tie, ring, preference)


def _cost(spot: _Spot, taken: Sequence[Bbox], markers: Sequence[Bbox], ink: Any, frame: Bbox) -> tuple[int, ...]:
    """What is wrong with a spot, worst first: hides text, leaves the axes, strikes text, hides points, lines, far."""
    box = spot.box.padded(1.5 * _DPI / 72)
    outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
    struck = sum(_touches(other, spot.tie) for other in taken)
    # The tie ends in its own marker, and may: only markers it passes on the way count.
    passed = sum(_touches(marker, spot.tie) and not _touches(marker, spot.tie[-1:]) for marker in markers)
    return (
        box.count_overlaps(taken),
        int(outside),
        struck,
        box.count_overlaps(markers) + passed,
        3 * int(_touches(box, ink)) + spot.ring,
        spot.preference,
    )


def _touches(box: Bbox, path: Any) -> bool:
    """Whether any of the (n, 2) points of ``path`` is inside ``box``."""
    return bool(((path >= box.min) & (path <= box.max)).all(axis=1).any())


def _along(corners: Any) -> Any:
    """Points every few pixels along a polyline; (n, 2) array in, (m, 2) array out."""
    pieces = [
        np.linspace(start, end, max(2, int(np.abs(end - start).max() // 4))) for start, end in itertools.pairwise(corners)
    ]
    return np.concatenate(pieces)


def _text_size(axes: Any, renderer: Any, text: str) -> tuple[float, float]:
    probe = axes.text(0, 0, text, fontsize=_LABEL_POINTS, parse_math=False, transform=None)
    box = probe.get_window_extent(renderer)
    probe.remove()
    return float(box.width), float(box.height)


def _shorten(text: str, limit: int = 32) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
