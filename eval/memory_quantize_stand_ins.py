"""What a quantization is given when nothing is there but a model's config: a checkpoint, files and hidden states on paper."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.memory_geometry import skeleton
from eval.memory_quantize_trace import HIDDEN, Ledger
from quantize.block_files import BlockFiles, HiddenStates
from quantize.checkpoint import Checkpoint
from quantize.errors import InputError
from quantize.grids import QuantizedTensor

_NO_WEIGHTS = "a memory plan reads no weights"


def in_a_file(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor outside the device, of any shape and no size; moving it to the device makes all of it."""
    return torch.empty((), dtype=dtype).expand(*shape)


class PaperCheckpoint(Checkpoint):
    """A checkpoint that has a config and the names, shapes and types of its tensors.

    Attributes:
        mapped_bytes: the most that was read between two releases: pages of the checkpoint's files that are mapped at once.
    """

    def __init__(self, path: Path, config: Any, dtype: torch.dtype) -> None:
        """Describe the checkpoint of a model.

        Args:
            path: where the config is from, for messages.
            config: transformers' config.
            dtype: the type all tensors are stored in.

        Raises:
            InputError: no causal language model, or one of experts, whose inputs depend on the numbers.
        """
        self.path, self._dtype = path, dtype
        self.config = copy.deepcopy(config)
        self.config.pad_token_id = None  # a model that knows its padding looks for it among tokens; there are none
        self._shapes = {name: tuple(parameter.shape) for name, parameter in skeleton(config, dtype).named_parameters()}
        if any(len(shape) == 3 and name.endswith((".gate_up_proj", ".down_proj")) for name, shape in self._shapes.items()):
            raise InputError(
                f"model.path={path}: model_type={config.model_type} has experts, and which tokens reach one depends on the "
                "weights; the memory plan of a quantization is for dense models"
            )
        self.mapped_bytes = 0
        self._read: set[str] = set()

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def tensor(self, name: str) -> Tensor:
        self._read.add(name)
        elements = sum(torch.Size(self._shapes[read]).numel() for read in self._read)
        self.mapped_bytes = max(self.mapped_bytes, elements * self._dtype.itemsize)
        return in_a_file(self._shapes[name], self._dtype)

    def weight_files(self) -> list[Path]:
        return []

    def tokenizer(self) -> PreTrainedTokenizerBase:
        raise NotImplementedError(_NO_WEIGHTS)

    def copy_side_files(self, destination: Path) -> None:
        raise NotImplementedError(_NO_WEIGHTS)

    def release(self) -> None:
        self._read.clear()


class PaperFiles(BlockFiles):
    """The folder of a quantization in progress: only sizes of what would be written are noted.

    Attributes:
        largest: bytes of the largest block's file.
    """

    largest = 0

    def write(self, index: int, layers: Mapping[str, QuantizedTensor], dense: Mapping[str, Tensor] | None = None) -> None:
        """Note the block's size: what is written was on the device, and is in a file afterwards."""
        parts = [getattr(layer, part) for layer in layers.values() for part in ("codes", "scales", "zeros", "g_idx")]
        size = sum(tensor.numel() * tensor.itemsize for tensor in [*parts, *(dense or {}).values()])
        self.largest = max(self.largest, size)


def paper_hidden_states(ledger: Ledger) -> type[PaperHiddenStates]:
    """Hidden states whose files are a note of their shapes; the class is this ledger's own."""
    return type("PaperHiddenStates", (PaperHiddenStates,), {"ledger": ledger, "shapes": {}})


class PaperHiddenStates(HiddenStates):
    """The hidden states between two blocks, of which only the shapes are kept where others have files."""

    ledger: Ledger
    shapes: dict[int, tuple[tuple[int, ...], torch.dtype]]

    def store(self, directory: Path, batch: int, hidden: Tensor) -> None:
        if self._in_memory:
            self.ledger.rename(hidden, HIDDEN)
        super().store(directory, batch, hidden)

    @classmethod
    def read(cls, directory: Path, batch: int) -> Tensor:
        return in_a_file(*cls.shapes[batch])

    @classmethod
    def read_windows(cls, directory: Path, windows: Sequence[int], per_batch: int) -> Tensor:
        shape, dtype = cls.shapes[0]
        return in_a_file((len(windows), *shape[1:]), dtype)

    @classmethod
    def write(cls, directory: Path, batch: int, hidden: Tensor) -> None:
        cls.shapes[batch] = (tuple(hidden.shape), hidden.dtype)

    @classmethod
    def batch_bytes(cls) -> list[int]:
        """Bytes of each batch's file."""
        return [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in cls.shapes.values()]
