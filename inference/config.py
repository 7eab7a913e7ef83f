"""What the engine needs to know of a model: the fields of a Hugging Face ``config.json``, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import InputError
from quantize.files import read_json
from quantize.gguf_checkpoint import GgufCheckpoint

# Families whose decoder is inference/model.py; the rest of the config says which of its optional parts are there.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    Attributes:
        num_layers, hidden_size, intermediate_size, vocab_size, head_dim: sizes, in elements.
        num_heads, num_kv_heads: query heads, and key/value heads that groups of them share.
        norm_eps: added to the mean square in RMSNorm.
        qk_norm: RMSNorm over each head of queries and keys (qwen3).
        tied_head: the output embedding is the input embedding.
        rope: the ``rope_parameters`` entry: ``rope_type``, ``rope_theta`` and what the type needs.
        max_tokens: the longest context that is attended to in full; no longer than a sliding window.
        window: the sliding window the model was trained with, for :class:`inference.window.RollingCache`; None without one.
        stop_tokens: ids that end a text.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    norm_eps: float
    qk_norm: bool
    tied_head: bool
    rope: Mapping[str, Any]
    max_tokens: int
    stop_tokens: tuple[int, ...]
    window: int | None = None


def read_config(path: Path) -> ModelConfig:
    """The model in a directory, by its ``config.json``, or in a GGUF file, by its metadata.

    Raises:
        InputError: no config.json, a field is missing, or the model is none that ``model.py`` computes.
    """
    gguf = gguf_file(path)
    file = gguf or path / "config.json"
    if gguf is None and not file.exists():
        raise InputError(f"{path} is no model directory: it has no config.json")
    raw = read_json(file) if gguf is None else GgufCheckpoint(gguf).config_dict()
    family, activation = raw.get("model_type"), raw.get("hidden_act", "silu")
    if family not in FAMILIES:
        raise InputError(f"{file}: model_type={family!r} is none the engine runs; use one of {', '.join(FAMILIES)}")
    if activation != "silu":
        raise InputError(f"{file}: hidden_act={activation!r}; the engine's feed-forward part is SwiGLU, hidden_act='silu'")
    try:
        heads = raw["num_attention_heads"]
        return ModelConfig(
            num_layers=raw["num_hidden_layers"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            vocab_size=raw["vocab_size"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            qk_norm=family == "qwen3",
            tied_head=raw.get("tie_word_embeddings", False),
            rope=_rope_parameters(raw),
            max_tokens=min(raw["max_position_embeddings"], _window(raw) or raw["max_position_embeddings"]),
            window=_window(raw),
            stop_tokens=_stop_tokens(file.parent, raw),
        )
    except KeyError as error:
        raise InputError(f"{file} has no {error.args[0]}; it must describe a complete {family} model") from error


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or that the directory holds beside no safetensors; None for other directories."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    file = path / "model.gguf"
    return file if file.exists() and not any(path.glob("*.safetensors")) else None


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters``, or what configs before transformers 5 spread over ``rope_theta`` and ``rope_scaling``."""
    rope = {
        "rope_theta": raw.get("rope_theta", 10000.0),
        **(raw.get("rope_scaling") or {}),
        **(raw.get("rope_parameters") or {}),
    }
    rope.setdefault("rope_type", rope.get("type", "default"))
    longest = raw["max_position_embeddings"]
    return {"original_max_position_embeddings": longest, **rope, "max_position_embeddings": longest}


def _window(raw: Mapping[str, Any]) -> int | None:
    # Mistral's window is on when it is set; Qwen's configs name a window that a second field switches on.
    window: int | None = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    return window or None


def _stop_tokens(directory: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json, which chat models list more of, or of config.json."""
    generation = directory / "generation_config.json"
    stored = (read_json(generation) if generation.exists() else {}).get("eos_token_id", raw.get("eos_token_id"))
    if stored is None:
        return ()
    return tuple(stored) if isinstance(stored, list) else (stored,)
