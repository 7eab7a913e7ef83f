"""Fixtures of the engine's tests: compressed-tensors artifacts made by hand, with no code of the project."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

MakeInt8 = Callable[..., Path]

SYMMETRIC = {"num_bits": 8, "type": "int", "symmetric": True}
ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "dynamic": {**SYMMETRIC, "dynamic": True, "strategy": "token"},
    "static": {**SYMMETRIC, "dynamic": False, "strategy": "tensor"},
}


@pytest.fixture(scope="session")
def make_int8() -> MakeInt8:
    """``make_int8(dense, path, activations, group_size=-1, input_scale=0.05)``: round a directory's linear layers to int8.

    ``activations`` is a key of ``ACTIVATIONS``; scales are float32.
    """
    return write_int8


def write_int8(dense: Path, path: Path, activations: str, group_size: int = -1, input_scale: float = 0.05) -> Path:
    """See :func:`make_int8`; the dense directory holds a single ``model.safetensors``."""
    stored = load_file(dense / "model.safetensors")
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight = stored[name].float()
        grouped = weight.view(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
        scale = grouped.abs().amax(-1, keepdim=True) / 127.5
        layer = name.removesuffix(".weight")
        stored[name] = (grouped / scale).round().clamp(-128, 127).to(torch.int8).view(weight.shape)
        stored[f"{layer}.weight_scale"] = scale[..., 0].contiguous()
        if activations == "static":
            stored[f"{layer}.input_scale"] = torch.tensor([input_scale])
    config = json.loads((dense / "config.json").read_text())
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                # Without a format of the group's own, the package expects W8A16 to be packed, whatever the general one says.
                "format": "int-quantized",
                "weights": {**SYMMETRIC, "dynamic": False, **strategy},
                "input_activations": ACTIVATIONS[activations],
            }
        },
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    for side in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (dense / side).exists():
            shutil.copy(dense / side, path / side)
    return path
