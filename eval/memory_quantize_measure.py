"""A quantization's memory measured on this machine, beside its plan.

    python -m eval.memory_quantize_measure recipe=gptq model.path=DIR blocks=2

Keys are those of :mod:`eval.memory_quantize`. The quantize step of each variant is run for the first blocks (and the output
embedding where it is quantized) on random tokens: of what is in them memory does not depend. Counted is what
:func:`eval.memory_measure.allocated` counts: on a CPU every allocation and free of torch's, to the byte; on CUDA
``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from eval.bench_process import table_console
from eval.memory_geometry import load_config
from eval.memory_measure import allocated
from eval.memory_quantize import demo_or, parse
from eval.memory_quantize_plan import plan_variant
from quantize import quantizer
from quantize.block_files import BlockFiles
from quantize.checkpoint import SafetensorsCheckpoint
from quantize.config import RunConfig
from quantize.devices import resolve_device
from quantize.errors import InputError
from quantize.files import write_json, write_tensors
from quantize.logs import quiet_libraries, setup_logging
from quantize.run import Run, needs_calibration

_BLOCKS = 2  # in the second, hidden states are in memory


class HeldCheckpoint(SafetensorsCheckpoint):
    """A checkpoint read before anything is measured: on a CPU a mapped file counts as allocated, all of it."""

    def __init__(self, path: Path) -> None:
        """Read the checkpoint in ``path``."""
        super().__init__(path)
        self._held = {name: tensor.clone() for file in self.weight_files() for name, tensor in load_file(file).items()}

    def tensor(self, name: str) -> Tensor:
        return self._held[name]

    def release(self) -> None:
        """Nothing is mapped anew."""


def measure_variant(config: RunConfig, name: str, folder: Path, blocks: int = _BLOCKS) -> int:
    """The peak of bytes allocated on ``config.device`` while a variant's first blocks are quantized.

    Args:
        config: the validated recipe; ``model.path`` is a directory with weights.
        name: of the variant, which has a quantize step.
        folder: for the run's files.
        blocks: how many.

    Raises:
        InputError: the checkpoint or the device is not there, or the variant does not exist for the model's shapes.
    """
    run, variant = Run(config, folder, str(config.model.path)), config.variants[name]
    if run.device.type == "cpu":
        run.checkpoint = HeldCheckpoint(Path(run.model_path))
    shape = (config.calibration.num_samples, config.calibration.seq_len)
    vocabulary = run.checkpoint.config.get_text_config().vocab_size
    windows = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(config.seed))
    write_tensors(run.work("calibration", "windows.safetensors"), {"windows": windows})
    calibrated = needs_calibration(variant.solver)

    def work() -> None:
        count = len(quantizer.parts_of(run, variant))
        files = BlockFiles(run.work("quantize", name), "", count)
        steps = (quantizer._CalibratedSteps if calibrated else quantizer._PlainSteps)(run, variant, files, 0)
        for index in [*range(min(blocks, run.walk.count)), *range(run.walk.count, count)]:
            steps(index)

    return allocated(work, str(run.device))[1]


def report(arguments: Sequence[str]) -> dict[str, Any]:
    """Plan and measurement of every variant that has a quantize step, in bytes.

    Raises:
        InputError: as of :func:`eval.memory_quantize.parse`, or no such checkpoint.
    """
    own = [argument for argument in arguments if argument.startswith("blocks=")]
    blocks = own[-1].partition("=")[2] if own else str(_BLOCKS)
    if not re.fullmatch(r"[1-9]\d*", blocks):
        raise InputError(f"blocks={blocks} is no number of blocks; use 1 or more, such as blocks={_BLOCKS}")
    device = resolve_device(next((a.partition("=")[2] for a in reversed(arguments) if a.startswith("device=")), "auto"))
    rest = [argument for argument in arguments if argument not in own]
    question = parse([*rest, f"device={device}"])
    config = question.config
    config.model.path = demo_or(config.model.path)
    model, rows = load_config(config.model.path), []
    for name in config.variants:
        plan = plan_variant(config, name, model, device)
        if plan.phases:
            with tempfile.TemporaryDirectory() as folder:
                measured = measure_variant(config, name, Path(folder), int(blocks))
            rows.append({**plan.as_dict(), "measured_bytes": measured})
    figures = {"model": config.model.path, "blocks": int(blocks), "threads": torch.get_num_threads(), "variants": rows}
    if question.json:
        write_json(question.json, figures)
    return figures


def render(figures: dict[str, Any]) -> Table:
    """The report for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.title = f"{figures['model']}: peak of quantizing, {figures['blocks']} blocks"
    for column in ("variant", "device", "computing in", "largest phase"):
        table.add_column(column)
    for column in ("planned", "measured", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in figures["variants"]:
        largest = max(row["phases"], key=lambda name: row["phases"][name]["peak"])
        sizes = f"{row['peak_bytes']:,}", f"{row['measured_bytes']:,}"
        difference = row["peak_bytes"] / row["measured_bytes"] - 1
        table.add_row(row["variant"], row["device"], row["compute_dtype"], largest, *sizes, f"{difference:+.2%}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    setup_logging("warning")
    quiet_libraries()
    try:
        figures = report(arguments)
    except InputError as error:
        logging.getLogger("eval").error("%s", error)
        return 2
    table_console().print(render(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
