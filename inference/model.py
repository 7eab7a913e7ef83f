"""The decoder of Llama and its kin (Touvron et al. 2023, arXiv:2302.13971): RMSNorm, rotary attention, SwiGLU.

There is no batch dimension: tokens of all sequences are rows of one matrix, and only attention, which is the context's
(:mod:`inference.context`), tells sequences apart. Weights that share an input are one matrix (``qkv``, ``gate_up``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from inference.config import ModelConfig
from inference.context import Context
from inference.linear import Linear, tensor_bytes
from inference.native.linear import NativeLinear
from inference.norm import RMSNorm
from inference.rope import Rope, rotate


@dataclass
class Block:
    """One decoder block's weights.

    Attributes:
        input_norm, post_norm: before attention and before the feed-forward part.
        qkv: queries, keys and values of all heads, in this order.
        head_norms: over each head of queries and keys, ``[num_heads + num_kv_heads, head_dim]`` (qwen3), or None.
        o: back to ``hidden_size``.
        gate_up: both halves of the SwiGLU.
        down: back to ``hidden_size``.
    """

    input_norm: RMSNorm
    qkv: Linear
    head_norms: RMSNorm | None
    o: Linear
    post_norm: RMSNorm
    gate_up: Linear
    down: Linear


class Model:
    """A decoder's weights, and its forward.

    Attributes:
        config: its shape.
        dtype: the compute type: norms' inputs, residual stream, activations between layers.
        embedding: ``[vocab_size, hidden_size]`` in the type it is stored in; rows are widened as they are looked up.
        head: the output embedding.
        rope: the rotary embedding.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, embedding: Tensor, blocks: list[Block], norm: RMSNorm, head: Linear
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.embedding = embedding
        self.blocks = blocks
        self.norm = norm
        self.head = head
        self.rope = Rope(config.rope, config.head_dim, config.max_tokens, dtype, embedding.device)

    @property
    def native(self) -> bool:
        """Whether it was loaded with ``native=True``: layers in C++."""
        return isinstance(self.head, NativeLinear)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def forward(self, tokens: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        """Run the new tokens of ``context``'s sequences and add them to it.

        Args:
            tokens: int64 ``[total]``, packed sequence after sequence as ``context.counts`` says, at least one.
            context: positions, keys and values; used up by the call.
            rows: int64 ``[n]``, the packed tokens whose logits are wanted, all by default
                (:func:`~inference.context.last_rows`).

        Returns:
            Logits in the compute type, ``[n, vocab_size]`` or ``[total, vocab_size]``.
        """
        return self.logits(self.run_blocks(self.embed(tokens), context), rows)

    def embed(self, tokens: Tensor) -> Tensor:
        """The first part of :meth:`forward`: ``[total, hidden_size]`` in the compute type."""
        return functional.embedding(tokens, self.embedding).to(self.dtype)

    def run_blocks(self, hidden: Tensor, context: Context) -> Tensor:
        """The second part: hidden states through all blocks, ``[total, hidden_size]`` each; uses ``context`` up."""
        cosine, sine = self.rope.rows(context.positions, context.counts)
        for index, block in enumerate(self.blocks):
            hidden = hidden + self._attention(block, index, block.input_norm(hidden), cosine, sine, context)
            hidden = hidden + self._feed_forward(block, block.post_norm(hidden))
        context.advance()
        return hidden

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """The last part: logits of the ``rows`` of ``hidden``, or of all."""
        return self.head(self.norm(hidden if rows is None else hidden[rows]))

    def _attention(self, block: Block, layer: int, x: Tensor, cosine: Tensor, sine: Tensor, context: Context) -> Tensor:
        config = self.config
        rotated = config.num_heads + config.num_kv_heads  # queries and keys are turned, values are not
        heads = block.qkv(x).view(len(x), -1, config.head_dim)
        queries_keys = heads[:, :rotated]
        if block.head_norms is not None:
            queries_keys = block.head_norms(queries_keys)
        queries_keys = rotate(queries_keys, cosine, sine)
        context.append(layer, queries_keys[:, config.num_heads :], heads[:, rotated:])
        return block.o(context.attend(layer, queries_keys[:, : config.num_heads]))

    def _feed_forward(self, block: Block, x: Tensor) -> Tensor:
        gate, up = block.gate_up(x).chunk(2, -1)
        return block.down(functional.silu(gate).mul_(up))

    def nbytes(self) -> int:
        """Bytes of all weights as they are held, which may be wider than on disk."""
        total = tensor_bytes(self.embedding) + self.norm.nbytes() + self.head.nbytes()
        for block in self.blocks:
            parts = (block.input_norm, block.qkv, block.head_norms, block.o, block.post_norm, block.gate_up, block.down)
            total += sum(part.nbytes() for part in parts if part is not None)
        return total
