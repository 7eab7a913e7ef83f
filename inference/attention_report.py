"""What naive and tiled attention move and hold, beside the formulas.

python -m inference.attention_report --lengths 256 1024 --plot memory.png

Elements moved are counted in the code that moves them. Memory is the peak of what torch's operations allocate, followed storage
by storage, inputs not counted.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.attention import Attention, attend
from inference.attention_naive import NaiveAttention, naive_elements
from inference.attention_tiled import TiledAttention, tiled_elements
from quantize.errors import InputError


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations made while it is entered.

    Attributes:
        peak: the most at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._held = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def ignore(self, *tensors: Tensor) -> None:
        """These were there before."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    self._held += storage.nbytes()
                    weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self._held)
        return out

    def _release(self, size: int) -> None:
        self._held -= size


@dataclass(frozen=True)
class Row:
    """One length's figures: elements moved as counted and by the formula, and peak bytes."""

    length: int
    naive_moved: int
    naive_formula: int
    tiled_moved: int
    tiled_formula: int
    naive_bytes: int
    tiled_bytes: int
    fused_bytes: int


def peak_bytes(attention: Attention, queries: Tensor, keys: Tensor, values: Tensor) -> int:
    """The most that one call's results, intermediate and final, take at once."""
    with PeakMemory() as memory:
        memory.ignore(queries, keys, values)
        attention(queries, keys, values)
    peak: int = memory.peak
    return peak


def measure(length: int, heads: int, head_dim: int, tile: int) -> Row:
    """A causal text of ``length`` tokens, with as many key heads as query heads."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(length, heads, head_dim, generator=generator)
    keys, values = torch.randn(2, heads, length, head_dim, generator=generator)
    naive, tiled = NaiveAttention(), TiledAttention(tile, tile)
    naive_bytes, tiled_bytes = (peak_bytes(kind, queries, keys, values) for kind in (naive, tiled))
    return Row(
        length,
        naive.traffic.read + naive.traffic.written,
        naive_elements(length, head_dim, heads),
        tiled.traffic.read + tiled.traffic.written,
        tiled_elements(length, head_dim, heads, tile),
        naive_bytes,
        tiled_bytes,
        peak_bytes(attend, queries, keys, values),
    )


def plot(rows: Sequence[Row], target: Path) -> None:
    """Peak memory against length, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lengths = [row.length for row in rows]
    for name in ("naive", "tiled", "fused"):
        axes.plot(lengths, [getattr(row, f"{name}_bytes") / 2**20 for row in rows], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak memory of one layer's attention, MiB")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(target)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m inference.attention_report", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tile", type=int, default=64)
    parser.add_argument("--plot", type=Path, help="write peak memory against length to this image")
    options = parser.parse_args(arguments)
    try:
        for key in ("heads", "head_dim", "tile"):
            if getattr(options, key) < 1:
                raise InputError(f"--{key.replace('_', '-')}={getattr(options, key)} measures nothing; use 1 or more")
        if min(options.lengths) < 1:
            raise InputError(f"--lengths {min(options.lengths)} measures nothing; use 1 or more")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [measure(length, options.heads, options.head_dim, options.tile) for length in options.lengths]
    print("tokens | naive moved (formula) | tiled moved (formula) | peak MiB naive, tiled, fused")
    for row in rows:
        sizes = ", ".join(f"{size / 2**20:.1f}" for size in (row.naive_bytes, row.tiled_bytes, row.fused_bytes))
        moved = f"{row.naive_moved} ({row.naive_formula}) | {row.tiled_moved} ({row.tiled_formula})"
        print(f"{row.length} | {moved} | {sizes}")
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
