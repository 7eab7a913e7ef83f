"""Owners of a group of layers: which module that is, and that its error for many candidates is that of each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig, Phi3Config, PretrainedConfig, Qwen3Config

from quantize.blocks import DecoderWalk, linear_layers, linear_weight, set_linear_weight
from quantize.checkpoint import open_checkpoint
from quantize.groups import find_groups
from quantize.owners import find_owners

MakeCheckpoint = Callable[..., Path]
COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GQA = {**COMMON, "num_key_value_heads": 2}
OPT = {"vocab_size": 99, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"self_attn.q_proj": "self_attn", "mlp.gate_proj": "mlp"}
# family -> its config, and the owner by the first layer of a group
FAMILIES: dict[str, tuple[PretrainedConfig, dict[str, str]]] = {
    "llama": (LlamaConfig(**GQA), LLAMA),
    "qwen3": (Qwen3Config(**GQA, head_dim=8), LLAMA),
    "phi3": (Phi3Config(**GQA, pad_token_id=0), {"self_attn.qkv_proj": "self_attn", "mlp.gate_up_proj": "mlp"}),
    "gpt2": (
        GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        {"attn.c_attn": "attn", "mlp.c_fc": "mlp"},
    ),
    "opt": (OPTConfig(**OPT, word_embed_proj_dim=32), {"self_attn.q_proj": "self_attn"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_together_give_what_each_gives_alone(family: str, tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    config, expected = FAMILIES[family]
    make_checkpoint(tmp_path, config)
    walk = DecoderWalk(open_checkpoint(str(tmp_path)), torch.device("cpu"), torch.float32)
    hidden = walk.block_inputs(torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0)))
    arguments = walk.block_arguments(12)[1]
    windows = list(torch.randn(2, 1, 12, 32, generator=torch.Generator().manual_seed(1)))
    with walk.loaded_block(1) as block, torch.no_grad():
        groups = find_groups(block, [hidden], arguments)
        owners = find_owners(block, groups, hidden[:1], arguments)
        assert {first: block.get_submodule(name) for first, name in expected.items()} == {
            first: owner.module for first, owner in owners.items()
        }
        layers = linear_layers(block)
        for group in groups:
            if group[0] not in owners:
                continue
            owner = owners[group[0]]
            original = [linear_weight(layers[name]).clone() for name in group]
            noise = [torch.randn(3, *weight.shape, generator=torch.Generator().manual_seed(2)) for weight in original]
            candidates = [weight + 0.1 * own for weight, own in zip(original, noise, strict=True)]
            found = owner.error(windows, candidates)
            before = [owner._output(window) for window in windows]
            for index in range(3):
                for name, weight in zip(group, candidates, strict=True):
                    set_linear_weight(layers[name], weight[index])
                after = [owner._output(window) for window in windows]
                alone = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
                assert float(found[index]) == pytest.approx(alone, rel=1e-4)
                for name, weight in zip(group, original, strict=True):
                    set_linear_weight(layers[name], weight)
