"""Names, order of rows and layouts of a checkpoint's tensors in GGUF files.

The names are those of ``gguf.get_tensor_name_map``, the layouts those that llama.cpp's loader expects
(``src/models/*.cpp`` there): rows of q and k reordered in the llama architecture, whose RoPE rotates neighbouring values
where the checkpoint's rotates halves; Gemma's norms with the one added that its code adds; GPT-2's Conv1D weights transposed.
Fused tensors (GPT-2's and Phi-3's qkv, Phi-3's gate and up) are taken fused, so each stored tensor becomes one or none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from exports.gguf_config import architecture, complete_config, head_dim, rope_parameters
from quantize.errors import InputError

_NOT_STORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|^(model\.)?(vision_tower|multi_modal_projector)\.")
_ROTATED = re.compile(r"\.self_attn\.(?P<part>[qk])_proj\.(weight|bias)$")
_OUTPUT_BIAS = ("llama", "phi2", "gpt2")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


class TensorMap:
    """What becomes of each tensor of a checkpoint.

    Attributes:
        config: the completed configuration (:func:`exports.gguf_config.complete_config`).
        architecture: ``general.architecture`` of the file.

    Raises:
        InputError: an unknown family, or a configuration that llama.cpp does not compute.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = complete_config(config)
        self.architecture = architecture(config)
        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == self.architecture)
        self._names = gguf.get_tensor_name_map(arch, int(self.config["num_hidden_layers"]))
        self._tied = bool(self.config.get("tie_word_embeddings"))

    def name(self, hf_name: str) -> str | None:
        """The tensor's name in the file, like ``blk.0.attn_q.weight``; None where it is not stored.

        Not stored are RoPE frequencies, attention masks, an image tower beside the text model, and the head where it is
        the embedding.

        Raises:
            InputError: a tensor that the architecture does not have.
        """
        plain = hf_name.replace("language_model.", "")
        if _NOT_STORED.search(plain) or (plain == "lm_head.weight" and self._tied):
            return None
        found: str | None = self._names.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is None or (found.endswith("attn_output.bias") and self.architecture not in _OUTPUT_BIAS):
            raise InputError(
                f"tensor {hf_name} has no place in llama.cpp's {self.architecture} architecture; a checkpoint of "
                f"model_type={self.config['model_type']!r} holds only the tensors that transformers saves for it"
            )
        return found

    def row_order(self, hf_name: str, rows: int) -> NDArray[np.int64] | None:
        """For each row of the stored tensor the checkpoint's row, int64 ``[rows]``; None where rows stay in order.

        llama.cpp's ``LLM_ARCH_LLAMA`` rotates values 2i and 2i+1 of a head, the checkpoint's code values i and i + half.

        Raises:
            InputError: ``rows`` is not divisible into the configuration's heads.
        """
        match = _ROTATED.search(hf_name)
        if match is None or self.architecture != "llama":
            return None
        key = "num_attention_heads" if match["part"] == "q" else "num_key_value_heads"
        heads = int(self.config[key])
        if rows % (2 * heads):
            raise InputError(f"tensor {hf_name} has {rows} rows, which are no {heads} heads of even width (config.json: {key})")
        return np.arange(rows, dtype=np.int64).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)

    def transform(self, hf_name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        """A dense tensor's values as the file stores them: ``[rows, columns]`` or ``[values]``, of the type given.

        Gemma's norms come out as float32, whatever the type given: float16 has no digits left for the one.
        """
        if self.architecture.startswith("gemma") and hf_name.endswith("norm.weight"):
            return np.float32(1) + tensor.astype(np.float32)
        if self.architecture == "gpt2" and _CONV1D.search(hf_name):
            return np.ascontiguousarray(tensor.T)
        order = self.row_order(hf_name, len(tensor))
        return tensor if order is None else tensor[order]

    def shape(self, hf_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor, from the checkpoint's."""
        return shape[::-1] if self.architecture == "gpt2" and _CONV1D.search(hf_name) else shape

    def quantizable(self, hf_name: str) -> bool:
        """Whether this is a linear layer's weight that is stored as it is but for :meth:`row_order`.

        Such a layer's codes and scales can be stored row by row. GPT-2's Conv1D weights cannot: they are transposed.
        """
        if self.architecture == "gpt2" and _CONV1D.search(hf_name):
            return False
        name = self.name(hf_name)
        return name is not None and bool(re.fullmatch(r"output\.weight|blk\.\d+\.(attn|ffn)_(?!.*norm).*\.weight", name))


def rope_tensors(config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Tensors that only the configuration gives: divisors of the RoPE frequencies, float32 ``[head width / 2]``.

    ``rope_freqs.weight`` for Llama 3's scaling (https://arxiv.org/abs/2407.21783, 3.4.1; transformers'
    ``_compute_llama3_parameters``), ``rope_factors_long.weight`` and ``rope_factors_short.weight`` for LongRoPE
    (https://arxiv.org/abs/2402.13753).

    Args:
        config: a completed configuration.

    Raises:
        InputError: LongRoPE's factors are missing or of another length.
    """
    rope = rope_parameters(config)
    half = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)) // 2
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_divisors(rope, half)}
    if rope.get("rope_type") != "longrope":
        return {}
    tensors = {}
    for part in ("long", "short"):
        factors = rope.get(f"{part}_factor")
        if not isinstance(factors, list) or len(factors) != half:
            found = len(factors) if isinstance(factors, list) else factors
            raise InputError(f"config.json: rope_parameters.{part}_factor must be a list of {half} numbers, not {found}")
        tensors[f"rope_factors_{part}.weight"] = np.array(factors, np.float32)
    return tensors


def _llama3_divisors(rope: Mapping[str, Any], half: int) -> NDArray[np.float32]:
    frequencies = float(rope["rope_theta"]) ** -(np.arange(half, dtype=np.float64) / half)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return divisors.astype(np.float32)
