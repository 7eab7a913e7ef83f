"""From an artifact directory to a :class:`~inference.model.Model`: which stored tensors make which layer.

Read are dense safetensors, compressed-tensors ``int-quantized`` (int8 weights; activations left alone, dynamic per token, or
static per tensor) and ``pack-quantized``, GPTQ and AWQ. Codes of other grids than symmetric 8 bits are dequantized once, here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import exports.awq
import exports.compressed_tensors
import exports.gptq
from exports.packing import to_signed
from exports.shards import read_shards
from inference.config import ModelConfig, read_config
from inference.linear import (
    DenseLinear,
    HalfStoredLinear,
    Int8Linear,
    Int8WeightOnlyLinear,
    Linear,
    PackedLinear,
    SideBySide,
    half_stored_fits,
    packed_fits,
    quantize_rows,
)
from inference.model import Block, Model
from inference.norm import RMSNorm
from inference.quantization import Int8Scheme, int8_scheme
from quantize.errors import InputError
from quantize.files import read_json
from quantize.grids import QuantizedTensor

DENSE = ("auto", "packed", "plain", "stored")
HEAD = ("artifact", "int8")


@dataclass(frozen=True)
class LoadOptions:
    """How an artifact is held in memory.

    Attributes:
        dtype: the compute type: float32, bfloat16 or float16.
        device: where.
        dense: how unquantized layers are held; the numbers are the same in all. ``packed`` is in the compute type, laid out for
            oneDNN's kernels where they run; ``plain`` is in the compute type, for torch's own product; ``stored`` keeps
            float16 values in 16 bits under float32 arithmetic, where that is exact (:func:`half_stored_fits`); ``auto`` is
            ``stored`` for what quantized artifacts leave dense and ``packed`` for unquantized ones.
        head: ``artifact`` takes the output embedding as it is stored; ``int8`` rounds a dense one to nearest on load, which
            changes the model: nothing on disk says so.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    dense: str = "auto"
    head: str = "artifact"

    def __post_init__(self) -> None:
        for key, value, allowed in (("dense", self.dense, DENSE), ("head", self.head, HEAD)):
            if value not in allowed:
                raise InputError(f"{key}={value!r} is not an option; use {', '.join(allowed)}")


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer as an artifact has it: a dense weight, or int8 codes with what belongs to them.

    Attributes:
        weight: floating or int8 ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.
        scales: of the codes, floating ``[out_features, groups]``; None for a dense weight.
        input_scale: floating, one element, for static activations.
    """

    weight: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None
    input_scale: Tensor | None = None


def load(directory: Path, options: LoadOptions | None = None) -> Model:
    """The model of an artifact, ready to run.

    Raises:
        InputError: the directory holds no model the engine runs, or lacks one of its tensors.
    """
    options = options or LoadOptions()
    config = read_config(directory)
    quantization = read_json(directory / "config.json").get("quantization_config") or {}
    tensors, scheme = _read(directory, quantization)
    return _Assembly(directory, config, options, tensors, scheme).model()


def _read(directory: Path, quantization: dict[str, Any]) -> tuple[dict[str, Tensor], Int8Scheme | None]:
    """All stored tensors by name; GPTQ and AWQ layers' codes turned into weights, int8 codes as they are."""
    method = quantization.get("quant_method")
    if not method:
        return read_shards(directory), None
    if method in ("gptq", "awq"):
        layers, tensors = (exports.gptq if method == "gptq" else exports.awq).read(directory)
        for name, layer in layers.items():
            tensors |= _decoded(name, layer)
        return tensors, None
    if method == "compressed-tensors" and quantization.get("format") == "pack-quantized":
        layers, tensors = exports.compressed_tensors.read(directory)
        for name, layer in layers.items():
            tensors |= _codes(name, layer) if layer.grid.bits == 8 and layer.grid.symmetric else _decoded(name, layer)
        return tensors, Int8Scheme(directory / "config.json", "none")
    if method == "compressed-tensors":
        return read_shards(directory), int8_scheme(directory / "config.json", quantization)
    raise InputError(
        f"{directory}/config.json: quant_method={method!r} is not read by the engine; it reads gptq, awq, compressed-tensors "
        "and unquantized directories"
    )


def _decoded(name: str, layer: QuantizedTensor) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.dequantize()}


def _codes(name: str, layer: QuantizedTensor) -> dict[str, Tensor]:
    return {f"{name}.weight": to_signed(layer.codes), f"{name}.weight_scale": layer.scales}


class _Assembly:
    """One artifact's tensors on their way into layers."""

    def __init__(
        self, directory: Path, config: ModelConfig, options: LoadOptions, tensors: dict[str, Tensor], scheme: Int8Scheme | None
    ) -> None:
        self.directory, self.config, self.options, self.scheme = directory, config, options, scheme
        self.tensors = tensors
        self.dense = options.dense
        if options.dense == "auto":
            self.dense = "packed" if scheme is None else "stored"

    def model(self) -> Model:
        config, options = self.config, self.options
        embedding = self._tensor("model.embed_tokens.weight").to(options.device)
        if embedding.shape != (config.vocab_size, config.hidden_size):
            raise InputError(
                f"{self.directory}: model.embed_tokens.weight is {list(embedding.shape)}, but config.json says vocab_size="
                f"{config.vocab_size}, hidden_size={config.hidden_size}; they must belong together"
            )
        blocks = [self._block(f"model.layers.{index}") for index in range(config.num_layers)]
        norm = self._norm("model.norm")
        return Model(config, options.dtype, embedding, blocks, norm, self._head())

    def _block(self, prefix: str) -> Block:
        attention, feed_forward = f"{prefix}.self_attn", f"{prefix}.mlp"
        return Block(
            input_norm=self._norm(f"{prefix}.input_layernorm"),
            qkv=self._linear(*(f"{attention}.{part}_proj" for part in "qkv")),
            head_norms=self._head_norms(attention) if self.config.qk_norm else None,
            o=self._linear(f"{attention}.o_proj"),
            post_norm=self._norm(f"{prefix}.post_attention_layernorm"),
            gate_up=self._linear(f"{feed_forward}.gate_proj", f"{feed_forward}.up_proj"),
            down=self._linear(f"{feed_forward}.down_proj"),
        )

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise InputError(f"{self.directory} lacks the tensor {name}; make the artifact again")
        return self.tensors[name]

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._tensor(f"{name}.weight").to(self.options.device), self.config.norm_eps)

    def _head_norms(self, attention: str) -> RMSNorm:
        queries = self._tensor(f"{attention}.q_norm.weight").expand(self.config.num_heads, -1)
        keys = self._tensor(f"{attention}.k_norm.weight").expand(self.config.num_kv_heads, -1)
        return RMSNorm(torch.cat((queries, keys)).to(self.options.device), self.config.norm_eps)

    def _stored(self, name: str) -> StoredLinear:
        weight = self._tensor(f"{name}.weight")
        optional = {key: self.tensors.get(f"{name}.{key}") for key in ("bias", "weight_scale", "input_scale")}
        stored = StoredLinear(weight, optional["bias"], optional["weight_scale"], optional["input_scale"])
        if weight.dtype == torch.int8:
            if self.scheme is None or stored.scales is None:
                raise InputError(f"{self.directory}: {name}.weight is int8, but nothing says on which scale; make it again")
            self.scheme.check(name, weight, stored.scales, stored.input_scale)
        return stored

    def _linear(self, *names: str) -> Linear:
        """One layer of all ``names``, which share their input: one matrix where they are of one kind."""
        return join([self._stored(name) for name in names], self._layer)

    def _layer(self, stored: StoredLinear) -> Linear:
        options = self.options
        weight = stored.weight.to(options.device)
        bias = None if stored.bias is None else stored.bias.to(options.device, options.dtype)
        if stored.scales is None:
            if self.dense == "stored" and half_stored_fits(weight, options.dtype):
                return HalfStoredLinear(weight, bias)
            if self.dense != "plain" and packed_fits(weight, options.dtype):
                return PackedLinear(weight, bias)
            return DenseLinear(weight.to(options.dtype), bias)
        scales = stored.scales.to(options.device)
        if self.scheme is not None and self.scheme.activations == "none":
            return Int8WeightOnlyLinear(weight, scales, bias)
        input_scale = None if stored.input_scale is None else stored.input_scale.to(options.device)
        return Int8Linear(weight, scales, bias, input_scale)

    def _head(self) -> Linear:
        tied = self.config.tied_head and "lm_head.weight" not in self.tensors
        stored = StoredLinear(self._tensor("model.embed_tokens.weight")) if tied else self._stored("lm_head")
        if self.options.head == "int8" and stored.scales is None:
            codes, scales = quantize_rows(stored.weight.to(self.options.device))
            return Int8Linear(codes, scales)
        return self._layer(stored)


def join(parts: list[StoredLinear], build: Callable[[StoredLinear], Linear]) -> Linear:
    """One layer whose output is that of ``parts``, in order, side by side.

    Parts of one kind become one matrix; dense ones beside quantized ones, or static ones of different input scales, stay apart.
    """
    first = parts[0]
    alike = all(
        _same_shape(part.scales, first.scales, 1)
        and (part.bias is None) == (first.bias is None)
        and _equal(part.input_scale, first.input_scale)
        for part in parts
    )
    if len(parts) == 1:
        return build(first)
    if not alike:
        return SideBySide([build(part) for part in parts])
    return build(
        StoredLinear(
            torch.cat([part.weight for part in parts]),
            None if first.bias is None else torch.cat([part.bias for part in parts if part.bias is not None]),
            None if first.scales is None else torch.cat([part.scales for part in parts if part.scales is not None]),
            first.input_scale,
        )
    )


def _same_shape(one: Tensor | None, other: Tensor | None, axis: int) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape[axis] == other.shape[axis]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return bool(torch.equal(one.view(-1), other.view(-1)))
