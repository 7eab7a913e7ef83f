"""GGUF in, GGUF out: whole files as ``llama-quantize`` writes them, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from eval.llamacpp_tools import find_tool
from exports.gguf_layout import TYPES
from exports.gguf_mix import FILE_TYPES
from exports.gguf_quantize import Options, main, quantize_file
from exports.gguf_throughput import TensorReport, copy_rate, describe
from exports.gguf_types import SLICE, quantize
from quantize.demo_model import demo_model
from quantize.errors import InputError
from quantize.files import sha256_file
from quantize.gguf_reader import GgufReader

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "gguf_tiny.gguf"
HASHES: dict[str, str] = json.loads((GOLDEN / "gguf_tiny.json").read_text())
QUANTIZE = find_tool("llama-quantize")


def arguments(options: str, target: Path) -> list[str]:
    """``llama-quantize``'s options, which stand before the files, the type behind them."""
    *rest, kind = options.split()
    return [*rest, str(TINY), str(target), kind]


@pytest.mark.parametrize("options", HASHES)
def test_whole_files_are_those_of_llama_quantize(options: str, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    assert main(arguments(options, target)) == 0
    assert sha256_file(target) == HASHES[options]
    assert listing(tmp_path) == ["out.gguf"]


def make(path: Path, tensors: dict[str, Any], raw: dict[str, str] | None = None, **fields: int) -> Path:
    """A GGUF file; ``raw`` names the type of tensors that are given as bytes of blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(2)
    for key, value in fields.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType[raw[name]] if raw and name in raw else None
        writer.add_tensor(name, values, raw_dtype=kind)
    close(writer)
    return path


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights(*shape: int, dtype: Any = np.float16) -> Any:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * 0.1).astype(dtype)


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_source_type_becomes_every_type(source: str, kind: str, tmp_path: Path) -> None:
    values = weights(6, 512, dtype=np.float32)
    stored = quantize(values, source)
    held = gguf.dequantize(stored, gguf.GGMLQuantizationType[source])
    path = make(tmp_path / "in.gguf", {"blk.0.attn_q.weight": stored}, {"blk.0.attn_q.weight": source})
    quantize_file(path, tmp_path / "out.gguf", Options({"Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}.get(kind, kind), pure=True))
    reader = GgufReader(tmp_path / "out.gguf")
    assert reader.tensors["blk.0.attn_q.weight"].kind == kind
    assert np.array_equal(reader.data("blk.0.attn_q.weight"), quantize(held, kind))


def test_tensors_larger_than_a_piece_are_put_together(tmp_path: Path) -> None:
    rows = 9 * SLICE // 256 + 1
    path = make(tmp_path / "in.gguf", {"blk.0.ffn_up.weight": weights(rows, 256), "blk.0.ffn_norm.weight": weights(70000)})
    reports = quantize_file(path, tmp_path / "out.gguf", Options("Q5_1", threads=3))
    reader = GgufReader(tmp_path / "out.gguf")
    assert np.array_equal(reader.data("blk.0.ffn_up.weight"), quantize(weights(rows, 256).astype(np.float32), "Q5_1"))
    assert np.array_equal(reader.data("blk.0.ffn_norm.weight").view(np.float16), weights(70000))
    assert {one.name: one.moved for one in reports} == {
        "blk.0.ffn_up.weight": rows * (512 + 8 * 24),
        "blk.0.ffn_norm.weight": 4 * 70000,
    }


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = make(tmp_path / "in.gguf", {f"blk.0.ffn_up{i}.weight": weights(4096, 1024) for i in range(4)})
    quantize_file(TINY, tmp_path / "warm.gguf", Options("Q4_0", threads=2))
    tracemalloc.start()
    quantize_file(path, tmp_path / "out.gguf", Options("Q4_0", threads=2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Two threads with buffers for 2**18 weights in 16 and 4 bits, and a few float32 arrays of 2**16.
    assert peak < 8e6
    assert path.stat().st_size > 30e6


def test_experts_and_what_has_no_blocks_of_ours(tmp_path: Path) -> None:
    """Three-dimensional tensors are quantized; tensors of types unknown here are copied where they need not change."""
    foreign = np.arange(2 * 82, dtype=np.uint8).reshape(2, 82)
    tensors = {
        "blk.0.ffn_down_exps.weight": weights(4, 3, 64),
        "blk.0.ffn_gate_tid2eid.weight": np.arange(64, dtype=np.int32).reshape(2, 32),
        "blk.0.altup.weight": foreign,
    }
    path = make(tmp_path / "in.gguf", tensors, {"blk.0.altup.weight": "IQ2_S"}, llama__expert_count=4)
    quantize_file(path, tmp_path / "out.gguf", Options("Q4_0"))
    reader = GgufReader(tmp_path / "out.gguf")
    assert {name: info.kind for name, info in reader.tensors.items()} == {
        "blk.0.altup.weight": "IQ2_S",
        "blk.0.ffn_down_exps.weight": "Q4_0",
        "blk.0.ffn_gate_tid2eid.weight": "I32",
    }
    assert reader.tensors["blk.0.ffn_down_exps.weight"].shape == (4, 3, 64)
    assert np.array_equal(reader.data("blk.0.altup.weight"), foreign)
    assert np.array_equal(reader.data("blk.0.ffn_gate_tid2eid.weight").view(np.int32), tensors["blk.0.ffn_gate_tid2eid.weight"])


def test_other_alignments_stay(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_block_count(1)
    for name in ("a.weight", "b.weight"):
        writer.add_tensor(name, weights(3, 32))
    close(writer)
    quantize_file(tmp_path / "in.gguf", tmp_path / "out.gguf", Options("Q4_0"))
    found = gguf.GGUFReader(tmp_path / "out.gguf")
    assert found.alignment == 64
    assert [tensor.data_offset % 64 for tensor in found.tensors] == [0, 0]
    assert np.array_equal(found.tensors[1].data, quantize(weights(3, 32).astype(np.float32), "Q4_0"))


@pytest.mark.parametrize(
    ("tensors", "fields", "options", "message"),
    [
        (
            {"a.weight": np.full((1, 64), np.nan, np.float32).repeat(2, 0)},
            {},
            {},
            "a.weight cannot become Q4_0: values are not fin",
        ),
        ({"a.weight": np.full((2, 64), 1e9, np.float32)}, {}, {}, "a.weight cannot become Q4_0: .*65504"),
        ({"a.norm": np.full(8, np.inf, np.float32)}, {}, {}, "a.norm cannot become F32: values are not finite"),
        ({"a.weight": weights(2, 64)}, {"split__count": 3}, {}, "one of several parts; join them first"),
        ({"token_embd.weight": weights(2, 64)}, {}, {"embedding": "Q6_K"}, "token_embd.weight has rows of 64 weights"),
        ({"a.weight": weights(2, 64)}, {}, {"file_type": "IQ4_XS"}, "no GGUF file type 'IQ4_XS'"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    tensors: dict[str, Any], fields: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "in.gguf", tensors, **fields)
    with pytest.raises(InputError, match=message):
        quantize_file(path, tmp_path / "out.gguf", Options(**({"file_type": "Q4_0"} | options)))
    assert listing(tmp_path) == ["in.gguf"]


def test_metadata_that_is_no_number_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_string("llama.block_count", "many")
    writer.add_tensor("a.weight", weights(2, 64))
    close(writer)
    with pytest.raises(InputError, match=r"llama\.block_count is 'many'; it must be an integer like 32"):
        quantize_file(tmp_path / "in.gguf", tmp_path / "out.gguf", Options("Q4_0"))


def test_quantized_files_are_not_quantized_again(tmp_path: Path) -> None:
    quantize_file(TINY, tmp_path / "q8.gguf", Options("Q8_0"))
    with pytest.raises(InputError, match=r"blk\.0\..* is Q8_0 already"):
        quantize_file(tmp_path / "q8.gguf", tmp_path / "q4.gguf", Options("Q4_0"))
    quantize_file(tmp_path / "q8.gguf", tmp_path / "again.gguf", Options("Q8_0"))
    assert sha256_file(tmp_path / "again.gguf") == sha256_file(tmp_path / "q8.gguf")


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    path = make(tmp_path / "in.gguf", {"a.weight": weights(2, 64)})
    (tmp_path / "link.gguf").symlink_to(path)
    before = sha256_file(path)
    with pytest.raises(InputError, match="the input as well"):
        quantize_file(path, tmp_path / "link.gguf", Options("Q4_0"))
    assert sha256_file(path) == before


def test_a_failing_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert main([str(TINY), str(tmp_path / "out.gguf"), "Q4_0"]) == 2
    assert re.fullmatch(r"error: cannot write .*out.gguf: the disk is full.*\n", capsys.readouterr().err)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: "absent.gguf"}, "absent.gguf cannot be read"),
        ({2: "Q9"}, "no GGUF file type 'Q9'"),
        ({3: "--threads=0"}, "--threads is 0; at least 1"),
    ],
)
def test_bad_arguments_are_one_line(
    changed: dict[int, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [changed.get(i, value) for i, value in enumerate([str(TINY), str(tmp_path / "out.gguf"), "Q4_0", "--threads=1"])]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_names_may_be_short_and_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(TINY), str(tmp_path / "out.gguf"), "q4_k", "--verbose", "--threads", "1"]) == 0
    assert sha256_file(tmp_path / "out.gguf") == HASHES["Q4_K_M"]
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"copying memory: \d+\.\d GB/s", lines[0])
    assert sum("of copying" in line for line in lines) == len(GgufReader(TINY).tensors)
    assert "bits a weight" in lines[-1]


def test_throughput_is_a_share_of_copying() -> None:
    report = TensorReport("blk.0.attn_q.weight", "F16", "Q4_0", 1_000_000_000, moved=3_000_000_000, seconds=2.0)
    line = describe([report], 6e9).splitlines()[1]
    assert line.startswith("blk.0.attn_q.weight ")
    assert line.endswith(" 2000.00 ms   1.50 GB/s  25.0% of copying")
    assert copy_rate(1) > 1e8


@pytest.fixture(scope="module")
def demo_f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's tensors under GGUF names; nothing else of it matters here."""
    roles = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    path = tmp_path_factory.mktemp("demo") / "f16.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 30),
        (writer.add_context_length, 8192),
        (writer.add_embedding_length, 576),
        (writer.add_feed_forward_length, 1536),
        (writer.add_head_count, 9),
        (writer.add_head_count_kv, 3),
        (writer.add_file_type, 1),
    ):
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, values in load_file(demo_model() / "model.safetensors").items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        renamed = f"blk.{found[1]}.{roles[found[2]]}.weight" if found else names[name]
        writer.add_tensor(renamed, values.astype(np.float32) if values.ndim == 1 else values)
    close(writer)
    return path


@pytest.mark.slow
@pytest.mark.skipif(QUANTIZE is None, reason="llama-quantize is not there: run `make llamacpp`")
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_the_demo_model_is_that_of_llama_quantize(kind: str, demo_f16: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert main([str(demo_f16), str(ours), kind]) == 0
    assert QUANTIZE is not None
    subprocess.run([QUANTIZE, demo_f16, theirs, kind], check=True, capture_output=True)
    mine, found = GgufReader(ours), GgufReader(theirs)
    different = [name for name in found.tensors if not np.array_equal(mine.data(name), found.data(name))]
    assert different == []
    assert sha256_file(ours) == sha256_file(theirs)
