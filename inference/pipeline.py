"""Pipeline parallelism (GPipe, Huang et al. 2019, arXiv:1811.06965): every rank has some blocks, and passes hidden states on.

One token goes through the ranks one after the other, so a single sequence gains nothing but room. Several sequences are split
into micro-batches: while a rank works on one, the one before it works on the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from inference.config import ModelConfig, read_config
from inference.context import Context
from inference.linear import Linear
from inference.link import Link
from inference.load import LoadOptions, _Assembly, changed
from inference.model import Model
from inference.norm import RMSNorm
from inference.read import StoredModel, read_model
from inference.shards import deal
from quantize.errors import InputError


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences of a forward: packed tokens, this rank's context for them, and the rows whose logits are wanted."""

    tokens: Tensor
    context: Context
    rows: Tensor | None = None


class _Nothing:
    """The head of a rank that has none."""

    out_features = 0

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("only the last rank has a head")

    def nbytes(self) -> int:
        return 0


class _StageAssembly(_Assembly):
    first: bool
    last: bool

    def model(self) -> Model:
        config, options = self.config, self.options
        embedding = torch.empty(0, config.hidden_size, device=options.device)
        if self.first:
            embedding = self._tensor("model.embed_tokens.weight").to(options.device)
        blocks = [self._block(f"model.layers.{index}") for index in range(config.num_layers)]
        norm = self._norm("model.norm") if self.last else RMSNorm(torch.ones(0), 1.0)
        head: Linear = self._head() if self.last else _Nothing()
        return Model(config, options.dtype, embedding, blocks, norm, head)


class Stage:
    """One rank's blocks.

    Attributes:
        model: they; the first rank's has the embedding, the last one's norm and head. Caches made from its ``config`` hold this
            rank's layers.
    """

    def __init__(self, model: Model, link: Link) -> None:
        self.model, self._link = model, link

    def forward(self, batches: Sequence[MicroBatch]) -> list[Tensor] | None:
        """Called by all ranks with the same micro-batches, each in a context of its own; logits on the last rank."""
        link = self._link
        last = link.rank == link.ranks - 1
        found: list[Tensor] = []
        # Kept until they have been sent: the next micro-batch is computed meanwhile.
        under_way = []
        for batch in batches:
            if link.rank == 0:
                hidden = self.model.embed(batch.tokens)
            else:
                empty = torch.empty(len(batch.tokens), self.model.config.hidden_size, dtype=self.model.dtype)
                hidden = link.receive(empty.to(self.model.device), link.rank - 1)
            hidden = self.model.run_blocks(hidden, batch.context)
            if last:
                found.append(self.model.logits(hidden, batch.rows))
            else:
                under_way.append((link.send(hidden.contiguous(), link.rank + 1), hidden))
        for work, _ in under_way:
            work.wait()
        return found if last else None

    def share(self, tokens: Tensor) -> Tensor:
        """The last rank's ``tokens`` on all ranks, for the next step; int64, one shape on all ranks."""
        return self._link.broadcast(tokens, self._link.ranks - 1)


def load_stage(directory: Path, link: Link, options: LoadOptions | None = None) -> Stage:
    """One rank's blocks, dealt out evenly.

    Raises:
        InputError: as :func:`inference.load.load`, or more ranks than blocks.
    """
    options = options or LoadOptions()
    whole = changed(read_config(directory), options)
    if link.ranks > whole.num_layers:
        raise InputError(f"ranks={link.ranks} cannot share {whole.num_layers} blocks; use 1 to {whole.num_layers}")
    mine = deal(whole.num_layers, link.ranks)[link.rank]
    stored = read_model(directory, options.weights == "int4" and options.device.type == "cpu")
    config = replace(whole, num_layers=mine.stop - mine.start)
    assembly = _StageAssembly(directory, config, options, renumbered(stored, mine))
    assembly.first, assembly.last = link.rank == 0, link.rank == link.ranks - 1
    return Stage(assembly.model(), link)


def renumbered(stored: StoredModel, mine: slice) -> StoredModel:
    """Only the blocks ``mine``, counted from 0; what belongs to no block stays."""

    def place(name: str) -> str | None:
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            return name
        index = int(parts[2])
        return ".".join([*parts[:2], str(index - mine.start), *parts[3:]]) if mine.start <= index < mine.stop else None

    tensors = {new: tensor for name, tensor in stored.tensors.items() if (new := place(name))}
    int4 = {new: codes for name, codes in stored.int4.items() if (new := place(name))}
    return replace(stored, tensors=tensors, int4=int4)


def bytes_per_token(config: ModelConfig, dtype: torch.dtype = torch.float32) -> int:
    """What every rank but the last sends for one token: its hidden state."""
    return config.hidden_size * torch.empty(0, dtype=dtype).element_size()
