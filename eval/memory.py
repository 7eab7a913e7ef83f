"""Does it fit? Memory of every variant of a model, from its config alone.

    python -m eval.memory model=DIR|FILE.gguf|HUB_ID context=8192 batch=16 memory=16GB

``predict`` is the same for programs: see :mod:`eval.memory_predict`. docs/memory.md has the formulas and how far they are from
what was measured.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.table import Table

from eval.bench_process import table_console
from eval.memory_containers import VariantSpec, Weights, variants
from eval.memory_geometry import load_config
from eval.memory_predict import DTYPES, KV_BYTES, RUNTIMES, MemoryPrediction, Predictor, predict
from quantize.errors import InputError
from quantize.files import write_json
from quantize.logs import quiet_libraries, setup_logging

__all__ = ["MemoryPrediction", "VariantSpec", "Weights", "load_config", "main", "predict", "report", "variants"]

LOGITS = ("all", "last")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_MOST = 2**20  # sequences or tokens beyond which nobody needs to know
_HELP = f"""NAME
    eval.memory - does a model fit? Memory of every variant, from its config alone

SYNOPSIS
    python -m eval.memory model=DIR|FILE.gguf|HUB_ID [key=value ...]

OPTIONS
    model=DIR|FILE.gguf|HUB_ID   of a directory, config.json is enough
    context=4096                 tokens of a sequence
    batch=1                      sequences
    memory=16GB                  what there is (GB = 10^9, GiB = 2^30 bytes); default: this machine's GPU or RAM
    variants=[fp16,int4]         default: all of {", ".join(spec.name for spec in variants())}
    group_size=64                of int4: -1, 32, 64, 128
    dtype={"|".join(DTYPES)}   of the quantized variants' other tensors and arithmetic; default: the checkpoint's
    kv_dtype={"|".join(KV_BYTES)}
                                 of the KV cache; default: that of the arithmetic
    logits=all|last              prefill's logits: of every position (scoring), or of the last one (generating)
    prefill_chunk=2048           tokens of a sequence in one forward; default: all of them
    runtime=packed|transformers  packed: kernels that run the codes as stored, as vLLM's do;
                                 transformers: on a CPU, as this project proves its artifacts
    json=FILE                    write the figures, in bytes, to this file as well

EXIT STATUS
    0 done, 2 bad input, 1 a defect of this program

EXAMPLES
    python -m eval.memory model=./my-model context=8192 batch=16 memory=16GB logits=last
    python -m eval.memory model=./my-model context=32768 kv_dtype=int8 prefill_chunk=2048 json=memory.json
"""


@dataclass
class MemoryConfig:
    """The command line's keys."""

    model: str = MISSING
    context: int = 4096
    batch: int = 1
    memory: str | None = None
    variants: list[str] | None = None
    group_size: int = 64
    dtype: str | None = None
    kv_dtype: str | None = None
    logits: str = "all"
    prefill_chunk: int | None = None
    runtime: str = "packed"
    json: str | None = None


def parse(arguments: Sequence[str]) -> MemoryConfig:
    """The settings in ``key=value`` arguments.

    Raises:
        InputError: names the first key that is unknown or has an impossible value, and what is allowed.
    """
    for argument in arguments:
        if not re.match(r"\w+=", argument):
            raise InputError(f"{argument!r} is no key=value; use model=DIR context=8192 batch=16, or --help")
    schema = OmegaConf.structured(MemoryConfig)
    try:
        merged = OmegaConf.merge(schema, OmegaConf.from_dotlist(list(arguments)))
        if OmegaConf.is_missing(merged, "model"):
            raise InputError("model is not set; use model=DIR, model=FILE.gguf or a hub id")
        config: MemoryConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).split("\n")[0]
        raise InputError(f"{error.full_key or error.key}: {reason}; keys are {', '.join(schema)}") from error
    _check(config)
    return config


def _check(config: MemoryConfig) -> None:
    allowed = {"logits": LOGITS, "runtime": RUNTIMES, "dtype": tuple(DTYPES), "kv_dtype": tuple(KV_BYTES)}
    for key, values in allowed.items():
        value = getattr(config, key)
        if value not in values and not (value is None and key.endswith("dtype")):
            raise InputError(f"{key}={value} is unknown; use one of {', '.join(values)}")
    for key, example in (("context", 4096), ("batch", 1), ("prefill_chunk", 2048)):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise InputError(f"{key}={value} is below 1; use {example}")
    if config.group_size != -1 and config.group_size < 1:
        raise InputError(f"group_size={config.group_size} is not a group; use -1 (whole row), 32, 64 or 128")
    names = [spec.name for spec in variants()]
    for name in config.variants or ():
        if name not in names:
            raise InputError(f"variants: {name} is unknown; use some of {', '.join(names)}")


def parse_bytes(text: str) -> int:
    """``16GB``, ``15.5GiB``, ``800 MB`` or a plain number of bytes.

    Raises:
        InputError: it is none of these, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not found or found[2] == "I" or float(found[1]) <= 0:
        raise InputError(f"memory={text} is no size; use 16GB (10^9 bytes each) or 16GiB (2^30)")
    return int(float(found[1]) * _UNITS[found[2]])


def available_memory() -> tuple[int, str]:
    """Bytes of the first CUDA device, or of this machine's RAM where it has none; and which of them it is."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's RAM"


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, where none fits beyond one that does not; 0 if none does."""
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, min(2 * high, limit)
    if high == limit and fits(limit):
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def report(config: MemoryConfig) -> dict[str, Any]:
    """Every variant's figures, as JSON values.

    Raises:
        InputError: the model's config is not usable, or a variant does not exist for its shapes.
    """
    memory, source = (parse_bytes(config.memory), "as given") if config.memory else available_memory()
    predictor = Predictor(
        load_config(config.model),
        runtime=config.runtime,
        logits=config.logits,
        prefill_chunk=config.prefill_chunk,
        kv_dtype=config.kv_dtype,
    )
    specs = [spec for spec in variants(config.group_size, config.dtype) if spec.name in (config.variants or [spec.name])]
    return {
        "model": config.model,
        "model_type": predictor.geometry.config.model_type,
        "parameters": predictor.geometry.parameters,
        "context": config.context,
        "batch": config.batch,
        "memory_bytes": memory,
        "memory_source": source,
        "max_tokens": predictor.geometry.max_tokens,
        "settings": {key: getattr(config, key) for key in ("runtime", "logits", "prefill_chunk", "kv_dtype", "group_size")},
        "variants": [_row(predictor, spec, config, memory) for spec in specs],
    }


def _row(predictor: Predictor, spec: VariantSpec, config: MemoryConfig, memory: int) -> dict[str, Any]:
    prediction = predictor.predict(spec, config.context, config.batch)

    def fits(context: int, batch: int) -> bool:
        known = prediction.resident.total + predictor.kv_bytes(spec, context, batch)
        return known <= memory and predictor.predict(spec, context, batch).peak_bytes <= memory

    longest = largest(lambda context: fits(context, config.batch), predictor.geometry.max_tokens or _MOST)
    batches = largest(lambda batch: fits(config.context, batch), _MOST)
    fit = {"fits": prediction.peak_bytes <= memory, "longest_context": longest, "largest_batch": batches}
    return {**prediction.as_dict(), **fit}


def show_bytes(size: float) -> str:
    """Three significant digits and a decimal unit: ``13.5 GB``."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor * 0.9995:
            return f"{size / factor:.{max(0, 3 - len(str(int(size / factor + 5e-4))))}f} {unit}"
    return f"{size:.0f} B"


def render(figures: dict[str, Any]) -> Table:
    """The report for a terminal."""
    limit = figures["max_tokens"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.title = (
        f"{figures['model']}: {figures['parameters']:,} parameters; context {figures['context']:,} x batch "
        f"{figures['batch']:,} in {show_bytes(figures['memory_bytes'])} ({figures['memory_source']})"
    )
    titles = ("weights", "scales\nzeros", "embed-\ndings", "other", "KV a\ntoken", "KV", "activa-\ntions", "peak")
    table.add_column("variant")
    for title in (*titles, "fits", "longest\ncontext", "largest\nbatch"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in figures["variants"]:
        weights = row["resident"]
        sizes = (
            weights["codes"],
            weights["scales"] + weights["zeros"] + weights["g_idx"],
            weights["embeddings"],
            weights["dense"] + weights["unpacked"],
            row["kv_bytes_per_token"],
            row["kv_bytes"],
            row["activation_bytes"],
            row["peak_bytes"],
        )
        reached = f"{row['longest_context']:,}" + ("+" if row["longest_context"] == (limit or _MOST) else "")
        batches = f"{row['largest_batch']:,}" + ("+" if row["largest_batch"] == _MOST else "")
        table.add_row(row["variant"], *map(show_bytes, sizes), "yes" if row["fits"] else "no", reached, batches)
    notes = [f"activations at the peak of {row['variant']}: {_largest(row)}" for row in figures["variants"][:1]]
    if limit and figures["context"] > limit:
        notes.append(f"context {figures['context']:,} is beyond the {limit:,} tokens that the model was made for")
    table.caption = "\n".join(notes)
    return table


def _largest(row: dict[str, Any]) -> str:
    tensors = [f"{list(item['shape'])} {item['dtype']}, {show_bytes(item['bytes'])}" for item in row["largest"]]
    return "; ".join(tensors) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not {"--help", "-h"}.isdisjoint(arguments):
        print(_HELP, end="")
        return 0
    setup_logging("warning")
    quiet_libraries()
    try:
        config = parse(arguments)
        figures = report(config)
        if config.json:
            write_json(Path(config.json), figures)
    except InputError as error:
        logging.getLogger("eval").error("%s", error)
        return 2
    table_console().print(render(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
