"""Folding scales into norms: the block computes what it computed, in every family where a norm can be scaled at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from quantize.blocks import DecoderWalk, linear_layers, set_linear_weight
from quantize.checkpoint import open_checkpoint
from quantize.folding import Norm, find_norms
from quantize.forwards import run_block
from quantize.groups import find_groups

MakeCheckpoint = Callable[..., Path]
TOKENS = 12
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
ATTENTION_AND_MLP = ("self_attn.q_proj", "mlp.gate_proj")
# family -> its config, and the first layer of every group that reads a norm which may be scaled
FAMILIES: dict[str, tuple[PretrainedConfig, tuple[str, ...]]] = {
    "llama": (LlamaConfig(**GQA), ATTENTION_AND_MLP),
    "mistral": (MistralConfig(**GQA, head_dim=8), ATTENTION_AND_MLP),
    "qwen2": (Qwen2Config(**GQA), ATTENTION_AND_MLP),
    "qwen3": (Qwen3Config(**GQA, head_dim=8), ATTENTION_AND_MLP),  # q_norm and k_norm are no norms of a layer's input
    "gemma": (GemmaConfig(**GQA, head_dim=8), ATTENTION_AND_MLP),  # the norm multiplies by 1 + weight
    "gemma2": (Gemma2Config(**GQA, head_dim=8), ATTENTION_AND_MLP),
    "phi3": (Phi3Config(**GQA, pad_token_id=0), ("self_attn.qkv_proj", "mlp.gate_up_proj")),
    "phi": (PhiConfig(**GQA), ("self_attn.q_proj",)),  # attention and MLP read the same norm
    "gpt2": (GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64), ("attn.c_attn", "mlp.c_fc")),
    "gpt_neox": (GPTNeoXConfig(**COMMON), ("attention.query_key_value", "mlp.dense_h_to_4h")),
    "opt": (OPTConfig(**OPT), ("self_attn.q_proj", "fc1")),
    # The residual stream is what the norm gives: scaling it would change the stream.
    "opt-post-norm": (OPTConfig(**OPT, do_layer_norm_before=False), ()),
    "bloom-residual": (
        BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, apply_residual_connection_post_layernorm=True),
        (),
    ),
    # The router reads the second norm as well.
    "qwen2_moe": (
        Qwen2MoeConfig(
            **GQA, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts=4, num_experts_per_tok=2
        ),
        ("self_attn.q_proj",),
    ),
}


class Block:
    """A family's second block in float32, with its groups and a window of hidden states."""

    def __init__(self, path: Path, config: PretrainedConfig, make_checkpoint: MakeCheckpoint) -> None:
        make_checkpoint(path, config)
        self.walk = DecoderWalk(open_checkpoint(str(path)), torch.device("cpu"), torch.float32)
        ids = torch.randint(3, 99, (2, TOKENS), generator=torch.Generator().manual_seed(0))
        self.hidden = self.walk.block_inputs(ids)
        self.arguments = self.walk.block_arguments(TOKENS)[1]
        self.prefix = f"{self.walk.path}.1."

    def norms(self, block: nn.Module) -> tuple[list[list[str]], dict[str, Norm]]:
        groups = find_groups(block, [self.hidden], self.arguments)
        stored = lambda name: self.walk.stored_dtype(self.prefix + name)  # noqa: E731
        return groups, find_norms(block, groups, self.hidden, self.arguments, stored)

    def output(self, block: nn.Module) -> Tensor:
        with torch.no_grad():
            return run_block(block, self.hidden, self.arguments) - self.hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_nothing_in_every_family(family: str, tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    config, expected = FAMILIES[family]
    bench = Block(tmp_path, config, make_checkpoint)
    with bench.walk.loaded_block(1) as block:
        before = {name: value.clone() for name, value in block.named_parameters()}
        output = bench.output(block)
        groups, norms = bench.norms(block)
        for name, value in block.named_parameters():
            assert torch.equal(value, before[name]), name  # looking leaves no trace
        assert tuple(norms) == expected
        layers = linear_layers(block)
        generator = torch.Generator().manual_seed(1)
        for group in groups:
            if group[0] not in norms:
                continue
            norm = norms[group[0]]
            folded, scales = norm.fold(torch.rand(len(norm.weight), generator=generator) * 3 + 0.3)
            for name, tensor in folded.items():
                assert tensor.dtype == torch.float16
                block.get_parameter(name).data.copy_(tensor)
            for name in group:
                set_linear_weight(layers[name], bench.walk.weight(bench.prefix + name) * scales)
        difference = (bench.output(block) - output).norm() / output.norm()
        # What is left is the float16 rounding of a bias; weights' is in the scales.
        assert difference < 1e-3


def test_the_rounding_of_the_norm_is_in_the_scales() -> None:
    norm = Norm("norm", torch.tensor([1.0, 0.3, 0.0, -2.0]), None, 0.0, torch.float16)
    folded, scales = norm.fold(torch.tensor([3.0, 7.0, 2.0, 0.7]))
    assert folded["norm.weight"].dtype == torch.float16
    exact = folded["norm.weight"].float() * scales
    assert torch.allclose(exact, norm.weight, rtol=1e-6)
    assert float(scales[2]) == 2.0 and float(scales[0]) != 3.0


def test_scales_beyond_the_stored_type_are_refused() -> None:
    norm = Norm("norm", torch.ones(2), None, 0.0, torch.float16)
    with pytest.raises(ValueError, match=r"do not fit torch\.float16"):
        norm.fold(torch.tensor([1.0, 1e-9]))
