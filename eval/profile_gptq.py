"""Where GPTQ's time goes: ``python -m eval.profile_gptq`` (``make profile-gptq``).

Times each part of the work on one decoder block of the demo model with real hidden states, and compares the floating-point
operations it does with the machine's matrix-product rate, measured in the same run. Parts without matrix products (the scale
search) have seconds only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from calibration.sources import load_text
from calibration.windows import pack_windows
from eval.bench import matmul_rate
from eval.bench_process import table_console
from quantize.blocks import Arguments, DecoderWalk, linear_layers
from quantize.checkpoint import open_checkpoint
from quantize.demo_model import demo_model
from quantize.forwards import run_block
from quantize.grids import Grid
from quantize.groups import find_groups
from quantize.solvers import SolverOptions
from quantize.solvers.gptq import feed_back, inverse_factor, make_good, plan_columns
from quantize.statistics import TILE, Statistics


@dataclass
class Part:
    """One part of the work on a block: seconds, and operations done in matrix products (0: none)."""

    seconds: float = 0.0
    operations: float = 0.0

    def add(self, seconds: float, operations: float) -> None:
        """Add one more measurement."""
        self.seconds += seconds
        self.operations += operations


def timed(action: Callable[[], object]) -> float:
    """Seconds of the faster of two runs."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@torch.no_grad()
def profile_block(walk: DecoderWalk, hidden: list[Tensor], arguments: Arguments, index: int, grid: Grid) -> dict[str, Part]:
    """Seconds and operations of each part, for block ``index`` and the hidden states (in batches) that enter it."""
    names = ("forward", "Hessian", "drift", "factorisation", "drift correction", "scale search", "feedback")
    parts = {name: Part() for name in names}
    tokens = sum(batch.shape[0] * batch.shape[1] for batch in hidden)
    with walk.loaded_block(index) as block:
        layers = linear_layers(block)
        weights = sum(layer.get_parameter("weight").numel() for layer in layers.values())
        seconds = timed(lambda: [run_block(block, batch, arguments) for batch in hidden])
        parts["forward"].add(seconds, 2.0 * tokens * weights)
        for group in find_groups(block, hidden, arguments):
            inputs: list[Tensor] = []
            handle = layers[group[0]].register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            for batch in hidden:
                run_block(block, batch, arguments)
            handle.remove()
            weight = torch.cat([walk.weight(f"{walk.path}.{index}.{name}") for name in group])
            _profile_group(parts, weight, inputs, grid)
    return parts


def _profile_group(parts: dict[str, Part], weight: Tensor, inputs: list[Tensor], grid: Grid) -> None:
    rows, columns = weight.shape
    tokens = sum(batch.shape[0] * batch.shape[1] for batch in inputs)

    def collect(reference: bool) -> Statistics:
        statistics = Statistics()
        for batch in inputs:
            statistics.add(batch, batch if reference else None)
        return statistics

    plain = timed(lambda: collect(False))
    # Tiles on and above the diagonal.
    tiles = sum(min(TILE, columns - start) * (columns - start) for start in range(0, columns, TILE))
    parts["Hessian"].add(plain, 2.0 * tokens * tiles)
    parts["drift"].add(timed(lambda: collect(True)) - plain, 2.0 * tokens * columns**2)
    hessian = collect(False).hessian()
    options = SolverOptions(search_steps=40)
    plan = plan_columns(hessian.diagonal(), grid, options)
    hessian = hessian[plan.order][:, plan.order]
    weight = weight[:, plan.order]
    factor = inverse_factor(hessian, options.damp_percent, ["layer"])
    # Cholesky n^3 / 3, and a triangular solve for the n columns of the unit matrix, n^3.
    parts["factorisation"].add(timed(lambda: inverse_factor(hessian, options.damp_percent, ["layer"])), columns**3 * 4 / 3)
    correction = timed(lambda: make_good(weight, hessian, factor, plan.order))
    parts["drift correction"].add(correction, 3 * 2.0 * rows * columns**2)
    unsearched = SolverOptions(search_steps=0)
    feedback = timed(lambda: feed_back(weight, factor, hessian.diagonal(), grid, plan, unsearched))
    parts["feedback"].add(feedback, 1.0 * rows * columns**2)
    both = timed(lambda: feed_back(weight, factor, hessian.diagonal(), grid, plan, options))
    parts["scale search"].add(both - feedback, 0)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code is always 0."""
    parser = argparse.ArgumentParser(prog="python -m eval.profile_gptq", description=__doc__)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args(arguments)
    walk = DecoderWalk(open_checkpoint(str(demo_model())), torch.device("cpu"), torch.float32)
    text = load_text("builtin", "train")
    windows = pack_windows(walk.checkpoint.tokenizer(), text, num_samples=options.num_samples, seq_len=options.seq_len, seed=0)
    hidden = [walk.block_inputs(batch) for batch in torch.split(windows, max(1, 2048 // options.seq_len))]
    grid = Grid(options.bits, options.group_size, symmetric=False)
    parts = profile_block(walk, hidden, walk.block_arguments(options.seq_len)[0], 0, grid)
    rate = matmul_rate()
    title = f"One block of {walk.count}, {options.num_samples} x {options.seq_len}; peak {rate / 1e9:.0f} GFLOP/s"
    table = Table("part", "seconds", "GFLOP", "of peak", title=title, title_justify="left")
    for name, part in parts.items():
        share = f"{part.operations / part.seconds / rate:.0%}" if part.operations and part.seconds > 0 else "-"
        table.add_row(name, f"{part.seconds:.3f}", f"{part.operations / 1e9:.1f}", share)
    table_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
