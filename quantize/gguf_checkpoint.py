"""GGUF files as checkpoints: dequantized tensor by tensor, under the names transformers gives the parameters.

The name map and the undoing of llama.cpp's row permutations are transformers' own (``modeling_gguf_pytorch_utils``). It reads
configuration and tokenizer with gguf-py, which believes what a file claims; so :class:`GgufReader` has passed the file first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from exports import gguf_types
from quantize.checkpoint import Checkpoint, load_tokenizer
from quantize.errors import InputError, one_line
from quantize.gguf_header import shown
from quantize.gguf_reader import GgufReader, GgufTensorInfo

# Lists as long as these numbers are made before any tensor is looked at. LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of llama.cpp.
_MOST = {"block_count": 512, "expert_count": 1024}
# Weights dequantized at a time: codes and values stay in the second-level cache, which is two to four times as fast.
_SLICE = 1 << 17


class GgufCheckpoint(Checkpoint):
    """A GGUF file. Tensors come out as float32 where most weights are F32, bfloat16 where BF16, float16 otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = GgufReader(path)
        self._check_metadata()
        try:
            self._load_architecture()
        except InputError:
            raise
        except Exception as error:  # transformers reports what it cannot use by whatever its arithmetic raises
            raise InputError(f"{path} is not a readable GGUF model ({shown(one_line(error), 200)}); fetch it again") from error
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        missing = sorted(set(self._parameters) - set(self._tensors) - tied)
        if missing:
            raise InputError(f"{path} lacks {len(missing)} tensors of its architecture, first {missing[0]}")
        for name, info in self._tensors.items():
            if torch.Size(info.shape).numel() != torch.Size(self._parameters[name]).numel():
                raise InputError(
                    f"{path}: tensor {info.name} has shape {list(info.shape)}, but {name} of its architecture has "
                    f"{list(self._parameters[name])}; convert the model again, or give its safetensors"
                )
        self._dtype = self._majority_dtype()

    def _check_metadata(self) -> None:
        """Refuse what gguf-py or transformers would work on without end, and what is only a part of a model."""
        parts = self._reader.field("split.count", 1)
        if not isinstance(parts, int) or parts > 1:
            raise InputError(
                f"{self.path} is one of {shown(repr(parts))} parts of a model; join them with `llama-gguf-split --merge`"
            )
        for key in self._reader.fields:
            most = next((limit for name, limit in _MOST.items() if key.endswith(name)), None)
            if most is None:
                continue
            count = self._reader.field(key)
            if not isinstance(count, int) or not 0 <= count <= most:
                raise InputError(
                    f"{self.path}: {shown(key)} is {shown(repr(count))}; it must be a whole number from 0 to {most}"
                )

    def _load_architecture(self) -> None:
        self.config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        self._processor = TENSOR_PROCESSORS.get(self._reader.architecture, TensorProcessor)(config=self.config.to_dict())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        self._model_class = type(model).__name__
        self._parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        names = get_gguf_hf_weights_map(_Outside(model), self._processor)
        stored = ((names.get(name), info) for name, info in self._reader.tensors.items())
        self._tensors = {name: info for name, info in stored if name in self._parameters}

    def _majority_dtype(self) -> torch.dtype:
        counts: dict[str, int] = {}
        for info in self._tensors.values():
            counts[info.kind] = counts.get(info.kind, 0) + torch.Size(info.shape).numel()
        most = max(counts, key=lambda kind: counts[kind])
        return {"F32": torch.float32, "BF16": torch.bfloat16}.get(most, torch.float16)

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parameters[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def kind(self, name: str) -> str:
        """llama.cpp's name of the type a tensor is stored in, such as ``Q4_0``."""
        return self._tensors[name].kind

    def tensor(self, name: str) -> Tensor:
        return self.tensor_in(name, self._dtype)

    def tensor_in(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor in ``dtype``; float32 holds every value of every type.

        Raises:
            InputError: it cannot be decoded.
        """
        info = self._tensors[name]
        try:
            return self._read(info, dtype).reshape(self._parameters[name])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, NotImplementedError) as error:
            raise InputError(f"{self.path}: tensor {info.name} cannot be read ({shown(one_line(error), 200)})") from error

    def blocks(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
        """A matrix's codes ``[rows, columns]``, and scales and minima ``[rows, groups]``: ``weight = scale * code + minimum``.

        Rows are in transformers' order, as those of :meth:`tensor`.

        Raises:
            InputError: its type has no codes.
        """
        info = self._tensors[name]
        try:
            blocks = gguf_types.unpack(self._reader.data(info.name).reshape(-1, info.row_bytes), info.kind)
            # Whatever a processor does to rows it does to the rows of codes and scales; all of them are exact in float32.
            parts = (blocks.codes.astype(np.float32), blocks.scales, blocks.minima)
            codes, scales, minima = (self._processor.process(weights=part, name=info.name).weights for part in parts)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{self.path}: {info.name} cannot be taken apart ({shown(one_line(error), 200)})") from error
        return codes.astype(np.uint8), np.ascontiguousarray(scales), np.ascontiguousarray(minima)

    def _read(self, info: GgufTensorInfo, dtype: torch.dtype) -> Tensor:
        # Processors look at names only, so what becomes of no rows tells whether anything is done to all of them.
        untouched = len(info.shape) > 1 and self._unprocessed(np.empty((0, *info.shape[1:]), np.float32), info.name)
        rows = self._reader.data(info.name).reshape(-1, info.row_bytes)
        stored = torch.empty((len(rows), info.shape[-1]), dtype=dtype if untouched else torch.float32)
        step = max(1, _SLICE // info.shape[-1])
        for first in range(0, len(rows), step):
            values = dequantize(rows[first : first + step], info.kind)
            # F32 comes as a view of the map, which cannot be written to, and PyTorch warns of that.
            stored[first : first + step] = torch.from_numpy(np.require(values, requirements=["C", "W"]))
        if untouched:
            return stored
        processed = self._processor.process(weights=stored.numpy().reshape(info.shape), name=info.name).weights
        return torch.from_numpy(np.require(processed, np.float32, ["C", "W"])).to(dtype)

    def _unprocessed(self, weights: NDArray[np.float32], name: str) -> bool:
        try:
            return self._processor.process(weights=weights, name=name).weights is weights
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return False

    def release(self) -> None:
        self._reader.release()

    def weight_files(self) -> list[Path]:
        return [self.path]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path.parent, self.path, gguf_file=self.path.name)

    def copy_side_files(self, destination: Path) -> None:
        self.tokenizer().save_pretrained(destination)

    def license(self) -> str | None:
        stated = self._reader.field("general.license", None)
        return stated.strip() or None if isinstance(stated, str) else None

    def config_dict(self) -> dict[str, Any]:
        dtype = str(self._dtype).removeprefix("torch.")
        return {**super().config_dict(), "architectures": [self._model_class], "dtype": dtype}


class _Outside:
    """A module as :func:`get_gguf_hf_weights_map` looks at one, without its lists of blocks.

    It asks every module in a model for names of its own, and lists all names of all blocks each time: seconds for thirty
    blocks, minutes for a hundred. What lies in a block is named by its number, which only modules outside know.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.config = getattr(module, "config", None)

    def state_dict(self) -> dict[str, Any]:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, _Outside]]:
        children = self._module.named_children()
        return [(name, _Outside(child)) for name, child in children if not isinstance(child, torch.nn.ModuleList)]


def dequantize(data: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """The values of stored blocks, to the bit those of llama.cpp.

    Args:
        data: uint8 ``[..., row_bytes]``.
        kind: llama.cpp's name of the type; gguf-py decodes those that are not written here.

    Returns:
        float32 ``[..., columns]``; for F32 a view of ``data``.

    Raises:
        KeyError, NotImplementedError: nothing here decodes ``kind``.
    """
    if kind in gguf_types.TYPES:
        return gguf_types.dequantize(data, kind)
    values: NDArray[np.float32] = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    return values
