"""What a model is made of, from its config alone: parameters, linear layers, embeddings, KV cache.

The model is built on the meta device by transformers itself, so tied embeddings, grouped queries, experts, an overridden
``head_dim`` and the like need no rules of their own here. Nothing is loaded and nothing is allocated.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from eval.memory_trace import Trace, trace_prefill
from quantize.blocks import BLOCK_PATHS, find_block_path, linear_layers, linear_shape
from quantize.errors import InputError, one_line
from quantize.experts import is_router
from quantize.files import read_json


@dataclass(frozen=True)
class CacheLayer:
    """One block's KV cache: elements of keys and values a token, and the tokens it looks back on (None: all)."""

    elements_per_token: int
    window: int | None

    def tokens(self, context: int, chunk: int | None = None) -> int:
        """Tokens whose keys and values are stored after ``context`` of them.

        A layer with a sliding window keeps ``window - 1`` (the newest token sees itself and that many before it). While a
        prefill of ``chunk`` tokens at once runs, transformers' cache holds that chunk as well.
        """
        if self.window is None:
            return context
        return min(context, self.window - 1 + (chunk or 0))


@dataclass(frozen=True)
class Geometry:
    """A model's tensors, by what they are. Counts are of elements, tied matrices once.

    Attributes:
        config: the model's configuration, without any quantization entry.
        layers: ``(out_features, in_features)`` of each matrix that this project quantizes, and how many there are: the
            linear layers inside the decoder blocks but routers, each expert's matrices on their own.
        layer_names: names of these linear layers; experts that transformers keeps fused are not among them.
        input_embedding: elements of the token embedding.
        output_embedding: elements of ``lm_head``; 0 where it is tied.
        embedding_names: the modules that hold them.
        rest: all other parameters: norms, biases, routers, learned positions.
        buffer_bytes: constant tables such as rotary frequencies.
        cache: the KV cache, block by block.
        max_tokens: the longest context the model was made for; None where the config does not say.
    """

    config: Any
    layers: Mapping[tuple[int, int], int]
    layer_names: frozenset[str]
    input_embedding: int
    output_embedding: int
    embedding_names: tuple[str, ...]
    rest: int
    buffer_bytes: int
    cache: tuple[CacheLayer, ...]
    max_tokens: int | None

    @property
    def quantized(self) -> int:
        """Elements of the matrices in ``layers``."""
        return sum(rows * columns * count for (rows, columns), count in self.layers.items())

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.quantized + self.input_embedding + self.output_embedding + self.rest


def load_config(model: str) -> Any:
    """The transformers config of a directory (``config.json`` is enough), a ``.gguf`` file or a hub id.

    Raises:
        InputError: there is none, or transformers does not know the family.
    """
    path = Path(model).expanduser()
    options: dict[str, Any] = {"trust_remote_code": False}
    source: str | Path = model
    if path.suffix == ".gguf" and path.is_file():
        source, options["gguf_file"] = path.parent, path.name
    elif path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"model={model} has no config.json; give a Hugging Face model directory, a .gguf file or a hub id")
        if not isinstance(raw := read_json(path / "config.json"), dict) or "model_type" not in raw:
            raise InputError(f"model={model}: config.json has no model_type; it is not a transformers model")
        source = path
    elif path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise InputError(
            f"model={model} is no model; give a directory with config.json, a .gguf file or a hub id like owner/name"
        )
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # config classes check their values by whatever their arithmetic raises
        raise InputError(
            f"model={model}: no usable config ({one_line(error)}); give a directory with config.json, a .gguf file or a hub id"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, parameters in ``dtype``.

    Raises:
        InputError: the config is of no causal language model.
    """
    try:
        with torch.device("meta"):
            # A copy, because the model writes its type into its config.
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    except Exception as error:  # impossible sizes show as whatever the model's own arithmetic raises
        raise InputError(f"no causal language model can be built from the config ({one_line(error)})") from error
    # A model that knows its padding looks for it among the tokens, to warn; there are none to look at.
    model.config.pad_token_id = None
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def geometry(config: Any) -> Geometry:
    """Measure a model's skeleton.

    Raises:
        InputError: no causal language model, no decoder blocks, or no KV cache.
    """
    model = skeleton(config, torch.float16)
    path = block_path(model, config)
    layers, names = _matrices(model, path)
    first = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    outer = (model.get_input_embeddings(), head)  # type: ignore[operator]
    output = 0 if head is None or head.weight is first else head.weight.numel()
    quantized = sum(rows * columns * count for (rows, columns), count in layers.items())
    total = sum(parameter.numel() for parameter in model.parameters())
    return Geometry(
        config=config,
        layers=dict(layers),
        layer_names=frozenset(names),
        input_embedding=first.numel(),
        output_embedding=output,
        embedding_names=tuple(name for name, module in model.named_modules() if any(module is one for one in outer)),
        rest=total - quantized - first.numel() - output,
        buffer_bytes=sum(buffer.untyped_storage().nbytes() for buffer in model.buffers()),
        cache=_cache_layers(model, config, path),
        max_tokens=getattr(config.get_text_config(), "max_position_embeddings", None),
    )


def block_path(model: nn.Module, config: Any) -> str:
    """Where the model keeps its decoder blocks, as the block walk finds them."""
    return BLOCK_PATHS.get(config.model_type) or find_block_path(model)


def first_blocks(model: nn.Module, config: Any, path: str) -> list[int]:
    """Cut the model down to the first blocks that show what all need; returns the kind of every block there was.

    Blocks of a kind have the same parameters and the same type of attention, so they need the same activations and cache.
    The very first block does not count: in later ones the embeddings and the block's own input are alive as well.
    """
    blocks = model.get_submodule(path)
    types = getattr(config.get_text_config(), "layer_types", None) or [None] * len(blocks)  # type: ignore[arg-type]
    signatures = [
        (kind, type(block).__name__, tuple((name, tuple(value.shape)) for name, value in block.named_parameters()))
        for kind, block in zip(types, blocks, strict=False)  # type: ignore[call-overload]
    ]
    kinds = {signature: number for number, signature in enumerate(dict.fromkeys(signatures))}
    later = signatures[1:]
    needed = 2 + max((later.index(signature) for signature in kinds if signature in later), default=0)
    model.set_submodule(path, nn.ModuleList(list(blocks)[:needed]))  # type: ignore[call-overload]
    return [kinds[signature] for signature in signatures]


def _matrices(model: nn.Module, path: str) -> tuple[Counter[tuple[int, int]], list[str]]:
    """Shapes of the matrices inside the blocks that are quantized, and the names of those that are linear layers."""
    blocks = model.get_submodule(path)
    found = {f"{path}.{name}": module for name, module in linear_layers(blocks).items() if not is_router(name)}
    shapes = Counter(linear_shape(module) for module in found.values())
    for name, parameter in blocks.named_parameters():
        if parameter.dim() == 3 and name.endswith((".gate_up_proj", ".down_proj")):  # all experts of a layer in one
            experts, rows, columns = parameter.shape
            if getattr(blocks.get_submodule(name.rpartition(".")[0]), "is_transposed", False):
                rows, columns = columns, rows
            halves = 2 if name.endswith("gate_up_proj") else 1
            shapes[rows // halves, columns] += experts * halves
    return shapes, list(found)


def _cache_layers(model: nn.Module, config: Any, path: str) -> tuple[CacheLayer, ...]:
    """The cache of every block, from what a forward of two tokens leaves in that of the first block of its kind."""
    kinds = first_blocks(model, config, path)
    cache = trace(model, config, 2, 1).cache
    seen: dict[int, CacheLayer] = {}
    for kind, layer in zip(kinds, cache.layers, strict=False):
        if kind not in seen and getattr(layer, "is_initialized", False):
            elements = (layer.keys.numel() + layer.values.numel()) // layer.keys.shape[-2]
            seen[kind] = CacheLayer(elements, getattr(layer, "sliding_window", None) if layer.is_sliding else None)
    if not seen:
        raise InputError(f"model_type={config.model_type} keeps no KV cache; the memory report is for decoders with attention")
    # Blocks that keep nothing of their own read an earlier block's cache.
    return tuple(seen.get(kind, CacheLayer(0, None)) for kind in kinds)


def trace(model: nn.Module, config: Any, context: int, batch: int, **options: Any) -> Trace:
    """:func:`~eval.memory_trace.trace_prefill` with the cache that transformers would choose.

    Raises:
        InputError: the family's forward does not run without data.
    """
    try:
        return trace_prefill(model, lambda: DynamicCache(config=config), context, batch, **options)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(
            f"model_type={config.model_type}: its forward cannot be followed without data ({one_line(error)}); "
            "this family is not supported by the memory report"
        ) from error
