"""What a GGUF file takes from ``config.json``: the family, the completed configuration, what llama.cpp cannot run.

llama.cpp fixes per architecture what a Hugging Face configuration may vary (the activation, the attention scale, which
layers see a window): ``src/models/*.cpp`` in its source. A configuration outside of that would load and compute something
else, so it is refused here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from quantize.errors import InputError, one_line

log = logging.getLogger(__name__)

# model_type in config.json: general.architecture in the file.
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "phi": "phi2",
    "gpt2": "gpt2",
}
# Every n-th layer sees the whole context, the others a window, where the file does not say otherwise.
WINDOW_PATTERN = {"gemma2": 2, "gemma3": 6}
_SILU = ("silu", "swish")
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh")
_ACTIVATIONS = dict.fromkeys(("llama", "qwen2", "qwen3", "phi3"), _SILU) | dict.fromkeys(
    ("gemma", "gemma2", "gemma3", "phi2", "gpt2"), _GELU_TANH
)
_TIED = {"gemma": True, "gemma2": True, "phi2": False}
_ROPE_TYPES = {
    "default": tuple(_ACTIVATIONS),
    "linear": tuple(_ACTIVATIONS),
    "yarn": tuple(_ACTIVATIONS),
    "dynamic": tuple(_ACTIVATIONS),
    "llama3": ("llama",),
    "longrope": ("llama", "phi3"),
}


def architecture(config: Mapping[str, Any]) -> str:
    """``general.architecture`` of a model with this configuration.

    Raises:
        InputError: the family is not among those converted.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(f"config.json: model_type={model_type!r} cannot become GGUF; these can: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` with the defaults its family leaves out, RoPE in the form of ``rope_parameters``; text part only.

    The defaults are transformers' own (its config classes), which is what the checkpoint was written for.

    Raises:
        InputError: an unknown family, values that do not fit each other, or a model that llama.cpp does not compute.
    """
    name = architecture(config)
    text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else dict(config)
    model_type = "gemma3_text" if name == "gemma3" else str(text["model_type"])
    given = {key: value for key, value in text.items() if key not in ("model_type", "quantization_config", "text_config")}
    from transformers import AutoConfig

    try:
        # The classes write into nested dictionaries that they are given.
        parsed = AutoConfig.for_model(model_type, **copy.deepcopy(given))
        complete: dict[str, Any] = parsed.to_dict()
        # GPT-2 writes n_embd for hidden_size.
        complete |= {usual: complete[own] for usual, own in parsed.attribute_map.items() if own in complete}
    except Exception as error:  # config classes check their values by whatever their arithmetic raises
        raise InputError(f"config.json: model_type={model_type!r} is not usable ({one_line(error)})") from error
    _check(complete, name)
    return complete


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of one attention head, in values."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_parameters(config: Mapping[str, Any], layers: str = "full_attention") -> dict[str, Any]:
    """RoPE of a completed configuration, of the named kind of layers where kinds differ (Gemma 3); empty without RoPE."""
    rope = config.get("rope_parameters") or {}
    return dict(rope.get(layers) or rope)


def full_attention_layers(config: Mapping[str, Any]) -> list[bool] | None:
    """For each layer whether it sees the whole context; None where the configuration names no kinds of layers."""
    kinds = config.get("layer_types")
    return None if kinds is None else [kind == "full_attention" for kind in kinds]


def warn_of_differences(config: Mapping[str, Any]) -> None:
    """Log from which length of text on llama.cpp computes something else than the checkpoint's own code."""
    if rope_parameters(config).get("rope_type") == "dynamic":
        log.warning("rope_type=dynamic: llama.cpp keeps the unscaled frequencies beyond the trained context")
    window = config.get("sliding_window")
    if not window or architecture(config) in WINDOW_PATTERN or config.get("use_sliding_window") is False:
        return
    if window < config["max_position_embeddings"]:
        log.warning(
            "sliding_window=%d: llama.cpp attends to the whole context with this architecture; its results differ from the "
            "checkpoint's beyond %d tokens",
            window,
            window,
        )


def _refuse(key: str, found: object, allowed: str) -> None:
    raise InputError(
        f"config.json: {key}={found!r} cannot become GGUF: llama.cpp computes this architecture only with {allowed}"
    )


def _check(config: Mapping[str, Any], name: str) -> None:
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        if config.get(key) is not None:
            if config[key] not in _ACTIVATIONS[name]:
                _refuse(key, config[key], f"one of {', '.join(_ACTIVATIONS[name])}")
            break
    if config.get("use_bidirectional_attention"):
        _refuse("use_bidirectional_attention", True, "causal attention: false")
    if name == "gpt2":
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if config.get(key):
                _refuse(key, True, "false")
    # Gemma's graphs take the embedding for the head, Phi-2's never do.
    if name in _TIED and bool(config.get("tie_word_embeddings")) != _TIED[name]:
        _refuse("tie_word_embeddings", config.get("tie_word_embeddings"), str(_TIED[name]).lower())
    if name in ("gemma2", "gemma3"):
        _check_gemma(config, name)
    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if name not in _ROPE_TYPES.get(kind, ()):
        known = ", ".join(each for each, names in _ROPE_TYPES.items() if name in names)
        _refuse("rope_parameters.rope_type", kind, known)


def _check_gemma(config: Mapping[str, Any], name: str) -> None:
    layers, width = config["num_hidden_layers"], head_dim(config)
    largest = layers == {"gemma2": 46, "gemma3": 62}[name]
    expected = config["hidden_size"] // config["num_attention_heads"] if largest else width
    if config["query_pre_attn_scalar"] != expected:
        _refuse("query_pre_attn_scalar", config["query_pre_attn_scalar"], f"{expected} (with {layers} layers)")
    if name == "gemma3" and config.get("attn_logit_softcapping") is not None:
        _refuse("attn_logit_softcapping", config["attn_logit_softcapping"], "null")
