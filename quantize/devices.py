"""Which device and which type calibration runs in."""

from __future__ import annotations

import torch

from quantize.errors import InputError


def resolve_device(name: str) -> torch.device:
    """The device for ``device=name``; ``auto`` takes cuda, then mps, then cpu.

    Raises:
        InputError: the device is not on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise InputError(f"device={name} is not on this machine (CUDA devices: {torch.cuda.device_count()}); use device=auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device=mps is not on this machine; use device=auto")
    return device


def resolve_compute_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The type of calibration forwards: ``auto`` is float32, but the checkpoint's own type on CUDA."""
    if name == "auto":
        return stored if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
