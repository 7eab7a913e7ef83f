"""AWQ here and elsewhere, side by side: ``python -m eval.bench_awq`` (``make bench-awq``).

The same comparison as :mod:`eval.bench_gptq`, with AutoAWQ's and llm-compressor's AWQ as peers, and round-to-nearest and this
project's GPTQ beside them. Every method gets the same calibration windows and is judged by the artifact that it saves.
"""

from __future__ import annotations

import sys

from eval import bench_gptq
from eval.bench_methods import Bench, Method

METHODS = (
    Method("fp16", bits=16, group=None, symmetric=None, recipe="fp16"),
    Method("rtn", recipe="awq", settings=("solver=rtn",)),
    Method("ours-awq", recipe="awq"),
    Method("ours-awq-module", recipe="awq", settings=("solver.search_loss=module",), extra=True),
    Method("ours-awq+gptq", recipe="awq", settings=("solver=awq+gptq",)),
    Method("ours-gptq", settings=("quality=balanced",)),
    Method("ours-gptq-static", settings=("quality=balanced", "solver.static_groups=true")),
    Method("ours-awq-best", recipe="awq", settings=("quality=best",), extra=True),
    Method("ours-awq+gptq-best", recipe="awq", settings=("solver=awq+gptq", "quality=best"), extra=True),
    Method("autoawq", package="autoawq", algorithm="awq"),
    Method("llmcompressor", package="llmcompressor", algorithm="awq"),
)
AWQ = Bench("awq", METHODS)


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 1 a row failed, 2 bad input."""
    return bench_gptq.main(arguments, AWQ)


if __name__ == "__main__":
    sys.exit(main())
