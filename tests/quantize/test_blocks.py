"""The block walk sees, family by family, exactly what the whole model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
    ViTConfig,
)
from transformers.pytorch_utils import Conv1D

from quantize.blocks import BLOCK_PATHS, DecoderWalk, find_block_path, linear_layers, linear_shape, set_linear_weight
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.errors import InputError
from quantize.forwards import run_block
from quantize.groups import find_groups

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")

VOCABULARY, TOKENS = 99, 20
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NO_GQA = {**COMMON, "num_key_value_heads": 4}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
NEOX_SIZES = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}

LLAMA_GROUPS = ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]

# Config, and the groups of a block: last parts of the names of the layers that share an input, in order of execution.
FAMILIES: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "llama": (LlamaConfig(**COMMON), LLAMA_GROUPS),
    "mistral": (MistralConfig(**COMMON, sliding_window=8), LLAMA_GROUPS),
    "qwen2": (Qwen2Config(**COMMON), LLAMA_GROUPS),
    "qwen3": (Qwen3Config(**COMMON, head_dim=8), LLAMA_GROUPS),
    "gemma": (GemmaConfig(**COMMON, head_dim=8), LLAMA_GROUPS),
    "gemma2": (Gemma2Config(**COMMON, head_dim=8, sliding_window=8), LLAMA_GROUPS),
    "gemma3_text": (
        Gemma3TextConfig(
            **COMMON,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        LLAMA_GROUPS,
    ),
    # Phi's attention and MLP read the same normalised states side by side.
    "phi": (PhiConfig(**NO_GQA), ["q_proj k_proj v_proj fc1", "dense", "fc2"]),
    "phi3": (Phi3Config(**COMMON, pad_token_id=0), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "opt": (
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        ["q_proj k_proj v_proj", "out_proj", "fc1", "fc2"],
    ),
    "gpt2": (GPT2Config(**GPT2_SIZES), ["c_attn", "c_proj", "c_fc", "c_proj"]),
    "gpt_neox": (GPTNeoXConfig(**NEOX_SIZES), ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "bloom": (
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "falcon": (
        FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True),
        ["query_key_value dense_h_to_4h", "dense", "dense_4h_to_h"],
    ),
    # Not in BLOCK_PATHS: the blocks are found by their shape.
    "stablelm": (StableLmConfig(**COMMON), LLAMA_GROUPS),
    "starcoder2": (Starcoder2Config(**COMMON), ["q_proj k_proj v_proj", "o_proj", "c_fc", "c_proj"]),
    "cohere": (CohereConfig(**COMMON), ["q_proj k_proj v_proj gate_proj up_proj", "o_proj", "down_proj"]),
    "gptj": (GPTJConfig(**GPT2_SIZES, rotary_dim=4), ["q_proj k_proj v_proj fc_in", "out_proj", "fc_out"]),
}


def open_walk(path: Path) -> DecoderWalk:
    return DecoderWalk(open_checkpoint(str(path)), CPU, torch.float32)


def windows(count: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def block_outputs(path: Path, blocks: str, ids: Tensor) -> list[Tensor]:
    """What each decoder block of the whole model returns."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    outputs: list[Tensor] = []

    def record(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for block in model.get_submodule(blocks):
        block.register_forward_hook(record)
    model(input_ids=ids, use_cache=False)
    return outputs


@torch.no_grad()
def walked_outputs(walk: DecoderWalk, ids: Tensor) -> list[Tensor]:
    """The same by the walk, one block in memory at a time."""
    hidden, arguments = walk.block_inputs(ids), walk.block_arguments(ids.shape[1])
    outputs = []
    for index in range(walk.count):
        with walk.loaded_block(index) as block:
            hidden = run_block(block, hidden, arguments[index])
        outputs.append(hidden)
    return outputs


def group_names(walk: DecoderWalk, ids: Tensor) -> list[list[str]]:
    with walk.loaded_block(0) as block:
        return find_groups(block, [walk.block_inputs(ids)], walk.block_arguments(ids.shape[1])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_walk_computes_what_the_model_computes(family: str, tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    config, groups = FAMILIES[family]
    assert config.model_type == family
    make_checkpoint(tmp_path, config)
    walk, ids = open_walk(tmp_path), windows()
    assert walk.count == config.num_hidden_layers
    expected = block_outputs(tmp_path, walk.path, ids)
    for visit in ("first", "second"):  # a walk serves every variant of a run
        found = walked_outputs(walk, ids)
        assert len(found) == len(expected)
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5), (visit, index)
    names = group_names(walk, ids)
    assert [" ".join(name.rsplit(".", 1)[-1] for name in group) for group in names] == groups


def test_some_families_tested_are_found_by_shape() -> None:
    assert len(FAMILIES.keys() - BLOCK_PATHS.keys()) >= 3


def test_windows_may_be_shorter_than_the_sliding_window_or_single(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    make_checkpoint(tmp_path, FAMILIES["mistral"][0])
    walk = open_walk(tmp_path)
    for ids in (windows(1, 3), windows(3, 9), windows(1, 1)):
        expected = block_outputs(tmp_path, walk.path, ids)
        assert torch.allclose(walked_outputs(walk, ids)[-1], expected[-1], rtol=1e-5, atol=1e-5)


def test_sharded_bfloat16_checkpoint_walks_alike(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    make_checkpoint(tmp_path, FAMILIES["llama"][0], torch.bfloat16, max_shard_size="20KB")
    walk = open_walk(tmp_path)
    assert len(walk.checkpoint.weight_files()) > 1
    assert torch.allclose(walked_outputs(walk, windows())[-1], block_outputs(tmp_path, walk.path, windows())[-1], atol=1e-5)


def test_names_without_the_base_prefix(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    """The first GPT-2 checkpoints omit ``transformer.``."""
    make_checkpoint(tmp_path / "full", FAMILIES["gpt2"][0])
    short = make_checkpoint(tmp_path / "short", FAMILIES["gpt2"][0])
    stored = load_file(short / "model.safetensors")
    stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(stored, short / "model.safetensors", metadata={"format": "pt"})
    full_walk, short_walk = open_walk(tmp_path / "full"), open_walk(short)
    assert short_walk.canonical("h.1.attn.c_attn.weight") == "transformer.h.1.attn.c_attn.weight"
    assert short_walk.canonical("wte.weight") == "transformer.wte.weight"
    assert sorted(map(short_walk.canonical, stored)) == full_walk.checkpoint.names()
    for name in full_walk.checkpoint.names():
        assert full_walk.canonical(name) == name
    assert short_walk.canonical("h.1.attn.masked_bias") == "h.1.attn.masked_bias"
    assert torch.equal(walked_outputs(short_walk, windows())[-1], walked_outputs(full_walk, windows())[-1])
    layer = "transformer.h.0.mlp.c_fc"
    assert torch.equal(short_walk.weight(layer), full_walk.weight(layer))


def test_layer_shapes_and_weights_are_output_by_input(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    make_checkpoint(tmp_path, FAMILIES["gpt2"][0])
    walk = open_walk(tmp_path)
    assert walk.layer_names(1) == {
        "transformer.h.1.attn.c_attn": (96, 32),
        "transformer.h.1.attn.c_proj": (32, 32),
        "transformer.h.1.mlp.c_fc": (128, 32),
        "transformer.h.1.mlp.c_proj": (32, 128),
    }
    for name, shape in walk.layer_names(1).items():
        weight = walk.weight(name)
        assert weight.shape == shape
        assert weight.dtype == torch.float32
        assert torch.equal(weight.t(), walk.checkpoint.tensor(f"{name}.weight").float())


def test_llama_groups_by_full_name(tiny_llama: Path) -> None:
    walk = open_walk(tiny_llama)
    assert group_names(walk, windows()) == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert list(walk.layer_names(3)) == [f"model.layers.3.{name}" for group in group_names(walk, windows()) for name in group]


class WatchedReads:
    """Notes which tensors are read from a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        read = checkpoint.tensor

        def watched(name: str) -> Tensor:
            self.names.append(name)
            return read(name)

        monkeypatch.setattr(checkpoint, "tensor", watched)


def test_one_block_is_in_memory_at_a_time(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    reads = WatchedReads(checkpoint, monkeypatch)
    walk = DecoderWalk(checkpoint, CPU, torch.float32)
    assert reads.names == []
    walk.block_inputs(windows())
    assert set(reads.names) == {"model.embed_tokens.weight"}
    reads.names.clear()
    with walk.loaded_block(2) as block:
        assert reads.names and all(name.startswith("model.layers.2.") for name in reads.names)
        assert not any(parameter.is_meta for parameter in block.parameters())
        assert all(parameter.dtype == torch.float32 for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in block.parameters())


def test_block_is_dropped_when_its_user_fails(tiny_llama: Path) -> None:
    walk = open_walk(tiny_llama)
    with pytest.raises(RuntimeError, match="solver failed"), walk.loaded_block(0) as block:
        raise RuntimeError("solver failed")
    assert all(parameter.is_meta for parameter in block.parameters())
    assert len(walked_outputs(walk, windows())) == 4


def test_missing_tensor_is_named(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    make_checkpoint(tmp_path, FAMILIES["qwen2"][0])
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.self_attn.q_proj.bias"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.1\.self_attn\.q_proj\.bias, which a qwen2 model"):
        walked_outputs(open_walk(tmp_path), windows())


def test_tensor_of_another_shape_is_named(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    make_checkpoint(tmp_path, FAMILIES["llama"][0])
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 32).half()
    save_file(stored, tmp_path / "model.safetensors")
    message = r"tensor model\.layers\.0\.mlp\.up_proj\.weight is \(40, 32\), but by the config it is \(48, 32\)"
    with pytest.raises(InputError, match=message):
        walked_outputs(open_walk(tmp_path), windows())


def test_unknown_family_without_a_list_of_blocks_is_refused(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    make_checkpoint(tmp_path, StableLmConfig(**{**COMMON, "num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"StableLmForCausalLM has no list of identical decoder blocks.*families: bloom, "):
        open_walk(tmp_path)


def test_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no causal language model can be built"):
        open_walk(tmp_path)


def test_model_that_changes_states_between_blocks_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, input_ids: Tensor, use_cache: bool) -> None:
        hidden = self.get_submodule("model.embed_tokens")(input_ids)
        for block in self.get_submodule("model.layers").children():
            output = block(hidden)
            hidden = (output[0] if isinstance(output, tuple) else output) * 2

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    walk = open_walk(tiny_llama)
    with pytest.raises(InputError, match="LlamaForCausalLM changes the hidden states between its decoder blocks"):
        walk.block_inputs(windows())


def test_largest_list_of_like_modules_is_the_blocks() -> None:
    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU())

    model = nn.Module()
    model.adapters = nn.ModuleList(block(4) for _ in range(9))
    model.norms = nn.ModuleList(nn.LayerNorm(4096) for _ in range(9))
    model.mixed = nn.ModuleList([nn.Linear(64, 64), block(64)])
    model.decoder = nn.Module()
    model.decoder.stack = nn.ModuleList(block(16) for _ in range(3))
    assert find_block_path(model) == "decoder.stack"
    del model.decoder, model.adapters
    with pytest.raises(InputError, match="Module has no list of identical decoder blocks"):
        find_block_path(model)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6)], ids=["linear", "conv1d"])
def test_weights_are_set_in_either_layout(layer: nn.Module) -> None:
    layer.half()
    assert linear_shape(layer) == (4, 6)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    set_linear_weight(layer, weight)
    inputs = torch.eye(6).half()
    bias = layer.get_parameter("bias").detach()
    assert torch.equal((layer(inputs) - bias).detach(), (weight.half().t() + bias) - bias)
    stored = layer.get_parameter("weight")
    assert stored.dtype == torch.float16 and stored.is_contiguous() and not stored.requires_grad
    assert list(linear_layers(nn.ModuleDict({"inner": nn.Sequential(layer), "other": nn.LayerNorm(4)}))) == ["inner.0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_embedding_gets_what_it_gets_in_the_model(
    family: str, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    path = make_checkpoint(tmp_path / family, FAMILIES[family][0])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    windows = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    walk = DecoderWalk(open_checkpoint(str(path)), CPU, torch.float32)
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
        hidden, arguments = walk.block_inputs(windows), walk.block_arguments(TOKENS)
        for index in range(walk.count):
            with walk.loaded_block(index) as block:
                hidden = run_block(block, hidden, arguments[index])
    torch.testing.assert_close(walk.head_inputs(hidden), seen[0], rtol=1e-4, atol=1e-5)
    ((name, shape),) = walk.head().items()
    assert model.get_submodule(name) is model.get_output_embeddings()
    assert shape == tuple(model.get_output_embeddings().weight.shape)
    assert torch.equal(walk.weight(name), model.get_output_embeddings().weight)
    assert all(parameter.is_meta for parameter in walk._model.parameters())


def test_the_stored_type_of_a_parameter_is_the_checkpoints(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint(tmp_path / "gpt2", FAMILIES["gpt2"][0], torch.bfloat16)
    walk = DecoderWalk(open_checkpoint(str(path)), CPU, torch.float32)
    assert walk.stored_dtype("transformer.h.0.ln_1.weight") == torch.bfloat16
    with pytest.raises(InputError, match=r"has no tensor transformer\.h\.9\.ln_1\.weight"):
        walk.stored_dtype("transformer.h.9.ln_1.weight")
