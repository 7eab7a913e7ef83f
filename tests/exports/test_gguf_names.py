"""Each family's tensors in GGUF files: in their places, and as transformers and llama.cpp compute with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from eval.consumers.llamacpp_server import generate
from eval.llamacpp_tools import find_tool
from exports.gguf_convert import convert
from exports.gguf_names import TensorMap, rope_tensors
from quantize.checkpoint import open_checkpoint
from quantize.demo_model import demo_model
from quantize.errors import InputError

LAYERS, HEADS, KV_HEADS = 2, 4, 2
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # Large enough for the blocks to outweigh the embedding: else a tied head only repeats the last token.
    "initializer_range": 0.3,
}
GPT2 = {
    "vocab_size": 300,
    "n_embd": 64,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.01 * i for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
}
GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
# Their blocks' outputs are normalized, so here it is the embedding that has to be small.
SMALL = {"initializer_range": 0.02}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-tied-biased": lambda: transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=32
    ),
    "llama3": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3)),
    "llama-linear": lambda: transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    ),
    "llama-yarn": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=dict(YARN)),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-yarn": lambda: transformers.Qwen2Config(**SIZES, rope_parameters={**YARN, "attention_factor": 1.5}),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, **GEMMA),
    "gemma2": lambda: transformers.Gemma2Config(**{**SIZES, **SMALL}, **GEMMA, query_pre_attn_scalar=32, sliding_window=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**SIZES, **SMALL, "num_hidden_layers": 7}, **GEMMA, query_pre_attn_scalar=32, sliding_window=16
    ),
    "gemma3-pattern": lambda: transformers.Gemma3TextConfig(
        **{**SIZES, **SMALL},
        **GEMMA,
        query_pre_attn_scalar=32,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    # The frequencies for short and for long texts: a continuation of 40 tokens is beyond 32, and far within 512.
    "phi3-longrope": lambda: transformers.Phi3Config(
        **SIZES, original_max_position_embeddings=32, rope_parameters=dict(LONGROPE)
    ),
    "phi3-longrope-short": lambda: transformers.Phi3Config(
        **{**SIZES, "max_position_embeddings": 2048}, original_max_position_embeddings=512, rope_parameters=dict(LONGROPE)
    ),
    "phi": lambda: transformers.PhiConfig(**{**SIZES, "num_key_value_heads": HEADS}),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
}
# Written out by hand: the names of the two worlds, {} is the block.
LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
GEMMA2_NAMES = {
    **LLAMA_NAMES,
    "model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
    "model.layers.{}.pre_feedforward_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.post_feedforward_layernorm": "blk.{}.post_ffw_norm",
}
NAMES = {
    "gemma2": GEMMA2_NAMES,
    "gemma3": GEMMA2_NAMES,
    "phi3": {
        **LLAMA_NAMES,
        "model.layers.{}.self_attn.qkv_proj": "blk.{}.attn_qkv",
        "model.layers.{}.mlp.gate_up_proj": "blk.{}.ffn_up",
    },
    "phi2": {
        "model.embed_tokens": "token_embd",
        "model.final_layernorm": "output_norm",
        "lm_head": "output",
        "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
        "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
        "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
        "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
        "model.layers.{}.self_attn.dense": "blk.{}.attn_output",
        "model.layers.{}.mlp.fc1": "blk.{}.ffn_up",
        "model.layers.{}.mlp.fc2": "blk.{}.ffn_down",
    },
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "transformer.h.{}.ln_1": "blk.{}.attn_norm",
        "transformer.h.{}.ln_2": "blk.{}.ffn_norm",
        "transformer.h.{}.attn.c_attn": "blk.{}.attn_qkv",
        "transformer.h.{}.attn.c_proj": "blk.{}.attn_output",
        "transformer.h.{}.mlp.c_fc": "blk.{}.ffn_up",
        "transformer.h.{}.mlp.c_proj": "blk.{}.ffn_down",
    },
}
LONG_AND_SHORT = {"rope_factors_long.weight", "rope_factors_short.weight"}
COMPUTED = {"llama3": {"rope_freqs.weight"}, "phi3-longrope": LONG_AND_SHORT, "phi3-longrope-short": LONG_AND_SHORT}
# transformers reads these architectures from GGUF. For some it takes its own defaults instead of the file's keys (head widths,
# biases, attention scales, positions): they are given the configuration, and only the tensors come from the file.
READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "phi3")
READ_BUT_FOR_KEYS = ("llama-tied-biased", "qwen3", "gemma2", "gemma3", "gpt2")

Family = tuple[str, Path, Path]


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path], tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], tuple[Path, Path]]:
    """``tiny(name)``: directory of the tiny checkpoint of that name, and its GGUF file in F32. Read them only."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            path = tmp_path_factory.mktemp("gguf") / name
            make_checkpoint(path, CONFIGS[name](), dtype=torch.float32)
            tiny_tokenizer.save_pretrained(path)
            convert(path, path / "model.gguf", "F32", name="tiny")
            made[name] = path, path / "model.gguf"
        return made[name]

    return make


def expected_values(architecture: str, name: str, weight: NDArray[Any]) -> NDArray[Any]:
    """What the file must hold, by arithmetic of this test's own."""
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = HEADS if ".q_proj." in name else KV_HEADS
        half = len(weight) // heads // 2
        rows = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in range(2)]
        return weight[rows]
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    if architecture == "gpt2" and ".c_" in name and weight.ndim == 2:
        return weight.T
    return weight


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_in_its_place(tiny: Callable[[str], tuple[Path, Path]], name: str) -> None:
    path, file = tiny(name)
    reader = gguf.GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    stored = load_file(path / "model.safetensors")
    found = {tensor.name: tensor for tensor in reader.tensors}
    layers = json.loads((path / "config.json").read_text()).get("num_hidden_layers", LAYERS)
    named = set(COMPUTED.get(name, ()))
    for ours, theirs in NAMES.get(architecture, LLAMA_NAMES).items():
        for block in range(layers if "{}" in ours else 1):
            for suffix in (".weight", ".bias"):
                key = ours.format(block) + suffix
                if key not in stored:
                    continue
                tensor = found[theirs.format(block) + suffix]
                named.add(tensor.name)
                assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
                np.testing.assert_array_equal(tensor.data, expected_values(architecture, key, stored.pop(key).numpy()), key)
    assert not stored
    assert named == set(found)


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS + READ_BUT_FOR_KEYS)
def test_transformers_computes_the_same(tiny: Callable[[str], tuple[Path, Path]], name: str) -> None:
    path, file = tiny(name)
    read: dict[str, Any] = {"gguf_file": file.name}
    if name in READ_BUT_FOR_KEYS:
        read["config"] = AutoConfig.from_pretrained(path)
    ids = torch.arange(2, 50)[None] * 5 % 300
    logits = []
    for options in ({}, read):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert logits[0].std() > 0.05
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def needs(name: str) -> None:
    if find_tool(name) is None:
        pytest.skip(f"needs llama.cpp's {name}: `make llamacpp`")


def greedy(path: Path, ids: list[int], count: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """The continuation that transformers finds likeliest, token by token; up to the end of the text."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.no_grad():
        grown = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, use_cache=True)
    return [int(token) for token in grown[0, len(ids) :]]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_continues_alike(tiny: Callable[[str], tuple[Path, Path]], name: str) -> None:
    needs("llama-server")
    path, file = tiny(name)
    ids = [(7 * place + 3) % 298 + 2 for place in range(40)]
    ours = greedy(path, ids, 24)
    assert len(set(ours)) > 1
    theirs = list(generate(file, ids, 24).ids)
    assert theirs == ours


@pytest.mark.slow
def test_llama_cpp_continues_the_demo_model_alike(tmp_path: Path) -> None:
    needs("llama-server")
    path = demo_model()
    file = tmp_path / "demo.gguf"
    assert convert(path, file) == "F16"
    tokenizer = open_checkpoint(str(path)).tokenizer()
    ids = tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]
    assert list(generate(file, ids, 64).ids) == greedy(path, ids, 64)


def test_row_order_is_a_permutation_of_whole_heads() -> None:
    tensors = TensorMap(CONFIGS["llama"]().to_dict())
    order = tensors.row_order("model.layers.0.self_attn.q_proj.weight", 64)
    assert order is not None
    assert sorted(order) == list(range(64))
    assert order[:4].tolist() == [0, 8, 1, 9]
    assert order[16:18].tolist() == [16, 24]
    assert tensors.row_order("model.layers.0.self_attn.v_proj.weight", 32) is None
    assert TensorMap(CONFIGS["qwen2"]().to_dict()).row_order("model.layers.0.self_attn.q_proj.weight", 64) is None
    with pytest.raises(InputError, match=r"has 60 rows, which are no 4 heads of even width"):
        tensors.row_order("model.layers.0.self_attn.q_proj.weight", 60)


@pytest.mark.parametrize("name", CONFIGS)
def test_quantizable_are_the_linear_layers(name: str) -> None:
    config = CONFIGS[name]()
    tensors = TensorMap(config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if config.tie_word_embeddings:
        linear.discard("lm_head.weight")
    stored = [key for key in model.state_dict() if tensors.name(key) is not None]
    assert {key for key in stored if tensors.quantizable(key)} == linear


def test_what_is_not_stored_and_what_is_unknown() -> None:
    llama, gpt2 = TensorMap(CONFIGS["llama"]().to_dict()), TensorMap(CONFIGS["gpt2"]().to_dict())
    assert llama.name("model.layers.1.self_attn.rotary_emb.inv_freq") is None
    assert llama.name("lm_head.weight") == "output.weight"
    assert TensorMap(CONFIGS["qwen2"]().to_dict()).name("lm_head.weight") is None
    assert gpt2.name("h.1.attn.bias") is None
    # Published GPT-2 checkpoints lack the prefix that transformers writes.
    assert gpt2.name("h.1.attn.c_attn.bias") == "blk.1.attn_qkv.bias"
    with pytest.raises(InputError, match=r"tensor model\.layers\.9\.self_attn\.q_proj\.weight has no place"):
        llama.name("model.layers.9.self_attn.q_proj.weight")
    with pytest.raises(InputError, match=r"o_proj\.bias has no place in llama\.cpp's qwen2 architecture"):
        TensorMap(CONFIGS["qwen2"]().to_dict()).name("model.layers.0.self_attn.o_proj.bias")
    gemma = TensorMap({"model_type": "gemma3", "text_config": CONFIGS["gemma3"]().to_dict()})
    assert gemma.architecture == "gemma3"
    assert gemma.name("model.vision_tower.encoder.weight") is None
    for prefix in ("model.language_model.", "language_model.model."):
        assert gemma.name(f"{prefix}layers.0.mlp.up_proj.weight") == "blk.0.ffn_up.weight"


def test_llama3_divisors_are_those_of_transformers() -> None:
    config = transformers.LlamaConfig(**{**SIZES, "hidden_size": 256}, rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    frequencies, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(32) / 32)
    divisors = rope_tensors(config.to_dict())["rope_freqs.weight"]
    assert divisors.dtype == np.float32
    assert divisors[0] == 1
    assert divisors[-1] == 8
    assert np.count_nonzero((divisors > 1) & (divisors < 8)) > 2
    np.testing.assert_allclose(plain / divisors, frequencies.numpy(), rtol=1e-5)
