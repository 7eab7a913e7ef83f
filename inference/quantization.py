"""What a compressed-tensors ``quantization_config`` says about int8 layers, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.errors import InputError

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True}
_DYNAMIC = {**_WEIGHTS, "dynamic": True, "strategy": "token"}
_STATIC = {**_WEIGHTS, "dynamic": False, "strategy": "tensor"}


@dataclass(frozen=True)
class Int8Scheme:
    """How an artifact's int8 layers treat their inputs.

    Attributes:
        file: its config.json.
        activations: ``none`` (W8A16), ``dynamic`` (a scale a token, at run time) or ``static`` (a stored scale a layer).
    """

    file: Path
    activations: str

    def check(self, name: str, weight: Tensor, scales: Tensor, input_scale: Tensor | None) -> None:
        """Raise :class:`InputError` unless a layer's tensors are what the scheme needs."""
        rows, columns = weight.shape
        if scales.ndim != 2 or scales.shape[0] != rows or columns % scales.shape[1]:
            raise InputError(
                f"{self.file.parent}: {name}.weight_scale is {list(scales.shape)}; codes of {[rows, columns]} need "
                f"[{rows}, 1] or [{rows}, groups] with groups dividing {columns}"
            )
        if (self.activations == "static") != (input_scale is not None):
            raise InputError(
                f"{self.file.parent}: {name} has {'no' if input_scale is None else 'an'} input_scale, but config.json's "
                f"input_activations are {self.activations}; static layers, and only they, store one"
            )


def int8_scheme(file: Path, quantization: Mapping[str, Any]) -> Int8Scheme:
    """The one scheme of all config groups.

    Raises:
        InputError: another format or grid, or groups that treat activations differently.
    """
    if quantization.get("format") != "int-quantized":
        raise InputError(
            f"{file}: format={quantization.get('format')!r} is not read by the engine; use format='int-quantized' or "
            "format='pack-quantized'"
        )
    if quantization.get("kv_cache_scheme"):
        raise InputError(f"{file}: a quantized kv_cache_scheme is not supported; use kv_cache_scheme=null")
    groups = (quantization.get("config_groups") or {}).values()
    if not groups:
        raise InputError(f"{file}: quantization_config has no config_groups; at least group_0 says what is quantized how")
    schemes = {_activations(file, group) for group in groups}
    if len(schemes) > 1:
        raise InputError(f"{file}: config_groups mix {', '.join(sorted(schemes))} activations; use one kind for all groups")
    return Int8Scheme(file, schemes.pop())


def _activations(file: Path, group: Mapping[str, Any]) -> str:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if not _agrees(weights, _WEIGHTS) or weights.get("strategy") not in ("channel", "group") or weights.get("actorder"):
        raise InputError(
            f"{file}: weights={weights} are not supported; use num_bits=8, type=int, symmetric=true, strategy=channel or group"
        )
    if group.get("output_activations"):
        raise InputError(f"{file}: output_activations are not supported; use null")
    if not inputs:
        return "none"
    for kind, wanted in (("dynamic", _DYNAMIC), ("static", _STATIC)):
        if _agrees(inputs, wanted):
            return kind
    raise InputError(
        f"{file}: input_activations={inputs} are not supported; use null, or symmetric int8 with dynamic=true, strategy=token "
        "or dynamic=false, strategy=tensor"
    )


def _agrees(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(found.get(key) == value for key, value in wanted.items())
