"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053): every rank has a part of every layer and cache.

A rank's q, k, v, gate and up give it whole heads and channels, so attention and activation need nobody else. Its o and down
see only those, and the outputs of all ranks are summed: twice a block, the only time ranks talk. The vocabulary is dealt out
in the head.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from inference.config import ModelConfig, read_config
from inference.int8_product import int8_product
from inference.linear import Int8Linear, Linear, tensor_bytes
from inference.link import Link
from inference.load import LoadOptions, StoredLinear, _Assembly, changed
from inference.model import Block, Model
from inference.read import read_model
from inference.shards import deal, part_of, shard
from quantize.errors import InputError


class RowParallel:
    """A layer of which every rank has some inputs: outputs are summed over the ranks."""

    def __init__(self, local: Linear, link: Link) -> None:
        """``local`` is this rank's columns, with the bias on one rank only."""
        self.out_features = local.out_features
        self._local, self._link = local, link

    def __call__(self, x: Tensor) -> Tensor:
        return self._link.sum(self._local(x).contiguous())

    def nbytes(self) -> int:
        return self._local.nbytes()


class RowParallelInt8:
    """The same for INT8 with a scale for each token: the scale is that of the whole token, so codes are those of one rank.

    The largest magnitude of all ranks is found first (4 bytes a token), then the integer products are summed: exactly.
    """

    def __init__(self, stored: StoredLinear, link: Link) -> None:
        """``stored`` with int8 codes of this rank's columns and one scale a row."""
        assert stored.scales is not None
        self.out_features = stored.weight.shape[0]
        self._product, self._link = int8_product(stored.weight.contiguous()), link
        self._scales, self._bias = stored.scales.float().view(1, -1), stored.bias

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        # As quantize_rows, with the whole token's magnitude.
        largest = self._link.maximum(wide.abs().amax(-1, keepdim=True))
        scale = largest / 127.5 + torch.finfo(torch.float32).tiny
        codes = wide.div(scale).round_().clamp_max_(127).to(torch.int8)
        out = (self._link.sum(self._product(codes)) * self._scales).mul_(scale).to(x.dtype)
        return out if self._bias is None else out.add_(self._bias)

    def nbytes(self) -> int:
        return self._product.nbytes() + tensor_bytes(self._scales, self._bias)


class VocabularyParallel:
    """The output embedding, of which every rank has some words: logits are gathered."""

    def __init__(self, local: Linear, link: Link, words: int) -> None:
        """``local`` has this rank's of ``words`` words, dealt by :func:`~inference.shards.deal`."""
        self.out_features = words
        self._local, self._link = local, link
        self._sizes = [part.stop - part.start for part in deal(words, link.ranks)]

    def __call__(self, x: Tensor) -> Tensor:
        local = self._local(x)
        found = self._link.gather(functional.pad(local, (0, self._sizes[0] - local.shape[1])))  # the first has the most
        return torch.cat([logits[:, :size] for logits, size in zip(found, self._sizes, strict=True)], -1)

    def nbytes(self) -> int:
        return self._local.nbytes()


class _ParallelAssembly(_Assembly):
    """Layers of one rank's tensors; those whose outputs are summed know the link."""

    link: Link

    def _block(self, prefix: str) -> Block:
        block = super()._block(prefix)
        block.o = self._summed(block.o, f"{prefix}.self_attn.o_proj")
        block.down = self._summed(block.down, f"{prefix}.mlp.down_proj")
        return block

    def _summed(self, local: Linear, name: str) -> Linear:
        if not isinstance(local, Int8Linear):
            return RowParallel(local, self.link)
        stored = self._stored(name)
        if stored.input_scale is not None:
            return RowParallel(local, self.link)
        if stored.scales is None or stored.scales.shape[1] > 1:
            raise InputError(f"{name}: INT8 with dynamic inputs is split only with one scale a row; make it group_size=-1")
        return RowParallelInt8(stored, self.link)


def load_tensor_parallel(directory: Path, link: Link, options: LoadOptions | None = None) -> Model:
    """One rank's part of a model; its ``forward`` is called by all ranks together and gives all of them all logits.

    Caches made from its ``config`` hold this rank's heads.

    Raises:
        InputError: as :func:`inference.load.load`; more ranks than heads, or ``weights=int8``, whose scales are whole rows'.
    """
    options = options or LoadOptions()
    if options.weights == "int8":
        raise InputError("weights=int8 rounds on load, after splitting; split an INT8 artifact (recipe=int8) instead")
    whole = changed(read_config(directory), options)
    stored = read_model(directory, options.weights == "int4" and options.device.type == "cpu")
    part = part_of(whole, link.rank, link.ranks)
    assembly = _ParallelAssembly(directory, part.config(whole), options, shard(stored, whole, part, link.rank == 0))
    assembly.link = link
    model = assembly.model()
    model.head = VocabularyParallel(model.head, link, whole.vocab_size)
    return model


def bytes_per_token(
    config: ModelConfig, ranks: int, int8_layers: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[int, int]:
    """What a rank puts into sums, and into the gathering of logits, for one token whose logits are wanted.

    ``2 layers * hidden_size`` numbers are summed, and 4 bytes for each of ``int8_layers`` layers with dynamic INT8 inputs
    among o and down; ``ceil(vocab_size / ranks)`` are gathered.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    return 2 * config.num_layers * config.hidden_size * size + 4 * int8_layers, -(-config.vocab_size // ranks) * size
