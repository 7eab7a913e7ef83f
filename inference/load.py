"""From an artifact to a :class:`~inference.model.Model`: which stored tensors (:mod:`inference.read`) make which layer.

Codes of grids without a product of their own are dequantized once, here or on reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.config import ModelConfig, read_config
from inference.int4 import Int4Linear, join_codes
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
from inference.native import linear as native
from inference.norm import RMSNorm
from inference.read import StoredModel, read_model
from quantize.errors import InputError

DENSE = ("auto", "packed", "plain", "stored")
WEIGHTS = ("artifact", "int4", "int8")
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
        weights: ``artifact`` computes with the numbers the artifact stands for; 4-bit codes are dequantized on load. ``int4``
            keeps them four bits wide and multiplies in bfloat16 (:class:`~inference.int4.Int4Linear`; CPU only; layers it
            cannot hold are dequantized). ``int8`` rounds dense and dequantized layers, not the output embedding, to int8 with
            dynamic activations on load, which changes the model.
        head: ``artifact`` takes the output embedding as it is stored; ``int8`` rounds a dense one to nearest on load, which
            changes the model: nothing on disk says so.
        rope: replaces entries of the config's ``rope_parameters``, such as ``{"rope_type": "yarn", "factor": 4.0}``.
        max_tokens: the longest context, which may be beyond what the model was trained on; the config's by default.
        native: hold layers for :class:`inference.native.step.NativeEngine` (float32 on the CPU only).
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    dense: str = "auto"
    weights: str = "artifact"
    head: str = "artifact"
    rope: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    native: bool = False

    def __post_init__(self) -> None:
        for key, allowed in (("dense", DENSE), ("weights", WEIGHTS), ("head", HEAD)):
            value = getattr(self, key)
            if value not in allowed:
                raise InputError(f"{key}={value!r} is not an option; use {', '.join(allowed)}")
        if self.native and (self.dtype != torch.float32 or self.device.type != "cpu"):
            raise InputError(
                f"native=true computes in float32 on the CPU, not in {self.dtype} on {self.device}; use native=false"
            )


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
    keep_int4 = options.weights == "int4" and options.device.type == "cpu"
    config = changed(read_config(directory), options)  # before any weight is read
    return _Assembly(directory, config, options, read_model(directory, keep_int4)).model()


def changed(config: ModelConfig, options: LoadOptions) -> ModelConfig:
    """``config`` with the rotary scaling and the context that ``options`` ask for.

    Raises:
        InputError: a context of less than one token.
    """
    if options.max_tokens is not None and options.max_tokens < 1:
        raise InputError(f"max_tokens={options.max_tokens} is no context; use 1 or more, such as {config.max_tokens}")
    return replace(config, rope={**config.rope, **(options.rope or {})}, max_tokens=options.max_tokens or config.max_tokens)


class _Assembly:
    """One artifact's tensors on their way into layers."""

    def __init__(self, directory: Path, config: ModelConfig, options: LoadOptions, stored: StoredModel) -> None:
        self.directory, self.config, self.options = directory, config, options
        self.tensors, self.scheme, self.int4 = stored.tensors, stored.scheme, stored.int4
        self.dense = options.dense
        if options.dense == "auto":
            codes_stay = bool(stored.int4) or stored.scheme is not None or options.weights == "int8"
            self.dense = "stored" if codes_stay else "packed"

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
        codes = self.int4.get(name)  # beside a layer that is none of them
        weight = self._tensor(f"{name}.weight") if codes is None else codes.dequantize()
        optional = {key: self.tensors.get(f"{name}.{key}") for key in ("bias", "weight_scale", "input_scale")}
        stored = StoredLinear(weight, optional["bias"], optional["weight_scale"], optional["input_scale"])
        if weight.dtype == torch.int8:
            if self.scheme is None or stored.scales is None:
                raise InputError(f"{self.directory}: {name}.weight is int8, but nothing says on which scale; make it again")
            self.scheme.check(name, weight, stored.scales, stored.input_scale)
        return stored

    def _linear(self, *names: str) -> Linear:
        """One layer of all ``names``, which share their input: one matrix where they are of one kind."""
        if all(name in self.int4 for name in names):
            codes = join_codes([self.int4[name] for name in names])
            make = native.int4 if self.options.native else Int4Linear
            if codes is not None:
                return make(codes, self._biases(names))
            return SideBySide([make(self.int4[name], self._biases([name])) for name in names])
        return join([self._stored(name) for name in names], self._layer)

    def _biases(self, names: Sequence[str]) -> Tensor | None:
        biases = [self.tensors[f"{name}.bias"] for name in names if f"{name}.bias" in self.tensors]
        return torch.cat(biases).to(self.options.device, self.options.dtype) if biases else None

    def _layer(self, stored: StoredLinear, head: bool = False) -> Linear:
        options = self.options
        weight = stored.weight.to(options.device)
        bias = None if stored.bias is None else stored.bias.to(options.device, options.dtype)
        dynamic, weight_only = (native.int8, native.int8_weight_only) if options.native else (Int8Linear, Int8WeightOnlyLinear)
        if stored.scales is None and options.weights == "int8" and not head:
            return dynamic(*quantize_rows(weight), bias)
        if stored.scales is None:
            half = self.dense == "stored" and half_stored_fits(weight, options.dtype)
            if options.native:
                return native.dense(weight, bias, half)
            if half:
                return HalfStoredLinear(weight, bias)
            if self.dense != "plain" and packed_fits(weight, options.dtype):
                return PackedLinear(weight, bias)
            return DenseLinear(weight.to(options.dtype), bias)
        scales = stored.scales.to(options.device)
        if self.scheme is not None and self.scheme.activations == "none":
            return weight_only(weight, scales, bias)
        input_scale = None if stored.input_scale is None else stored.input_scale.to(options.device)
        return dynamic(weight, scales, bias, input_scale)

    def _head(self) -> Linear:
        tied = self.config.tied_head and "lm_head.weight" not in self.tensors
        stored = StoredLinear(self._tensor("model.embed_tokens.weight")) if tied else self._stored("lm_head")
        if self.options.head == "int8" and stored.scales is None:
            codes, scales = quantize_rows(stored.weight.to(self.options.device))
            return native.int8(codes, scales, None) if self.options.native else Int8Linear(codes, scales)
        return self._layer(stored, head=True)


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
