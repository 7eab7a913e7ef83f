"""Scales between two linear layers: found in every family that has them, without consequence for what the block computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from quantize.blocks import DecoderWalk
from quantize.checkpoint import open_checkpoint
from quantize.forwards import run_block
from quantize.groups import find_groups
from quantize.linear_folding import Link, find_links, row_factors, scale_layers

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
OPT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}
VALUES = ("self_attn.v_proj", "self_attn.o_proj")
UP = ("mlp.up_proj", "mlp.down_proj")
# family -> its config, and the pairs of layers between which scales can be moved
FAMILIES: dict[str, tuple[PretrainedConfig, tuple[tuple[str, str], ...]]] = {
    "llama": (LlamaConfig(**GQA), (VALUES, UP)),
    "llama-mha": (LlamaConfig(**COMMON), (VALUES, UP)),
    "qwen2": (Qwen2Config(**GQA), (VALUES, UP)),  # v has a bias
    "qwen3": (Qwen3Config(**GQA, head_dim=8), (VALUES, UP)),
    # k stands between q and v of different widths, so v's rows are the last of qkv_proj but not as many as o reads.
    "phi3": (Phi3Config(**GQA, pad_token_id=0), (("mlp.gate_up_proj", "mlp.down_proj"),)),
    "phi3-mha": (Phi3Config(**COMMON, pad_token_id=0), (("self_attn.qkv_proj", VALUES[1]), ("mlp.gate_up_proj", UP[1]))),
    "phi": (PhiConfig(**COMMON), (("self_attn.v_proj", "self_attn.dense"),)),  # a GELU between fc1 and fc2
    "gpt2": (GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64), (("attn.c_attn", "attn.c_proj"),)),
    "gpt_neox": (GPTNeoXConfig(**COMMON), ()),  # q, k and v of each head lie together
    "opt": (OPTConfig(**OPT), (("self_attn.v_proj", "self_attn.out_proj"), ("fc1", "fc2"))),  # a ReLU between fc1 and fc2
}


@pytest.mark.parametrize("family", FAMILIES)
def test_links_are_found_and_scaling_changes_nothing(family: str, tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    config, expected = FAMILIES[family]
    make_checkpoint(tmp_path, config)
    walk = DecoderWalk(open_checkpoint(str(tmp_path)), torch.device("cpu"), torch.float32)
    hidden = walk.block_inputs(torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0)))
    arguments = walk.block_arguments(12)[1]
    with walk.loaded_block(1) as block, torch.no_grad():
        before = {name: value.clone() for name, value in block.named_parameters()}
        output = run_block(block, hidden, arguments) - hidden
        links = find_links(block, find_groups(block, [hidden], arguments), hidden, arguments)
        for name, value in block.named_parameters():
            assert torch.equal(value, before[name]), name  # looking leaves no trace
        assert tuple((link.source, link.target) for link in links) == expected
        generator = torch.Generator().manual_seed(1)
        for link in links:
            scales = link.shared(torch.rand(len(link.channels), generator=generator) * 3 + 0.3)
            scale_layers(block, link, scales)
            assert not torch.equal(block.get_parameter(f"{link.target}.weight"), before[f"{link.target}.weight"])
        difference = (run_block(block, hidden, arguments) - hidden - output).norm() / output.norm()
        assert difference < 1e-5


def test_experts_have_links_of_their_own(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    experts = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    make_checkpoint(tmp_path, Qwen2MoeConfig(**GQA, **experts))
    walk = DecoderWalk(open_checkpoint(str(tmp_path)), torch.device("cpu"), torch.float32)
    hidden = walk.block_inputs(torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0)))
    arguments = walk.block_arguments(12)[1]
    with walk.loaded_block(1) as block:
        links = find_links(block, find_groups(block, [hidden], arguments), hidden, arguments)
    pairs = {(link.source, link.target) for link in links}
    assert VALUES in pairs
    assert {(f"mlp.experts.{i}.up_proj", f"mlp.experts.{i}.down_proj") for i in range(4)} <= pairs
    assert ("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj") in pairs


def test_heads_that_read_one_head_of_v_share_its_scales() -> None:
    link = Link("v", "o", torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]))
    scales = link.shared(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]))
    assert scales.tolist() == [2, 3, 2, 3, 6, 7, 6, 7]
    assert row_factors(link, scales, 5).tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6, 1 / 7, 1])


def test_rows_that_nothing_reads_keep_their_size() -> None:
    link = Link("gate_up", "down", torch.tensor([2, 3]))
    assert row_factors(link, torch.tensor([2.0, 4.0]), 4).tolist() == [1, 1, 0.5, 0.25]
