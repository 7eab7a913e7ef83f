"""Does quantizing this model by this recipe fit? Known before anything is downloaded or run.

    python -m eval.memory_quantize recipe=awq_7b memory=16GB model.path=DIR

The recipe is composed as ``python -m quantize`` composes it; of the model, its config is enough. docs/memory.md has what is
counted and how far that is from what was measured.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.table import Table

from eval.bench_process import PROJECT, table_console
from eval.memory import parse_bytes, show_bytes
from eval.memory_geometry import load_config
from eval.memory_quantize_plan import plan_variant
from quantize.__main__ import explain
from quantize.checks import validate
from quantize.config import RunConfig, register_configs
from quantize.demo_model import NAME, cache_directory
from quantize.errors import InputError
from quantize.files import write_json
from quantize.logs import quiet_libraries, setup_logging

DOES_NOT_FIT = 3
_TOLD = 0.01  # part of a phase's peak below which a kind is in the JSON only
_HELP = """NAME
    eval.memory_quantize - does a quantization fit? Its memory, phase by phase, from the recipe and the model's config

SYNOPSIS
    python -m eval.memory_quantize recipe=NAME [memory=SIZE] [model.path=DIR|HUB_ID] [key=value ...]

OPTIONS
    recipe=NAME, key=value   as of python -m quantize, which lists them; --config-dir=DIR for recipes of yours
    model.path=DIR|HUB_ID    of a directory, config.json is enough
    device=cuda|cpu          where it is to run; auto: cuda, whether or not this machine has one
    memory=16GB              what there is (GB = 10^9, GiB = 2^30 bytes); default: this machine's GPU, or RAM with device=cpu
    json=FILE                write the figures, in bytes, to this file as well

EXIT STATUS
    0 every variant fits, 3 one does not, 2 bad input, 1 a defect of this program

EXAMPLES
    python -m eval.memory_quantize recipe=awq_7b memory=16GB
    python -m eval.memory_quantize recipe=gptq_7b model.path=./my-model memory=24GB quality=best json=plan.json
"""


@dataclass(frozen=True)
class Question:
    """What the command line asks.

    Attributes:
        config: the recipe.
        device: ``cuda`` or ``cpu``.
        memory: bytes that there are.
        source: where that figure is from.
        json: file for the figures.
    """

    config: RunConfig
    device: torch.device
    memory: int
    source: str
    json: Path | None


def parse(arguments: Sequence[str]) -> Question:
    """Compose the recipe of a command line.

    Raises:
        InputError: an unknown key, an impossible value, or no memory to compare with.
    """
    own: dict[str, str] = {}
    overrides: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        key, equals, value = argument.partition("=")
        if key == "--config-dir" and not equals:
            value = next(pending, "")
        if key in ("memory", "json", "--config-dir"):
            own[key] = value
        else:
            overrides.append(argument)
    if "--config-dir" in own:
        folder = Path(own["--config-dir"]).expanduser()
        if not folder.is_dir():
            raise InputError(f"--config-dir={own['--config-dir']} is no directory; give one that has recipe/NAME.yaml")
        overrides.append(f"hydra.searchpath=[file://{folder.resolve()}]")
    config = _compose(overrides)
    device = torch.device("cuda" if config.device == "auto" else config.device)
    if device.type == "mps":
        raise InputError(f"device={config.device} is not planned for; use device=cuda or device=cpu")
    memory, source = (parse_bytes(own["memory"]), "as given") if "memory" in own else _available(device)
    return Question(config, device, memory, source, Path(own["json"]) if "json" in own else None)


def _compose(overrides: Sequence[str]) -> RunConfig:
    register_configs()
    try:
        with initialize_config_dir(str(PROJECT / "recipes"), version_base="1.3"):
            # The default names a folder by Hydra's own choices, which exist in a run only.
            return validate(compose("config", overrides=["output_dir=unused", *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error)) from error


def _available(device: torch.device) -> tuple[int, str]:
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's RAM"
    if not torch.cuda.is_available():
        raise InputError("memory is not set, and this machine has no CUDA device to ask; use memory=16GB, or device=cpu")
    return torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)


def report(question: Question) -> dict[str, Any]:
    """Every variant's plan, as JSON values.

    Raises:
        InputError: the model's config is not usable, or a variant cannot be planned for it.
    """
    config = question.config
    path = demo_or(config.model.path)
    model = load_config(path)
    plans = [plan_variant(config, name, model, question.device) for name in config.variants]
    calibration = config.calibration
    return {
        "model": path,
        "model_type": model.model_type,
        "memory_bytes": question.memory,
        "memory_source": question.source,
        "calibration": {key: getattr(calibration, key) for key in ("num_samples", "seq_len", "batch_tokens", "activations")},
        "variants": [{**plan.as_dict(), "fits": plan.peak_bytes <= question.memory} for plan in plans],
    }


def demo_or(path: str | None) -> str:
    """``model.path``, or where the demo model is.

    Raises:
        InputError: the demo model is not made yet, or the path names a revision.
    """
    if path is None:
        path = str(cache_directory() / f"{NAME}-FP16")
        if not (Path(path) / "config.json").exists():
            raise InputError("the demo model is not made yet; give model.path=DIR, or run python -m quantize.demo_model")
    if "@" in path and not Path(path).exists():
        raise InputError(f"model.path={path} names a revision; give the id alone, or a directory with its config.json")
    return path


def render(row: dict[str, Any], memory: int) -> Table:
    """One variant's phases for a terminal: what is alive at the peak of each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    verdict = "fits" if row["fits"] else "does not fit"
    table.title = (
        f"{row['variant']} ({row['solver']} on {row['device']}, computing in {row['compute_dtype']}): "
        f"{show_bytes(row['peak_bytes'])}, {verdict} in {show_bytes(memory)}"
    )
    table.add_column("phase")
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("fits")
    table.add_column("alive then")
    for name, phase in row["phases"].items():
        peak = phase["peak"] + row["workspace"]
        alive = sorted(phase["kinds"].items(), key=lambda item: -item[1])
        told = ", ".join(f"{kind} {show_bytes(size)}" for kind, size in alive if size >= _TOLD * phase["peak"])
        table.add_row(name, show_bytes(peak), "yes" if peak <= memory else "no", told)
    table.caption = "\n".join(_notes(row))
    return table


def _notes(row: dict[str, Any]) -> list[str]:
    if not row["phases"]:
        return ["no quantize step: weights stay as they are, or the container's own program quantizes as it loads them"]
    notes = []
    if row["workspace"]:
        notes.append(f"peaks include {show_bytes(row['workspace'])} that torch sets aside for cuBLAS")
    where = "host, reclaimable" if row["device"] == "cuda" else "reclaimable"
    notes.append(f"checkpoint pages mapped at once ({where}): {show_bytes(row['mapped'])}")
    if row["hidden_states"]:
        notes.append(f"hidden states on disk: {show_bytes(row['hidden_states'])}")
    notes.append(f"copied in the host's memory to be written: {show_bytes(row['written'])} at least")
    return notes


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 0 all fit, 3 one does not, 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not {"--help", "-h"}.isdisjoint(arguments):
        print(_HELP, end="")
        return 0
    setup_logging("warning")
    quiet_libraries()
    try:
        question = parse(arguments)
        figures = report(question)
        if question.json:
            write_json(question.json, figures)
    except InputError as error:
        logging.getLogger("eval").error("%s", error)
        return 2
    for row in figures["variants"]:
        table_console().print(render(row, question.memory))
    return 0 if all(row["fits"] for row in figures["variants"]) else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
