"""What :mod:`eval.layers` found, as a table on the terminal, Markdown and a heat map of blocks and kinds of layers."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from eval.bench_process import table_console

Json = Mapping[str, Any]
_HEADS = ("layer", "stored as", "weight error", "output error", "SNR dB", "KL (nats)", "share")
_DPI = 160
_INK, _MUTED = "#1f2937", "#6b7280"
_MOST_KINDS = 40  # columns of the heat map that can still be read


def cells(layer: Json) -> list[str]:
    """One layer's row, as text."""
    return [
        layer["name"],
        layer["stored"],
        f"{layer['weight_error']:.4f}",
        "-" if layer["output_error"] is None else f"{layer['output_error']:.4f}",
        "-" if layer["snr_db"] is None else f"{layer['snr_db']:.1f}",
        f"{layer['kl']:.3g}",
        f"{layer['share']:.1%}",
    ]


def ordered(layers: Sequence[Json]) -> list[Json]:
    """The costliest first; equal ones in the model's order."""
    return sorted(layers, key=lambda layer: -layer["kl"])


def render_table(result: Json, top: int = 0, console: Console | None = None) -> None:
    """Print the ``top`` costliest layers, 0 for all of them."""
    rows = ordered(result["layers"])
    shown = rows[:top] if top else rows
    table = Table(box=box.SIMPLE_HEAD, title=f"{result['artifact']} against {result['baseline']}", title_justify="left")
    for head in _HEADS:
        numeric = head not in _HEADS[:2]
        table.add_column(head, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for layer in shown:
        table.add_row(*cells(layer))
    if len(shown) < len(rows):
        table.caption = f"{len(shown)} of {len(rows)} layers; --top=0 shows all"
    (console or table_console()).print(table)


def render_markdown(result: Json) -> str:
    """All layers as a Markdown page, the costliest first."""
    kl, protocol, keep = result["kl"], result["protocol"], result["keep"]
    lines = [
        f"# Layers of {result['artifact']} against {result['baseline']}",
        "",
        f"Text {protocol['text']} ({protocol['part']}), {protocol['windows']} windows of {protocol['seq_len']} tokens. Shares "
        f"are of the sum over layers, {kl['sum']:.3g} nats a token; the whole artifact has {kl['whole']:.3g}, so the "
        f"interaction is {kl['interaction']:+.3g}.",
        "",
        f"| {' | '.join(_HEADS)} |",
        f"|---|---|{'---:|' * 5}",
        *(f"| {' | '.join(cells(layer))} |" for layer in ordered(result["layers"])),
        "",
        f"Keep in 8 bits: {', '.join(keep['layers']) or 'none'}.",
    ]
    return "\n".join(lines) + "\n"


def kind_and_block(name: str) -> tuple[str, int] | None:
    """A layer's place in the heat map: ``mlp.down_proj`` and 3 of ``model.layers.3.mlp.down_proj``; experts together."""
    found = re.fullmatch(r".*?\.(\d+)\.(.+)", name)
    return (re.sub(r"\bexperts\.\d+\.", "experts.*.", found[2]), int(found[1])) if found else None


def grids(layers: Sequence[Json]) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """Kinds of layers, and for ``[blocks, kinds]`` the share (summed) and the SNR (lowest); NaN where there is none."""
    places = [(place, layer) for layer in layers if (place := kind_and_block(layer["name"])) is not None]
    kinds = list(dict.fromkeys(kind for (kind, _), _ in places))[:_MOST_KINDS]
    blocks = max((block for (_, block), _ in places), default=0) + 1
    share, snr = (np.full((blocks, len(kinds)), np.nan) for _ in range(2))
    for (kind, block), layer in places:
        if kind in kinds:
            at = (block, kinds.index(kind))
            share[at] = np.nansum([share[at], layer["share"]])
            if layer["snr_db"] is not None:
                snr[at] = np.nanmin([snr[at], layer["snr_db"]])
    return kinds, share, snr


def render_heat_map(result: Json) -> bytes:
    """Blocks against kinds of layers, as PNG: each layer's share of the sum of divergences, and its SNR in dB.

    Equal results give equal bytes, whatever the user's matplotlib settings.
    """
    kinds, share, snr = grids(result["layers"])
    with style.context("default"):
        height = 2.2 + 0.2 * max(10, len(share))
        figure = Figure(figsize=(4.0 + 0.9 * max(4, len(kinds)), height), dpi=_DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        title = f"{result['artifact']} against {result['baseline']}: what each layer costs"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=_INK, parse_math=False)
        if kinds:
            left, right = figure.subplots(1, 2, sharey=True)
            left.set_ylabel("decoder block", color=_INK)
            _panel(figure, left, kinds, share * 100, "share of the sum of KL, % (log scale)", "magma_r", _log_norm(share * 100))
            _panel(figure, right, kinds, snr, "SNR of the output, dB", "viridis", _norm(snr))
        else:
            figure.text(0.5, 0.5, "no layer differs", ha="center", color=_MUTED)
        buffer = io.BytesIO()
        # Without this the matplotlib version would be stamped into the file.
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _panel(
    figure: Any, axes: Any, kinds: Sequence[str], values: NDArray[np.float64], label: str, colours: str, norm: Normalize
) -> None:
    image = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", fontsize=8, color=_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=8, length=0)
    axes.set_title(label, loc="left", fontsize=9.5, color=_MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=8, colors=_MUTED)


def _log_norm(values: NDArray[np.float64]) -> Normalize:
    """A scale over the positive values; over three decades at most, for below that nothing is worth telling apart."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return Normalize(0, 1)
    high = float(positive.max())
    low = max(float(positive.min()), high / 1000)
    return LogNorm(low, high if high > low else low * 1.01, clip=True)


def _norm(values: NDArray[np.float64]) -> Normalize:
    finite = list(_finite(values))
    return Normalize(min(finite), max(finite) + 1e-9) if finite else Normalize(0, 1)


def _finite(values: NDArray[np.float64]) -> Iterator[float]:
    return (float(value) for value in values.flat if math.isfinite(value))
