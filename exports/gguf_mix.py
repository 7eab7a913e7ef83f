"""llama.cpp's mixes: which tensor of a model gets which type in a file of a given type.

The rules are those of llama.cpp's ``src/llama-quant.cpp`` (``tensor_allows_quantization``, ``llama_tensor_get_type``,
``tensor_type_fallback``), for the file types made of the tensor types in :mod:`exports.gguf_types`. Left out are the
exceptions for one architecture that keeps some of its projections in 8 bits (``glm5-next``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from exports.gguf_layout import TYPES
from quantize.errors import InputError

# The value of ``general.file_type`` (llama_ftype in llama.cpp's include/llama.h).
FILE_TYPES: dict[str, int] = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
}

# What llama-quantize takes for short.
ALIASES: dict[str, str] = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

# Parts of names of tensors that stay as they are: routers, convolutions, positions, small matrices of some families.
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
_KEPT_RWKV = ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2", "lerp_fused")
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")

# The first that a name contains decides; the two before them are whole names.
_CATEGORIES = {
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_q.weight": "attn_q",
    "attn_output.weight": "attn_output",
    "ffn_up": "ffn_up",
    "ffn_gate": "ffn_gate",
    "ffn_down": "ffn_down",
}

Tensor = tuple[str, tuple[int, ...]]


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether ``llama-quantize`` changes the type of a tensor at all.

    Args:
        name: GGUF name, such as ``blk.0.attn_q.weight``.
        shape: ``[rows, cols]`` or ``[experts, rows, cols]``; leading dimensions of 1 do not count.
    """
    matrix = any(size > 1 for size in shape[:-1])
    kept = any(part in name for part in _KEPT) or any(f"time_mix_{part}.weight" in name for part in _KEPT_RWKV)
    return matrix and name.endswith("weight") and not kept and name not in _KEPT_NAMES


def in_order(names: Sequence[str]) -> list[str]:
    """Names as ``llama-quantize`` goes through them and writes them: by layer (those outside layers first), then by name."""
    return sorted(names, key=lambda name: (_layer(name), name.encode()))


def tensor_types(
    tensors: Sequence[Tensor],
    file_type: str,
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    experts: int = 0,
    architecture: str = "llama",
    pure: bool = False,
    embedding: str | None = None,
    output: str | None = None,
    imatrix: bool = False,
) -> dict[str, str]:
    """The type of every tensor of a model.

    Args:
        tensors: GGUF names and shapes ``[rows, cols]`` (numpy's order), in any order.
        file_type: a name in :data:`FILE_TYPES`.
        layers: decoder layers, ``{architecture}.block_count``.
        heads: attention heads.
        kv_heads: heads of keys and values.
        experts: experts of a layer, 0 for dense models.
        architecture: ``general.architecture``.
        pure: no mix, every matrix in the file type's own tensor type (``--pure``).
        embedding: type of the token embedding (``--token-embedding-type``).
        output: type of the output matrix, and of an embedding that serves as one (``--output-tensor-type``).
        imatrix: there is an importance matrix: Q4_0 and Q5_0 then give the first layers' ``ffn_down`` a minimum.

    Returns:
        Type names by tensor name, in the order of ``tensors``. A tensor that is not quantized is called F32, which is what
        converters store it as; one found in another type keeps that.

    Raises:
        InputError: an unknown file type or tensor type, or a type whose blocks do not divide a tensor's columns.
    """
    if file_type not in FILE_TYPES:
        raise InputError(
            f"there is no GGUF file type {file_type!r} here; known are {', '.join(FILE_TYPES)}, for example Q4_K_M"
        )
    for option, chosen in (("token embedding", embedding), ("output tensor", output)):
        if chosen is not None and chosen not in TYPES:
            raise InputError(f"{option} type {chosen!r} is unknown; known are {', '.join(TYPES)}, for example Q8_0")
    names = [name for name, _ in tensors]
    mix = _Mix(
        file_type=file_type,
        default=file_type.removesuffix("_S").removesuffix("_M"),
        layers=layers,
        experts=experts if experts > 1 else 0,
        falcon=architecture == "falcon",
        seventy=_is_70b(architecture, layers, heads, kv_heads),
        tied="output.weight" not in names,
        values=sum(_category(name) == "attn_v" for name in names),
        embedding=embedding,
        output=output,
        imatrix=imatrix,
    )
    shapes = dict(tensors)
    chosen_types = {name: mix.choose(name, shapes[name], pure) for name in in_order(names)}
    return {name: chosen_types[name] for name in names}


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((category for part, category in _CATEGORIES.items() if part in name), "other")


def _is_70b(architecture: str, layers: int, heads: int, kv_heads: int) -> bool:
    """Whether llama.cpp takes a model for one of 70B parameters, whose small ``attn_v`` gets more bits."""
    if architecture == "llama":
        return layers == 80 and heads != kv_heads
    return layers == {"deci": 80, "olmo": 80, "qwen2": 80, "jais2": 68}.get(architecture)


def _more_bits(layer: int, layers: int) -> bool:
    """The layers that a ``_M`` file spends more bits on: the first and last eighth, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


@dataclass
class _Mix:
    """The rules, and how many tensors of a category have been seen: llama.cpp counts them instead of reading the layer."""

    file_type: str
    default: str
    layers: int
    experts: int
    falcon: bool
    seventy: bool
    tied: bool
    values: int
    embedding: str | None
    output: str | None
    imatrix: bool
    _seen: dict[str, int] = field(default_factory=dict)

    def choose(self, name: str, shape: tuple[int, ...], pure: bool) -> str:
        if not quantizable(name, shape):
            return "F32"
        category = _category(name)
        if self.embedding is not None and category == "embedding":
            return _fitting(name, shape, self.embedding)
        if self.output is not None and category == "output":
            return _fitting(name, shape, self.output)
        if TYPES[self.default].dense:
            return self.default
        return _fallback(self.default if pure else self._mixed(name, shape, category), shape)

    def _mixed(self, name: str, shape: tuple[int, ...], category: str) -> str:
        if category == "output" or (category == "embedding" and self.tied):
            return self._output(shape)
        if category == "attn_v":
            return self._values(self._count(category))
        if category == "attn_k" and self.experts == 8:
            return "Q8_0"
        if category == "ffn_down":
            seen = self._count(category)
            # Experts are not stored layer by layer: their layer is read, not counted.
            return self._down(_layer(name) if self.experts else seen)
        if category == "attn_output" and self.experts == 8 and not self.falcon and self.file_type.startswith("Q4_K"):
            return "Q5_K"
        return self.default

    def _count(self, category: str) -> int:
        seen = self._seen.get(category, 0)
        self._seen[category] = seen + 1
        return seen

    def _output(self, shape: tuple[int, ...]) -> str:
        if self.output is not None:
            return self.output
        if self.falcon or self.default == "Q8_0" or shape[-1] % TYPES[self.default].block_size:
            return "Q8_0"
        return "Q6_K"

    def _values(self, seen: int) -> str:
        chosen = self.default
        if self.file_type in ("Q4_K_M", "Q5_K_M") and _more_bits(seen, self.values):
            chosen = "Q6_K"
        elif self.file_type == "Q4_K_S" and seen < 4:
            chosen = "Q5_K"
        if self.seventy and chosen == "Q4_K":
            chosen = "Q5_K"
        return "Q8_0" if self.experts == 8 else chosen

    def _down(self, layer: int) -> str:
        more, first = _more_bits(layer, self.layers), layer < self.layers // 8
        if self.file_type == "Q4_K_M" and self.falcon:
            return "Q6_K" if layer < self.layers // 16 else "Q5_K" if more else "Q4_K"
        if self.file_type in ("Q4_K_M", "Q5_K_M") and more:
            return "Q6_K"
        if self.file_type == "Q4_K_S" and not self.falcon and first:
            return "Q5_K"
        if self.imatrix and first and self.file_type in ("Q4_0", "Q5_0"):
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[self.file_type]
        return self.default


def _fitting(name: str, shape: tuple[int, ...], kind: str) -> str:
    """``kind``, which the caller asked for by name, so that another one will not do."""
    if shape[-1] % TYPES[kind].block_size:
        raise InputError(
            f"{name} has rows of {shape[-1]} weights, which {kind}'s blocks of {TYPES[kind].block_size} do not fill; "
            f"choose a type with smaller blocks, for example {_FALLBACK.get(kind, 'F16')}"
        )
    return kind


def _fallback(kind: str, shape: tuple[int, ...]) -> str:
    """The type of smaller blocks that stands in for one whose blocks do not fill the rows."""
    if shape[-1] % TYPES[kind].block_size == 0:
        return kind
    kind = _FALLBACK.get(kind, kind)
    return kind if shape[-1] % TYPES[kind].block_size == 0 else "F16"
