"""A measured artifact beside its prediction: which variant it is, and how far the figures are from each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from eval.memory_containers import VariantSpec
from eval.memory_geometry import load_config
from eval.memory_predict import MemoryPrediction, Predictor
from eval.perplexity import container_of
from quantize.errors import InputError
from quantize.files import read_json

_NEGLIGIBLE = 1000  # bytes


def spec_of(artifact: Path) -> VariantSpec:
    """The variant that an artifact directory is, by its config.

    Raises:
        InputError: it is in no container that the memory report measures, or the layers of the checkpoint are on several grids.
    """
    container = container_of(artifact)
    config = read_json(artifact / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if container == "safetensors":
        return VariantSpec(artifact.name, dtype=dtype)
    quantization = config["quantization_config"]
    if container == "gptq":
        if any(not pattern.startswith("-:") for pattern in quantization.get("dynamic") or {}):
            raise InputError(f"{artifact} has layers on several grids; the memory report compares checkpoints with one")
        symmetric = bool(quantization.get("sym", True))
        return VariantSpec(artifact.name, "gptq", quantization["bits"], quantization["group_size"], symmetric, dtype)
    if container != "compressed-tensors":
        raise InputError(
            f"{artifact} is a checkpoint of {container}; the memory report measures safetensors, gptq and compressed-tensors"
        )
    groups = list(quantization["config_groups"].values())
    if len(groups) != 1:
        raise InputError(f"{artifact} has {len(groups)} config_groups; the memory report compares checkpoints with one")
    weights = groups[0]["weights"]
    return VariantSpec(
        name=artifact.name,
        container=groups[0].get("format") or quantization["format"],
        bits=weights["num_bits"],
        group_size=weights.get("group_size") or -1,
        symmetric=weights["symmetric"],
        dtype=dtype,
        int8_inputs=groups[0].get("input_activations") is not None,
    )


def predict_artifact(artifact: Path, context: int, batch: int, logits: str = "all") -> MemoryPrediction:
    """The prediction for an artifact, from its config alone, as transformers runs it."""
    config = load_config(str(artifact))
    return Predictor(config, runtime="transformers", logits=logits).predict(spec_of(artifact), context, batch)


def compare(prediction: MemoryPrediction, measured: Mapping[str, Any]) -> list[tuple[str, int, int, float]]:
    """Rows ``(what, predicted, measured, difference)``, the difference as a part of what was measured.

    Rows below a kilobyte on both sides are left out.
    """
    pairs = [
        *((f"on disk: {kind}", size, measured["stored"][kind]) for kind, size in vars(prediction.stored).items()),
        *((f"resident: {kind}", size, measured["resident"][kind]) for kind, size in vars(prediction.resident).items()),
        ("KV cache", prediction.kv_bytes, measured["kv_bytes"]),
        ("activations", prediction.activation_bytes, measured["activation_bytes"]),
        ("peak", prediction.peak_bytes, measured["peak_bytes"]),
    ]
    return [
        (what, predicted, found, (predicted - found) / found if found else float("inf"))
        for what, predicted, found in pairs
        if max(predicted, found) >= _NEGLIGIBLE
    ]


def render(rows: Mapping[str, list[tuple[str, int, int, float]]]) -> Table:
    """The comparison of several artifacts, by name."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("artifact", "bytes of", "predicted", "measured", "difference"):
        table.add_column(title, justify="left" if title in ("artifact", "bytes of") else "right")
    for name, lines in rows.items():
        for index, (what, predicted, found, difference) in enumerate(lines):
            table.add_row("" if index else name, what, f"{predicted:,}", f"{found:,}", f"{difference:+.2%}")
        table.add_section()
    return table
