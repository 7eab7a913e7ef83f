"""Memory of an artifact as its consumer runs it, and how far the prediction is from it.

    python -m eval.memory_measure ARTIFACT [ARTIFACT ...] --context 512 --batch 1

Each artifact is loaded in a process of its own. What is counted, on a CPU, are the bytes that torch's allocator hands out
(torch.profiler's record of every allocation), which is exact and repeats to the byte; the process's resident memory, which
is given as well, has the interpreter, libraries and the allocator's leftovers in it. On CUDA the figures are torch's own,
``max_memory_allocated``. One forward of one token runs before: programs unpack what they want to keep on the first one.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from eval.bench_process import PROJECT, table_console
from eval.consumers import CONSUMERS
from eval.memory_compare import compare, predict_artifact, render
from eval.memory_containers import Weights
from eval.memory_geometry import Geometry, geometry, load_config
from eval.perplexity import container_of
from quantize.blocks import RENAMED
from quantize.config import LOG_LEVELS
from quantize.errors import InputError
from quantize.files import read_json, write_json
from quantize.logs import quiet_libraries, setup_logging, stdout_to_stderr
from quantize.manifest import peak_rss_bytes, reset_peak_rss

# Names of a quantized layer's tensors in all containers, by what they are; ``weight`` is codes inside the blocks.
_KINDS = {
    "codes": ("weight", "qweight", "weight_packed"),
    "scales": ("scales", "weight_scale", "SCB", "absmax"),
    "zeros": ("qzeros", "weight_zero_point"),
    "g_idx": ("g_idx", "weight_g_idx"),
}
_EXPERT_PARTS = (".gate_up_proj", ".down_proj")
LOGITS = ("all", "last")


def kind_of(name: str, shapes: Geometry) -> str:
    """The field of :class:`~eval.memory_containers.Weights` that a tensor belongs to, by its name."""
    module, _, leaf = RENAMED.get(name, name).rpartition(".")
    if leaf == "weight" and any(module == known or known.endswith(f".{module}") for known in shapes.embedding_names):
        return "embeddings"
    if module in shapes.layer_names or ".experts." in name:
        if name.endswith(_EXPERT_PARTS):
            return "codes"
        return next((kind for kind, leaves in _KINDS.items() if leaf in leaves), "dense")
    return "dense"


def add_up(sizes: Iterable[tuple[str, int]], shapes: Geometry) -> Weights:
    """Bytes by kind of ``(tensor name, bytes)``."""
    total = Weights()
    for name, size in sizes:
        total += Weights(**{kind_of(name, shapes): size})
    return total


def stored_sizes(artifact: Path) -> dict[str, int]:
    """Bytes of every tensor in a directory's safetensors files, by name; headers are not counted.

    Raises:
        InputError: there are no such files.
    """
    files = sorted(artifact.glob("*.safetensors"))
    if not files:
        raise InputError(f"{artifact} has no safetensors files; give an artifact that this project made")
    sizes = {}
    for file in files:
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                sizes[name] = tensor.numel() * tensor.itemsize
    return sizes


def storages(model: Any) -> dict[int, tuple[str, Any]]:
    """Storage of every parameter and buffer of a loaded model, by address, with a name; what several share is there once."""
    found: dict[int, tuple[str, Any]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.setdefault(tensor.untyped_storage().data_ptr(), (name, tensor.untyped_storage()))
    return found


def add_up_storages(found: dict[int, tuple[str, Any]], shapes: Geometry) -> Weights:
    """Bytes by kind of what :func:`storages` found."""
    return add_up(((name, storage.nbytes()) for name, storage in found.values()), shapes)


def allocated(work: Callable[[], Any], device: str) -> tuple[Any, int, int]:
    """Run ``work``; its result, the peak of bytes allocated while it ran, and bytes it allocated that remain at its end.

    On a CPU, frees of what was there before do not count; on CUDA both figures are less by them.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    changes: list[tuple[int, int, int]] = []
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if str(event.tag) == "_EventType.Allocation":
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    running = peak = 0
    alive: dict[int, int] = {}
    for _, address, size in sorted(changes, key=lambda change: change[0]):
        running += size
        peak = max(peak, running)
        if size > 0:
            alive[address] = size
        else:
            alive.pop(address, None)
    return result, peak, sum(alive.values())


def unpacked_bytes(model: Any, work: Callable[[], Any], device: str) -> int:
    """Bytes that the first forward, ``work``, leaves behind outside the model's parameters and buffers."""
    before = storages(model)
    sizes = {address: storage.nbytes() for address, (_, storage) in before.items()}
    references = [weakref.ref(storage) for _, storage in before.values()]
    before.clear()
    _, _, kept = allocated(work, device)
    after = storages(model)
    new: int = sum(storage.nbytes() for address, (_, storage) in after.items() if address not in sizes)
    alive = [storage for reference in references if (storage := reference()) is not None]
    replaced: int = sum(storage.nbytes() for storage in alive if storage.data_ptr() not in after)
    if device.startswith("cuda"):
        gone: int = sum(sizes.values()) - sum(storage.nbytes() for storage in alive)
        return max(0, kept - new + gone + replaced)
    return max(0, kept - new + replaced)


def measure_here(artifact: Path, context: int, batch: int, *, logits: str = "all", device: str = "cpu") -> dict[str, Any]:
    """Measure in this process; see :func:`measure`."""
    shapes = geometry(load_config(str(artifact)))
    reset_peak_rss()
    loaded = CONSUMERS[container_of(artifact)].load(artifact, device)
    model: Any = loaded.model  # type: ignore[attr-defined]
    if context > loaded.max_tokens:
        raise InputError(f"context={context} exceeds the model's context of {loaded.max_tokens} tokens; use at most that")
    keep = {"logits_to_keep": 1} if logits == "last" else {}
    ids = torch.zeros(batch, context, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def warm_up() -> None:
        model(input_ids=ids[:1, :1], use_cache=False)

    @torch.inference_mode()
    def prefill() -> Any:
        return model(input_ids=ids, use_cache=True, **keep)

    before = add_up_storages(storages(model), shapes)
    unpacked = unpacked_bytes(model, warm_up, device)
    resident = add_up_storages(storages(model), shapes)
    output, peak, _ = allocated(prefill, device)
    layers = [layer for layer in output.past_key_values.layers if layer.is_initialized]
    cache = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, cache)}.values())
    return {
        "artifact": artifact.name,
        "consumer": loaded.consumer,
        "compute_dtype": loaded.compute_dtype,
        "device": device,
        "context": context,
        "batch": batch,
        "logits": logits,
        "stored": vars(add_up(stored_sizes(artifact).items(), shapes)),
        "loaded": vars(before),
        "resident": vars(resident + Weights(unpacked=unpacked)),
        "kv_bytes": held,
        "kv_window_bytes": sum(tensor.numel() * tensor.itemsize for tensor in cache),
        "activation_bytes": peak - held,
        "peak_bytes": resident.total + unpacked + peak,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def measure(artifact: Path, context: int, batch: int, *, logits: str = "all", device: str = "cpu") -> dict[str, Any]:
    """Load an artifact in its consumer, in a process of its own, run a prefill, and measure.

    Args:
        artifact: a directory that this project wrote.
        context: tokens of a sequence.
        batch: sequences.
        logits: ``all`` positions or the ``last``.
        device: ``cpu`` or ``cuda``.

    Returns:
        In bytes: ``stored`` (tensors on disk), ``loaded`` (parameters and buffers once loaded) and ``resident`` (after the
        first forward, with what it left behind), each by the fields of :class:`~eval.memory_containers.Weights`; ``kv_bytes``
        (storage of the cache after the prefill), ``kv_window_bytes`` (its tensors, which see a part of it once a sliding
        window is full), ``activation_bytes`` (peak besides both), ``peak_bytes``, and ``peak_rss_bytes`` of the process.

    Raises:
        InputError: the artifact is not there or its consumer refuses it.
    """
    environment = {**os.environ, **CONSUMERS[container_of(artifact)].environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured.json"
        options = ["--context", context, "--batch", batch, "--logits", logits, "--device", device, "--here", output]
        command = [sys.executable, "-m", "eval.memory_measure", artifact.resolve(), *options]
        result = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return dict(read_json(output))
    last = (result.stderr.strip().splitlines() or ["no output"])[-1]
    raise InputError(f"measuring {artifact} failed: {last.removeprefix('ERROR: ')}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m eval.memory_measure", description="Memory predicted and measured.")
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="artifact directory")
    parser.add_argument("--context", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--logits", choices=LOGITS, default="all", help="of all positions, or of the last")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--json", type=Path, help="write predictions and measurements to this file")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--log-level", default="warning", choices=LOG_LEVELS)
    options = parser.parse_args(arguments)
    setup_logging(options.log_level)
    quiet_libraries()
    run = {"context": options.context, "batch": options.batch, "logits": options.logits}
    try:
        for key in ("context", "batch"):
            if run[key] < 1:
                raise InputError(f"{key}={run[key]} is below 1; use 1 or more")
        if options.here:
            with stdout_to_stderr(shown=False):
                write_json(options.here, measure_here(options.artifacts[0], **run, device=options.device))
            return 0
        predicted = {str(path): predict_artifact(path, **run) for path in options.artifacts}
        measured = {str(path): measure(path, **run, device=options.device) for path in options.artifacts}
        if options.json:
            both = {path: {"predicted": predicted[path].as_dict(), "measured": measured[path]} for path in measured}
            write_json(options.json, both)
    except InputError as error:
        logging.getLogger("eval").error("%s", error)
        return 2
    table_console().print(render({Path(path).name: compare(predicted[path], measured[path]) for path in measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
