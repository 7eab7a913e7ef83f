"""The chart of an allocation of bits: the Pareto line of size against predicted divergence, and the choice on it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.charts import staircase

_DPI = 160
_INK, _MUTED, _ACCENT, _GRID = "#1f2937", "#6b7280", "#2563eb", "#e5e7eb"
_LOG_SPAN = 5.0  # a larger ratio of divergences is drawn on a logarithmic axis


def render_allocation(name: str, allocation: Mapping[str, Any]) -> bytes:
    """Draw what :func:`quantize.allocate.choose` returned, as PNG; equal allocations give equal bytes.

    The line is of the best choices for every budget; hollow points have one grid for all layers.
    """
    line = [(size / 1e6, cost) for size, cost in allocation["line"]]
    uniform = [(point["bytes"] / 1e6, point["divergence"], _label(point)) for point in allocation["uniform"]]
    choice = (allocation["bytes"] / 1e6, allocation["divergence"])
    with style.context("default"):
        figure = Figure(figsize=(8.5, 5.5), dpi=_DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _dress(axes, name, allocation)
        costs = [cost for _, cost in line] + [cost for _, cost, _ in uniform]
        if min(costs) > 0 and max(costs) / min(costs) > _LOG_SPAN:
            axes.set_yscale("log")
        axes.plot(*zip(*staircase(line), strict=True), color=_ACCENT, alpha=0.6, linewidth=1.5, label="best for each size")
        if uniform:
            hollow: dict[str, Any] = {"facecolors": "white", "edgecolors": _MUTED, "label": "one grid for all"}
            sizes, divergences = [size for size, _, _ in uniform], [divergence for _, divergence, _ in uniform]
            axes.scatter(sizes, divergences, s=52, zorder=3, **hollow)
            for size, divergence, label in uniform:
                axes.annotate(label, (size, divergence), (6, 6), textcoords="offset points", fontsize=9, color=_MUTED)
        axes.axvline(allocation["budget_bytes"] / 1e6, color=_MUTED, linewidth=1, linestyle=":", label="budget")
        axes.scatter(*choice, s=64, color=_ACCENT, zorder=4, label=f"chosen: {allocation['bits']:.2f} bits a weight")
        axes.set_xlim(*_limits([size for size, _ in line] + [size for size, _, _ in uniform] + [choice[0]]))
        axes.legend(frameon=False, fontsize=9, labelcolor=_MUTED)
        buffer = io.BytesIO()
        # Without this the matplotlib version would be stamped into the file.
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _dress(axes: Any, name: str, allocation: Mapping[str, Any]) -> None:
    title = f"{name}: bits chosen layer by layer"
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=_INK, parse_math=False)
    axes.set_xlabel("quantized layers (MB = 10⁶ bytes)", color=_INK, labelpad=8)
    axes.set_ylabel(f"sum of the layers' KL, {allocation['sensitivity']} (nats a token)", color=_INK, labelpad=8)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label(point: Mapping[str, Any]) -> str:
    return f"{point['bits']} bits" + ("" if point["group_size"] == -1 else f", groups of {point['group_size']}")


def _limits(sizes: list[float]) -> tuple[float, float]:
    room = 0.08 * (max(sizes) - min(sizes)) or 0.05 * max(sizes)
    return min(sizes) - room, max(sizes) + room
