"""Time and memory of GPTQ on this machine: ``python -m eval.bench`` (``make bench``).

Runs ``recipe=gptq`` on the demo model from scratch and reads the manifest: seconds and peak memory of each step, and which
fraction of the machine's float32 matrix-product rate, measured in the same run, the quantize step reached.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.table import Table

from eval.bench_process import quantize_command, table_console
from quantize.blocks import DecoderWalk
from quantize.checkpoint import open_checkpoint
from quantize.config import QUALITIES
from quantize.demo_model import demo_model
from quantize.files import read_json
from quantize.statistics import TILE


def matmul_rate(size: int = 2048, seconds: float = 2.0) -> float:
    """Floating-point operations per second of float32 ``[size, size]`` products, the best of those done in ``seconds``."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def gptq_operations(model: Path, tokens: int, compared: bool) -> tuple[float, float]:
    """Operations in matrix products of one pass over ``tokens``: linear layers' forwards, and statistics of their inputs.

    Statistics are taken once for each distinct input of a Llama block: the Hessian's tiles on and above the diagonal, and
    where the unquantized model is ``compared``, the drift as well, and every forward twice.
    """
    walk = DecoderWalk(open_checkpoint(str(model)), torch.device("cpu"), torch.float32)
    forward = statistics = 0.0
    for index in range(walk.count):
        layers = walk.layer_names(index)
        forward += sum(2.0 * tokens * rows * columns for rows, columns in layers.values())
        shared = ("k_proj", "v_proj", "up_proj")  # read the same input as q_proj and gate_proj
        for columns in (columns for name, (_, columns) in layers.items() if not name.endswith(shared)):
            tiles = sum(min(TILE, columns - start) * (columns - start) for start in range(0, columns, TILE))
            statistics += 2.0 * tokens * (tiles + compared * columns**2)
    return forward * (1 + compared), statistics


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code is the run's."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("artifacts/bench"), help="emptied first")
    parser.add_argument("overrides", nargs="*", help="recipe settings, such as quality=fast")
    options = parser.parse_args(arguments)
    model = demo_model()
    shutil.rmtree(options.output_dir, ignore_errors=True)
    status = subprocess.run(quantize_command("gptq", options.output_dir, options.overrides), check=False).returncode
    if status:
        return status
    manifest = read_json(options.output_dir / "manifest.json")
    steps, recipe = manifest["steps"], manifest["recipe"]
    samples, tokens = steps["calibrate"]["result"]["windows"]
    alpha = recipe["variants"]["gptq"]["solver"]["gptaq_alpha"]
    compared = bool(QUALITIES[recipe["quality"]]["gptaq_alpha"] if alpha is None else alpha)
    forward, statistics = gptq_operations(model, samples * tokens, compared)
    rate = matmul_rate()
    table = Table("step", "seconds", "peak RSS (MiB)", title=f"GPTQ, {samples} x {tokens} tokens", title_justify="left")
    for name, step in steps.items():
        table.add_row(name, f"{step['seconds']:.1f}", f"{step['peak_rss_bytes'] / 2**20:.0f}")
    console = table_console()
    console.print(table)
    least = (forward + statistics) / rate
    spent = steps["quantize/gptq"]["seconds"]
    console.print(
        f"matrix products: {forward / 1e12:.1f} TFLOP forwards + {statistics / 1e12:.1f} TFLOP statistics of inputs; "
        f"peak {rate / 1e9:.0f} GFLOP/s (measured): at least {least:.0f} s; quantize took {spent:.0f} s, "
        f"{least / spent:.0%} of peak (tuning is not counted)",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
