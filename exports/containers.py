"""The containers this project writes, by name. A new container is one new file and one line below."""

from __future__ import annotations

from exports import awq, bitsandbytes, compressed_tensors, dense, gptq
from exports.base import Container

CONTAINERS: dict[str, Container] = {
    "safetensors": dense.CONTAINER,
    "gptq": gptq.CONTAINER,
    "awq": awq.CONTAINER,
    "compressed-tensors": compressed_tensors.CONTAINER,
    "bitsandbytes": bitsandbytes.CONTAINER,
}

__all__ = ["CONTAINERS", "Container"]
