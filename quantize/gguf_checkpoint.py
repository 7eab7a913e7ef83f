"""GGUF files as checkpoints: dequantized tensor by tensor, under the names transformers gives the parameters.

The name map and the undoing of llama.cpp's row permutations are transformers' own (``modeling_gguf_pytorch_utils``), the
block formats gguf-py's; this module only makes them lazy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from quantize.checkpoint import Checkpoint, load_tokenizer
from quantize.errors import InputError, one_line


class GgufCheckpoint(Checkpoint):
    """A GGUF file. Tensors come out as float32 where most weights are F32, bfloat16 where BF16, float16 otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
            self.config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except InputError:
            raise
        except Exception as error:  # gguf-py reports damage by whatever its numpy arithmetic raises
            raise InputError(f"{path} is not a readable GGUF model ({one_line(error)}); fetch it again") from error
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        self._processor = TENSOR_PROCESSORS.get(self._field("general.architecture"), TensorProcessor)(
            config=self.config.to_dict()
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        self._parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        names = get_gguf_hf_weights_map(model, self._processor)
        self._tensors = {names[tensor.name]: tensor for tensor in self._reader.tensors if tensor.name in names}
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        missing = sorted(set(self._parameters) - set(self._tensors) - tied)
        if missing:
            raise InputError(f"{path} lacks {len(missing)} tensors of its architecture, first {missing[0]}")
        self._dtype = self._majority_dtype()

    def _field(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def _majority_dtype(self) -> torch.dtype:
        counts: dict[Any, int] = {}
        for tensor in self._tensors.values():
            counts[tensor.tensor_type] = counts.get(tensor.tensor_type, 0) + int(tensor.n_elements)
        kinds = gguf.GGMLQuantizationType
        most = max(counts, key=lambda kind: counts[kind])
        return {kinds.F32: torch.float32, kinds.BF16: torch.bfloat16}.get(most, torch.float16)

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parameters[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def tensor(self, name: str) -> Tensor:
        stored = self._tensors[name]
        try:
            values = gguf.dequantize(stored.data, stored.tensor_type)
            values = self._processor.process(weights=values, name=stored.name).weights
            return torch.from_numpy(values.copy()).reshape(self._parameters[name]).to(self._dtype)
        except (ValueError, KeyError, TypeError, NotImplementedError) as error:
            raise InputError(f"{self.path}: tensor {stored.name} cannot be read ({one_line(error)})") from error

    def release(self) -> None:
        """Nothing to do: the file stays mapped; its pages are a quarter of the FP16 weights' size."""

    def weight_files(self) -> list[Path]:
        return [self.path]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path.parent, self.path, gguf_file=self.path.name)

    def copy_side_files(self, destination: Path) -> None:
        self.tokenizer().save_pretrained(destination)

    def config_dict(self) -> dict[str, Any]:
        architectures = [type(self._architecture()).__name__]
        dtype = str(self._dtype).removeprefix("torch.")
        return {**super().config_dict(), "architectures": architectures, "dtype": dtype}

    def _architecture(self) -> torch.nn.Module:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)  # type: ignore[no-any-return]
