"""Consumers: programs not written here that load an artifact. One file each; the registry maps containers to them."""

from __future__ import annotations

from eval.consumers import awq_model, bitsandbytes_model, gguf_model, transformers_model
from eval.consumers.base import Consumer

CONSUMERS: dict[str, Consumer] = {
    "safetensors": transformers_model.CONSUMER,
    "gptq": transformers_model.CONSUMER,
    "awq": awq_model.CONSUMER,
    "bitsandbytes": bitsandbytes_model.CONSUMER,
    "compressed-tensors": transformers_model.CONSUMER,
    "gguf": gguf_model.CONSUMER,
}

__all__ = ["CONSUMERS", "Consumer"]
