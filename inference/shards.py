"""Which part of every stored tensor is whose: the cuts of tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053).

Rows of q, k, v, gate and up go to the rank that computes those heads and channels, columns of o and down to the rank that has
their inputs, rows of the output embedding are dealt out too. Codes are cut where weights would be, with their scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inference.config import ModelConfig
from inference.int4 import GROUP_SIZES, Int4Codes, fitted
from inference.read import StoredModel
from quantize.errors import InputError

# Channels of the feed-forward part stay together in this many, so that groups of scales are cut as little as possible.
_UNITS = (64, 32, 16)


@dataclass(frozen=True)
class Part:
    """What one rank computes.

    Attributes:
        queries: its query heads.
        keys: its key/value heads, in the order of its query heads; one several times where the query heads of a rank do not
            share theirs equally.
        channels: of the feed-forward part.
        words: of the vocabulary, in the head.
    """

    queries: list[int]
    keys: list[int]
    channels: slice
    words: slice

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The shape of this rank's decoder."""
        channels = self.channels.stop - self.channels.start
        return replace(whole, num_heads=len(self.queries), num_kv_heads=len(self.keys), intermediate_size=channels)


def deal(total: int, ranks: int, unit: int = 1) -> list[slice]:
    """``total`` things in ``ranks`` runs that differ by at most ``unit``, which divides it; the first ranks get more."""
    units = total // unit
    sizes = [unit * (units // ranks + (rank < units % ranks)) for rank in range(ranks)]
    starts = [sum(sizes[:rank]) for rank in range(ranks)]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def part_of(config: ModelConfig, rank: int, ranks: int) -> Part:
    """What ``rank`` of ``ranks`` computes.

    Whole groups of query heads with their key head, where there are as many key heads as ranks; else query heads, and ranks
    that share a key head each have it.

    Raises:
        InputError: more ranks than query heads.
    """
    if not 1 <= ranks <= config.num_heads:
        raise InputError(f"ranks={ranks} cannot share {config.num_heads} query heads; use 1 to {config.num_heads}")
    group = config.num_heads // config.num_kv_heads
    if config.num_kv_heads >= ranks:
        whole = deal(config.num_kv_heads, ranks)[rank]
        keys = list(range(whole.start, whole.stop))
        queries = list(range(whole.start * group, whole.stop * group))
    else:
        dealt = deal(config.num_heads, ranks)[rank]
        queries = list(range(dealt.start, dealt.stop))
        owners = [query // group for query in queries]
        keys = sorted(set(owners))
        if len({owners.count(key) for key in keys}) > 1:  # attention wants equal groups: here groups of one
            keys = owners
    channels = config.intermediate_size
    unit = next((unit for unit in _UNITS if channels % unit == 0 and channels // unit >= ranks), 1)
    return Part(queries, keys, deal(channels, ranks, unit)[rank], deal(config.vocab_size, ranks)[rank])


def shard(stored: StoredModel, config: ModelConfig, part: Part, first: bool) -> StoredModel:
    """One rank's tensors; ``first`` tells whether it is the rank that adds the biases of layers whose outputs are summed."""
    if config.tied_head and "lm_head.weight" not in stored.tensors:
        stored.tensors["lm_head.weight"] = stored.tensors["model.embed_tokens.weight"]
    tensors = dict(stored.tensors)
    int4 = dict(stored.int4)
    for name in {key.rpartition(".")[0] for key in tensors} | set(int4):
        rows = _rows(name, config, part)
        columns = _columns(name, config, part)
        if name in int4:
            cut = cut_codes(int4.pop(name), rows, columns)
            if isinstance(cut, Int4Codes):
                int4[name] = cut
            else:
                tensors[f"{name}.weight"] = cut
        for key in ("weight", "weight_scale", "bias"):
            if (full := f"{name}.{key}") in stored.tensors:
                tensors[full] = _cut(stored.tensors[full], key, stored.tensors.get(f"{name}.weight"), rows, columns)
        if columns is not None and not first:
            tensors.pop(f"{name}.bias", None)
    return replace(stored, tensors=tensors, int4=int4)


def _rows(name: str, config: ModelConfig, part: Part) -> Tensor | None:
    """Outputs of a layer that are this rank's; None for all."""
    if name.endswith("self_attn.q_proj"):
        return _heads(part.queries, config.head_dim)
    if name.endswith(("self_attn.k_proj", "self_attn.v_proj")):
        return _heads(part.keys, config.head_dim)
    if name.endswith(("mlp.gate_proj", "mlp.up_proj")):
        return torch.arange(part.channels.start, part.channels.stop)
    if name == "lm_head":
        return torch.arange(part.words.start, part.words.stop)
    return None


def _columns(name: str, config: ModelConfig, part: Part) -> slice | None:
    """Inputs of a layer that are this rank's; None for all."""
    if name.endswith("self_attn.o_proj"):
        return slice(part.queries[0] * config.head_dim, (part.queries[-1] + 1) * config.head_dim)
    if name.endswith("mlp.down_proj"):
        return part.channels
    return None


def _heads(heads: list[int], head_dim: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _cut(tensor: Tensor, key: str, weight: Tensor | None, rows: Tensor | None, columns: slice | None) -> Tensor:
    if rows is not None:
        return tensor[rows]
    if columns is None or key == "bias":
        return tensor
    if key == "weight":
        return tensor[:, columns]
    assert weight is not None
    groups = tensor.shape[1]
    if groups == 1:
        return tensor
    size = weight.shape[1] // groups
    if columns.start % size or columns.stop % size:
        raise InputError(
            f"weight_scale: columns {columns.start} to {columns.stop} of a rank cut groups of {size}; use fewer ranks, or an "
            "artifact with one scale a row"
        )
    return tensor[:, columns.start // size : columns.stop // size]


def cut_codes(codes: Int4Codes, rows: Tensor | None, columns: slice | None) -> Int4Codes | Tensor:
    """A part of a 4-bit matrix; as a float32 weight where the kernel does not take what is left."""
    cut = codes
    if rows is not None:
        cut = Int4Codes(codes.codes[rows], codes.scales[rows], codes.minima[rows], codes.order)
    if columns is not None:
        size = codes.group_size
        # A cut through a group makes it several small ones with the same scale.
        small = next(
            (unit for unit in reversed(GROUP_SIZES) if size % unit == 0 and columns.start % unit == columns.stop % unit == 0), 0
        )
        if codes.order is not None or not small:  # shuffled columns: a group's inputs are on several ranks
            return codes.dequantize()[:, columns]
        scales, minima = (part.repeat_interleave(size // small, 1) for part in (codes.scales, codes.minima))
        groups = slice(columns.start // small, columns.stop // small)
        cut = Int4Codes(codes.codes[:, columns], scales[:, groups], minima[:, groups])
    return cut if fitted(cut) is not None else cut.dequantize()
