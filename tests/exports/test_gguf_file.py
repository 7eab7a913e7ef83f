"""Writing GGUF files: types, bytes, refusals, the command, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from exports.gguf_convert import _bfloat16, _converted, convert, main
from exports.gguf_file import GgufTensor, write_gguf
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=32, query_pre_attn_scalar=32),
    "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=256),
}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama as GGUF in F32. Read it only."""
    file: Path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    convert(tiny_llama, file, "F32", name="tiny")
    return file


@pytest.mark.parametrize(("kind", "file_type"), [("F16", 1), ("BF16", 32), ("F32", 0), ("auto", 1)])
def test_types_of_tensors(tmp_path: Path, tiny_llama: Path, kind: str, file_type: int) -> None:
    file = tmp_path / "tiny.gguf"
    chosen = convert(tiny_llama, file, kind)
    reader = gguf.GGUFReader(file)
    assert chosen == ("F16" if kind == "auto" else kind)
    assert reader.fields["general.file_type"].contents() == file_type
    stored = load_file(tiny_llama / "model.safetensors")
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == ("F32" if len(tensor.shape) == 1 else chosen)
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    values = gguf.dequantize(embedding.data, embedding.tensor_type)
    original = stored["model.embed_tokens.weight"].to({"BF16": torch.bfloat16}.get(chosen, torch.float16)).float()
    np.testing.assert_array_equal(values, original.numpy())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bfloat16_checkpoints_lose_nothing(
    tmp_path: Path, make_checkpoint: Callable[..., Path], tiny_tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    path = make_checkpoint(tmp_path / name, CONFIGS[name], dtype=torch.bfloat16)
    tiny_tokenizer.save_pretrained(path)
    assert convert(path, tmp_path / "a.gguf") == "BF16"
    convert(path, tmp_path / "b.gguf", "F32")
    files = [gguf.GGUFReader(tmp_path / each) for each in ("a.gguf", "b.gguf")]
    stored = {key: value.float().numpy() for key, value in load_file(path / "model.safetensors").items()}
    for first, second in zip(files[0].tensors, files[1].tensors, strict=True):
        np.testing.assert_array_equal(gguf.dequantize(first.data, first.tensor_type), second.data)
    last = next(value for key, value in stored.items() if key.endswith(("model.norm.weight", "ln_f.weight")))
    norm = next(tensor for tensor in files[1].tensors if tensor.name == "output_norm.weight")
    np.testing.assert_array_equal(norm.data, last + np.float32(name == "gemma2"))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_bfloat16_rounds_as_torch(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    ours = torch.from_numpy(_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(ours, torch.from_numpy(values).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_what_float16_cannot_hold_is_refused() -> None:
    values = np.array([[1.0, 70000.0]], np.float32)
    with pytest.raises(InputError, match=r"up_proj holds 70000, beyond float16's 65504; give --type BF16"):
        list(_converted(values, False, "F16", "up_proj"))
    kept = list(_converted(np.array([[np.inf, -2.5]], np.float32), False, "F16", "up_proj"))
    assert [part.tolist() for part in kept] == [[[np.inf, -2.5]]]


def test_bytes_are_the_same_each_time(tmp_path: Path, tiny_llama: Path) -> None:
    for name, source in (("a.gguf", tiny_llama), ("b.gguf", open_checkpoint(str(tiny_llama)))):
        convert(source, tmp_path / name, name="tiny")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_sharded_checkpoints_give_the_same_file(
    tmp_path: Path, make_checkpoint: Callable[..., Path], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for name, options in (("one", {}), ("many", {"max_shard_size": "50KB"})):
        make_checkpoint(tmp_path / name, CONFIGS["llama"], **options)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}.gguf", name="tiny")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def tensors_of(file: Path) -> list[GgufTensor]:
    reader = gguf.GGUFReader(file)
    return [
        GgufTensor(each.name, each.tensor_type.name, tuple(each.shape[::-1].tolist()), partial(np.asarray, each.data))
        for each in reader.tensors
    ]


def test_quantized_tensors_are_stored_as_given(tmp_path: Path, tiny_llama: Path, tiny_file: Path) -> None:
    path, file = tiny_llama, tiny_file
    q8 = gguf.GGMLQuantizationType.Q8_0
    tensors, expected = [], {}
    for tensor in tensors_of(file):
        if len(tensor.shape) == 1:
            tensors.append(tensor)
            continue
        expected[tensor.name] = gguf.quantize(tensor.data(), q8)
        tensors.append(GgufTensor(tensor.name, "Q8_0", tensor.shape, partial(expected.__getitem__, tensor.name)))
    config = json.loads((path / "config.json").read_text())
    extra: dict[str, Any] = {"quantize.imatrix.file": "a", "quantize.groups": [1, 2], "quantize.damp": 0.5, "quantize.on": True}
    write_gguf(tmp_path / "q.gguf", config=config, tokenizer_dir=path, tensors=tensors, file_type=7, name="tiny", extra=extra)
    reader = gguf.GGUFReader(tmp_path / "q.gguf")
    for stored in reader.tensors:
        if stored.name in expected:
            assert stored.tensor_type == q8
            np.testing.assert_array_equal(stored.data, expected[stored.name])
    assert {key: reader.fields[key].contents() for key in extra} == extra
    assert reader.fields["general.file_type"].contents() == 7


def test_wrong_tensors_are_refused(tmp_path: Path, tiny_llama: Path, tiny_file: Path) -> None:
    path, file = tiny_llama, tiny_file
    config = json.loads((path / "config.json").read_text())

    def write(tensors: list[GgufTensor]) -> None:
        write_gguf(tmp_path / "x.gguf", config=config, tokenizer_dir=path, tensors=tensors, file_type=0)

    whole = tensors_of(file)
    with pytest.raises(InputError, match=r"no tensor token_embd\.weight"):
        write([each for each in whole if each.name != "token_embd.weight"])
    with pytest.raises(InputError, match=r"type 'Q4_9' is none of GGUF's"):
        write([GgufTensor(whole[0].name, "Q4_9", whole[0].shape, whole[0].data), *whole[1:]])
    with pytest.raises(InputError, match=r"rows of 64 values cannot be Q4_K, whose blocks hold 256"):
        write([GgufTensor(whole[0].name, "Q4_K", whole[0].shape, whole[0].data), *whole[1:]])
    with pytest.raises(ValueError, match=r"token_embd\.weight: 12 bytes; announced were 76800 of F32"):
        write([GgufTensor(whole[0].name, "F32", whole[0].shape, lambda: np.zeros(3, np.float32)), *whole[1:]])
    with pytest.raises(ValueError, match=r"float64 instead of float32"):
        write([GgufTensor(whole[0].name, "F32", whole[0].shape, lambda: np.zeros(3)), *whole[1:]])
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_llama), str(tmp_path / "a.gguf"), "--type", "BF16", "--name", "Tiny"]) == 0
    assert "BF16" in capsys.readouterr().out
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["general.name"].contents() == "Tiny"
    assert main([str(tmp_path), str(tmp_path / "b.gguf")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "config.json" in error
    with pytest.raises(InputError, match=r"type 'Q4_0' is none of F32, F16, BF16, auto"):
        convert(tiny_llama, tmp_path / "c.gguf", "Q4_0")
    with pytest.raises(InputError, match=r"a\.gguf is no directory"):
        convert(open_checkpoint(str(tmp_path / "a.gguf")), tmp_path / "c.gguf")


@pytest.mark.slow
def test_memory_stays_below_a_gibibyte(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A checkpoint of 2 GB in four files, bfloat16, written as F16: the conversion that copies most."""
    config = transformers.LlamaConfig(
        **{**SIZES, "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 14},
        architectures=["LlamaForCausalLM"],
    )
    source = tmp_path / "big"
    config.save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    total = sum(shape.numel() for shape in shapes.values()) * 2
    assert total > 1.9e9
    weight_map: dict[str, str] = {}
    for number in range(4):
        part = list(shapes)[number::4]
        values = {name: torch.full(shapes[name], 0.01, dtype=torch.bfloat16) for name in part}
        save_file(values, source / f"model-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    script = (
        # Not getrusage: a child inherits its parent's peak.
        "import sys; from exports.gguf_convert import main; from quantize.manifest import peak_rss_bytes, reset_peak_rss\n"
        "reset_peak_rss(); code = main(sys.argv[1:]); print(peak_rss_bytes(), code)"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "big.gguf"), "--type", "F16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], env=os.environ)
    peak, code = map(int, done.stdout.split("\n")[-2].split())
    assert code == 0
    assert (tmp_path / "big.gguf").stat().st_size > total * 0.99
    assert peak < 2**30, f"{peak / 2**20:.0f} MiB"
