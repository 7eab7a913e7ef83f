"""Makes the golden files of the GGUF tests with llama.cpp's own code: ``python tests/golden/make_gguf_golden.py``.

Needs ``make llamacpp`` (or ``$QUANTIZE_LLAMACPP``). It writes, beside itself:

- ``gguf_blocks.npz``: adversarial weights and their blocks by ``ggml_quantize_chunk`` of libggml-base, through ctypes;
- ``gguf_tiny.gguf``: a few small tensors under the names of a Llama model with four layers;
- ``gguf_tiny.json``: sha256 of the files that ``llama-quantize`` makes of it, by command line options;
- ``gguf_mixes.json``: types that ``llama-quantize --dry-run`` chooses for models of other shapes.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[2]))

from eval.llamacpp_tools import find_library, tool
from exports.gguf_layout import TYPES
from exports.gguf_mix import FILE_TYPES
from quantize.files import sha256_file, write_json

HERE = Path(__file__).parent
Floats = npt.NDArray[np.float32]

TINY_OPTIONS = [
    *([kind] for kind in FILE_TYPES),
    ["--pure", "Q4_0"],
    ["--pure", "Q4_K_S"],
    ["--token-embedding-type", "q8_0", "Q4_K_M"],
    ["--output-tensor-type", "q5_1", "Q4_0"],
    ["--output-tensor-type", "f16", "--token-embedding-type", "q4_0", "Q8_0"],
]

# Architecture, layers, heads, heads of keys and values, experts, whether there is an output matrix, columns.
MODELS: list[dict[str, Any]] = [
    {"architecture": "llama", "layers": 32, "heads": 32, "kv_heads": 8, "experts": 0, "tied": False, "columns": 256},
    {"architecture": "llama", "layers": 30, "heads": 9, "kv_heads": 3, "experts": 0, "tied": True, "columns": 576},
    {"architecture": "llama", "layers": 80, "heads": 64, "kv_heads": 8, "experts": 0, "tied": False, "columns": 256},
    {"architecture": "llama", "layers": 16, "heads": 32, "kv_heads": 8, "experts": 8, "tied": False, "columns": 256},
    {"architecture": "qwen2", "layers": 24, "heads": 14, "kv_heads": 2, "experts": 0, "tied": True, "columns": 896},
    {"architecture": "qwen2", "layers": 7, "heads": 4, "kv_heads": 2, "experts": 0, "tied": False, "columns": 48},
    {"architecture": "falcon", "layers": 32, "heads": 71, "kv_heads": 1, "experts": 0, "tied": False, "columns": 256},
]


def adversarial_blocks() -> Floats:
    """float32 ``[n, 256]``: what rounding gets wrong if anything."""
    rng = np.random.default_rng(20240717)
    normal = rng.standard_normal((16, 256)).astype(np.float32)
    step = np.arange(256, dtype=np.float32)
    rows: list[npt.NDArray[Any]] = [
        np.zeros(256),
        np.full(256, -0.0),
        np.where(step % 2 == 0, 0.0, -0.0),
        np.full(256, 0.3),
        np.full(256, -0.3),
        np.where(step % 2 == 0, 1.0, -1.0),
        np.where(step % 2 == 0, -1.0, 1.0),
        np.where(step == 77, -5.0, 0.0),
        np.where(step == 77, 5.0, normal[0] * 0.01),
        np.full(256, 1e-41) * np.sign(normal[1]),
        normal[1] * 1e-39,
        normal[2] * 1e-30,
        normal[3] * 1e-15,
        normal[3] * 3e-8,
        normal[4] * 1e-6,
        # Each group of 32 is ten times smaller: scales of groups are rounded away.
        normal[5] * np.power(10.0, -(step // 32)),
        normal[5] * np.power(10.0, -(step // 16)),
        normal[6] * np.power(4.0, step // 32 - 4),
        # Halves of steps, where rounding directions differ.
        (step % 16 - 8) / 16 + 1 / 32,
        (step % 32 - 16) / 32,
        (step % 255 - 127) / 2,
        np.where(step % 32 == 0, 127.0, (step % 32) + 0.5),
        np.where(step % 32 == 0, -8.0, (step % 15) - 7.5),
        step / 256 + 1,
        -step / 256 - 1,
        np.nextafter(np.float32(-1), np.float32(0)) - (step % 3 == 0) * np.float32(1e-7),
        1 + (step % 3 == 0) * 1e-7,
        normal[7] + 10,
        normal[8] - 10,
        np.abs(normal[9]),
        -np.abs(normal[9]),
        np.sinh(normal[10] * 4),
        normal[11] * 3e5,
        normal[12].astype(np.float16),
        np.round(normal[13] * 8) / 64,
        (normal[14] * 0.02).astype(np.float16),
        np.where(np.abs(normal[15]) < 1, 0.0, normal[15]),
    ]
    special = np.stack([np.asarray(row, np.float32) for row in rows])
    return np.concatenate((special, (rng.standard_normal((59, 256)) * 0.04).astype(np.float16).astype(np.float32)))


def ggml_quantize(library: ctypes.CDLL, values: Floats, kind: str) -> npt.NDArray[np.uint8]:
    """float32 ``[rows, cols]`` to uint8 ``[rows, row_bytes]``, without an importance matrix."""
    rows, columns = values.shape
    out = np.empty((rows, TYPES[kind].row_bytes(columns)), np.uint8)
    values = np.ascontiguousarray(values)
    arguments = (TYPES[kind].ggml_type, values.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p))
    size = library.ggml_quantize_chunk(*arguments, *(ctypes.c_int64(n) for n in (0, rows, columns)), None)
    assert size == out.nbytes
    return out


def load_ggml() -> ctypes.CDLL:
    """libggml-base."""
    path = find_library("ggml-base")
    if path is None:
        raise SystemExit("libggml-base is not there: run `make llamacpp`")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def write_tiny(path: Path) -> None:
    """Four layers of matrices whose rows are whole blocks of 256, whole blocks of 32, or neither."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    write_metadata(writer, MODELS[1] | {"layers": 4, "heads": 4, "kv_heads": 2})
    writer.add_file_type(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{i}" for i in range(40)])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)

    def add(name: str, *shape: int, dtype: Any = np.float16) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape) * 0.05).astype(dtype))

    add("token_embd.weight", 40, 64)
    add("output_norm.weight", 64, dtype=np.float32)
    for layer in range(4):
        add(f"blk.{layer}.attn_norm.weight", 64, dtype=np.float32)
        for name, shape in (("attn_q", (4, 256)), ("attn_k", (2, 256)), ("attn_v", (2, 256)), ("attn_output", (4, 96))):
            add(f"blk.{layer}.{name}.weight", *shape)
        for name, shape in (("ffn_gate", (3, 64)), ("ffn_up", (1, 64)), ("ffn_down", (5, 512))):
            add(f"blk.{layer}.{name}.weight", *shape)
    close(writer)


def write_metadata(writer: gguf.GGUFWriter, model: dict[str, Any]) -> None:
    """The keys that llama.cpp needs to read the sizes of a model."""
    writer.add_block_count(model["layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(64 * model["heads"])
    writer.add_feed_forward_length(128)
    writer.add_head_count(model["heads"])
    writer.add_head_count_kv(model["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(64)
    if model["experts"]:
        writer.add_expert_count(model["experts"])
        writer.add_expert_used_count(2)


def model_tensors(model: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names of a model's tensors; rows of 2 everywhere, since only columns count."""
    columns, experts = model["columns"], model["experts"]
    tensors: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (2, columns)), ("output_norm.weight", (columns,))]
    if not model["tied"]:
        tensors.append(("output.weight", (2, columns)))
    for layer in range(model["layers"]):
        block = f"blk.{layer}"
        attention = ("attn_qkv",) if model["architecture"] == "falcon" else ("attn_q", "attn_k", "attn_v")
        tensors += [(f"{block}.{name}.weight", (2, columns)) for name in (*attention, "attn_output")]
        tensors.append((f"{block}.attn_norm.weight", (columns,)))
        shape = (experts, 2, columns) if experts else (2, columns)
        end = "_exps.weight" if experts else ".weight"
        tensors += [(f"{block}.{name}{end}", shape) for name in ("ffn_gate", "ffn_up", "ffn_down")]
        if experts:
            tensors.append((f"{block}.ffn_gate_inp.weight", (experts, columns)))
    return tensors


def close(writer: gguf.GGUFWriter) -> None:
    """Write everything."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_quantize(*arguments: str) -> str:
    """Output of ``llama-quantize``."""
    return subprocess.run([tool("llama-quantize"), *arguments], check=True, capture_output=True, text=True).stderr


def dry_types(model: dict[str, Any], folder: Path) -> dict[str, dict[str, str]]:
    """By file type and name without layer: the types of all layers, or the one type that all have."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, model["architecture"])
    write_metadata(writer, model)
    for name, shape in model_tensors(model):
        dense = len(shape) == 1 or "gate_inp" in name
        writer.add_tensor(name, np.zeros(shape, np.float32 if dense else np.float16))
    close(writer)
    found = {}
    for kind in FILE_TYPES:
        output = run_quantize("--dry-run", str(path), kind)
        lines = re.findall(r"\] +(\S+) +- \[.*?\], type = +(\w+), size = +\S+ MiB(?: -> +\S+ MiB \((\w+)\))?", output)
        types = {name: (after or before).upper() for name, before, after in lines}
        assert set(types) == {name for name, _ in model_tensors(model)}
        found[kind] = by_role(types)
    return found


def by_role(types: dict[str, str]) -> dict[str, str]:
    """``{"blk.0.attn_v.weight": "Q6_K", ..}`` to ``{"attn_v.weight": "Q6_K Q4_K .."}``."""
    roles: dict[str, list[str]] = {}
    for name in sorted(types, key=lambda name: int((re.findall(r"\d+", name) or ["0"])[0])):
        roles.setdefault(re.sub(r"^blk\.\d+\.", "", name), []).append(types[name])
    return {role: kinds[0] if len(set(kinds)) == 1 else " ".join(kinds) for role, kinds in roles.items()}


def main() -> None:
    """Write all golden files."""
    blocks, library = adversarial_blocks(), load_ggml()
    golden: dict[str, Any] = {
        kind: ggml_quantize(library, blocks, kind) for kind in TYPES if kind not in ("F32", "F16", "BF16")
    }
    # Every value fits in bfloat16 and in float32; float16 has an end.
    golden |= {kind: ggml_quantize(library, blocks, kind) for kind in ("F32", "BF16")}
    fits = np.abs(blocks).max(axis=1) < 65504
    golden["F16"] = ggml_quantize(library, blocks[fits], "F16")
    arrays: dict[str, Any] = {"values": blocks, "fits": fits, **golden}
    np.savez_compressed(HERE / "gguf_blocks.npz", **arrays)
    write_tiny(HERE / "gguf_tiny.gguf")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.gguf"
        hashes = {}
        for options in TINY_OPTIONS:
            run_quantize(*options[:-1], str(HERE / "gguf_tiny.gguf"), str(out), options[-1])
            hashes[" ".join(options)] = sha256_file(out)
        write_json(HERE / "gguf_tiny.json", hashes)
        mixes = [{"model": model, "types": dry_types(model, Path(scratch))} for model in MODELS]
    write_json(HERE / "gguf_mixes.json", mixes)


if __name__ == "__main__":
    main()
