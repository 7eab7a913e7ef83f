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
from quantize.demo_model import demo_model
from quantize.files import read_json


def matmul_rate(size: int = 2048, seconds: float = 2.0) -> float:
    """Floating-point operations per second of float32 ``[size, size]`` products, the best of those done in ``seconds``."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def gptq_operations(model: Path, tokens: int) -> tuple[float, float]:
    """Operations in matrix products of one pass over ``tokens``: linear layers' forwards, and Hessians ``X^T X``.

    A Hessian counts as a general product, ``2 * tokens * in_features**2``, once for each distinct input of a Llama block.
    """
    walk = DecoderWalk(open_checkpoint(str(model)), torch.device("cpu"), torch.float32)
    forward = hessian = 0.0
    for index in range(walk.count):
        layers = walk.layer_names(index)
        forward += sum(2.0 * tokens * rows * columns for rows, columns in layers.values())
        shared = ("k_proj", "v_proj", "up_proj")  # read the same input as q_proj and gate_proj
        hessian += sum(2.0 * tokens * columns**2 for name, (_, columns) in layers.items() if not name.endswith(shared))
    return forward, hessian


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
    steps = read_json(options.output_dir / "manifest.json")["steps"]
    samples, tokens = steps["calibrate"]["result"]["windows"]
    forward, hessian = gptq_operations(model, samples * tokens)
    rate = matmul_rate()
    table = Table("step", "seconds", "peak RSS (MiB)", title=f"GPTQ, {samples} x {tokens} tokens", title_justify="left")
    for name, step in steps.items():
        table.add_row(name, f"{step['seconds']:.1f}", f"{step['peak_rss_bytes'] / 2**20:.0f}")
    console = table_console()
    console.print(table)
    least = (forward + hessian) / rate
    spent = steps["quantize/gptq"]["seconds"]
    console.print(
        f"matrix products: {forward / 1e12:.1f} TFLOP forwards + {hessian / 1e12:.1f} TFLOP Hessians; "
        f"peak {rate / 1e9:.0f} GFLOP/s (measured): at least {least:.0f} s; quantize took {spent:.0f} s, "
        f"{least / spent:.0%} of peak",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
