"""Containers: the bytes on disk. One file each; a new container is one new file and one line below."""

from __future__ import annotations

from exports import bitsandbytes, dense, gptq
from exports.base import Container

CONTAINERS: dict[str, Container] = {
    "safetensors": dense.CONTAINER,
    "gptq": gptq.CONTAINER,
    "bitsandbytes": bitsandbytes.CONTAINER,
}

__all__ = ["CONTAINERS", "Container"]
