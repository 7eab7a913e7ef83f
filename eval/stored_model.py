"""An artifact as a model that can be walked block by block: its weights as this project's readers dequantize them.

No consumer takes part, so layers of two artifacts can be compared and exchanged one by one, whatever container they are in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from eval.consumers.gguf_model import gguf_file
from eval.perplexity import container_of
from exports.containers import CONTAINERS
from exports.gguf_types import TYPES
from quantize.activations import quantize_inputs, token_steps
from quantize.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from quantize.errors import InputError, one_line
from quantize.files import read_json
from quantize.gguf_checkpoint import GgufCheckpoint
from quantize.grids import QuantizedTensor


def open_model(path: str) -> Checkpoint:
    """An artifact directory in any container, a GGUF file or an unquantized checkpoint.

    Raises:
        InputError: nothing there that this project reads.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return open_checkpoint(path)
    container = container_of(directory)
    if container == "gguf":
        return open_checkpoint(str(gguf_file(directory)))
    return open_checkpoint(path) if container == "safetensors" else StoredModel(directory, container)


def kind_of(model: Checkpoint, layer: str) -> str:
    """What a linear layer is stored as: ``int4 g64``, ``int8 row``, ``Q4_K``, ``nf4``, or its floating type."""
    if isinstance(model, StoredModel):
        return model.kind(layer)
    if isinstance(model, GgufCheckpoint):
        return model.kind(f"{layer}.weight")
    return str(model.dtype(f"{layer}.weight")).removeprefix("torch.")


def bits_of(model: Checkpoint, layer: str) -> int | None:
    """Bits of a linear layer's codes; None for floating numbers."""
    kind = kind_of(model, layer)
    if kind in TYPES:
        return TYPES[kind].bits
    found = re.match(r"(?:int|nf)(\d+)|I?Q(\d)", kind)
    return int(found[1] or found[2]) if found else None


def input_rounding(model: Checkpoint, layer: str) -> Callable[[Tensor], Tensor] | None:
    """What an artifact does to a layer's inputs before it multiplies; None: nothing, or what this project does not imitate."""
    return model.input_rounding(layer) if isinstance(model, StoredModel) else None


class StoredModel(Checkpoint):
    """A quantized directory. Layers come out as float32, other tensors as they are stored."""

    def __init__(self, directory: Path, container: str) -> None:
        """Read it all: codes stay codes until they are asked for.

        Raises:
            InputError: damaged, or of a format that no reader here knows.
        """
        self.path, self.container = directory, container
        self._raw = read_json(directory / "config.json")
        try:
            self.config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # config classes check their values by whatever their arithmetic raises
            raise InputError(f"{directory}/config.json is not usable ({one_line(error)}); make the artifact again") from error
        self._quantization: dict[str, Any] = self._raw["quantization_config"]
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        layers, self._dense = CONTAINERS[container].read(directory)
        self._layers: dict[str, QuantizedTensor] = {f"{name}.weight": layer for name, layer in layers.items()}
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        self._transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}

    def names(self) -> list[str]:
        return sorted([*self._layers, *self._dense])

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._layers:
            return tuple(self._dense[name].shape)
        rows, columns = self._layers[name].codes.shape
        return (columns, rows) if name in self._transposed else (rows, columns)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._layers else self._dense[name].dtype

    def tensor(self, name: str) -> Tensor:
        if name in self._layers:
            weight = self._layers[name].dequantize()
            return weight.t() if name in self._transposed else weight
        # What a reader has decoded already (NF4) it gives as [out, in], for transposed layers too.
        decoded = self.container == "bitsandbytes" and name in self._transposed and self._dense[name].dtype == torch.float32
        return self._dense[name].t() if decoded else self._dense[name]

    def kind(self, layer: str) -> str:
        """What a layer is stored as."""
        name = f"{layer}.weight"
        if name in self._layers:
            grid = self._layers[name].grid
            return f"int{grid.bits} " + ("row" if grid.group_size == -1 else f"g{grid.group_size}")
        if self._quantization.get("load_in_4bit") and self._dense[name].dtype == torch.float32:
            return "nf4"
        return str(self._dense[name].dtype).removeprefix("torch.")

    def input_rounding(self, layer: str) -> Callable[[Tensor], Tensor] | None:
        """What compressed-tensors' ``input_activations`` say: 8 bits by a stored step, or by one for each token."""
        name = f"{layer}.weight"
        if name not in self._layers or self.container != "compressed-tensors":
            return None
        step = self._layers[name].input_scale
        if step is not None:
            fixed = step.float()
            return lambda inputs: quantize_inputs(inputs, fixed.to(inputs.device))
        groups = self._quantization["config_groups"].values()
        if any((group.get("input_activations") or {}).get("dynamic") for group in groups):
            return lambda inputs: quantize_inputs(inputs, token_steps(inputs))
        return None

    def weight_files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path, self.path)

    def copy_side_files(self, destination: Path) -> None:
        self.tokenizer().save_pretrained(destination)

    def release(self) -> None:
        """Nothing is mapped."""
