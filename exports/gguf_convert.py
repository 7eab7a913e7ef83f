"""A Hugging Face checkpoint as a GGUF file, unquantized: ``python -m exports.gguf_convert MODEL_DIR OUT.gguf --type F16``."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from exports.gguf_file import GgufTensor, write_gguf
from exports.gguf_names import TensorMap
from quantize.checkpoint import Checkpoint, SafetensorsCheckpoint
from quantize.errors import InputError

FILE_TYPES = {
    "F32": int(gguf.LlamaFileType.ALL_F32),
    "F16": int(gguf.LlamaFileType.MOSTLY_F16),
    "BF16": int(gguf.LlamaFileType.MOSTLY_BF16),
}
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_F16_MAX = 65504.0
# Rows are converted in slices of this many values, so that float32 copies stay small beside the tensor.
_SLICE = 2**22


def convert(
    source: Checkpoint | Path, destination: Path, kind: str = "auto", *, name: str | None = None, pre: str | None = None
) -> str:
    """Write a checkpoint as a GGUF file.

    Matrices get the type ``kind``; vectors, norms and learned positions F32, which is all that llama.cpp takes for them.

    Args:
        source: an opened checkpoint with a tokenizer beside it, or its directory.
        destination: the file.
        kind: ``F16``, ``BF16``, ``F32``, or ``auto``: the type most weights have in the checkpoint.
        name: ``general.name``; the directory's name if none is given.
        pre: llama.cpp's pre-tokenizer, where it is not to be found out from the tokenizer.

    Returns:
        The type that matrices got.

    Raises:
        InputError: another ``kind``, a model or tokenizer that llama.cpp does not have, a weight that float16 cannot hold, or
            a disk that is full.
    """
    checkpoint = source if isinstance(source, Checkpoint) else SafetensorsCheckpoint(source)
    if not checkpoint.path.is_dir():
        raise InputError(f"{checkpoint.path} is no directory; give one with config.json, safetensors and tokenizer.json")
    if kind not in (*FILE_TYPES, "auto"):
        raise InputError(f"type {kind!r} is none of {', '.join(FILE_TYPES)}, auto; F16 is what most start from")
    if kind == "auto":
        kind = _majority(checkpoint)
    config = checkpoint.config_dict()
    tensors = TensorMap(config)
    stored = [_tensor(checkpoint, tensors, hf_name, kind) for hf_name in sorted(checkpoint.names(), key=_place)]
    write_gguf(
        destination,
        config=config,
        tokenizer_dir=checkpoint.path,
        tensors=[tensor for tensor in stored if tensor is not None],
        file_type=FILE_TYPES[kind],
        name=name or checkpoint.path.resolve().name,
        pre=pre,
    )
    return kind


def _majority(checkpoint: Checkpoint) -> str:
    counts = dict.fromkeys(_KINDS, 0)
    for hf_name in checkpoint.names():
        counts[checkpoint.dtype(hf_name)] += prod(checkpoint.shape(hf_name))
    return _KINDS[max(counts, key=lambda dtype: counts[dtype])]


def _place(hf_name: str) -> tuple[int, int, str]:
    """Embeddings, then blocks by number, then the rest: the order in which a model is run."""
    block = re.search(r"\.(\d+)\.", f".{hf_name}")
    first = re.search(r"embed_tokens|wte|wpe", hf_name)
    return (0 if first else 1 if block else 2), int(block[1]) if block else 0, hf_name


def _tensor(checkpoint: Checkpoint, tensors: TensorMap, hf_name: str, kind: str) -> GgufTensor | None:
    name = tensors.name(hf_name)
    if name is None:
        return None
    shape = tensors.shape(hf_name, checkpoint.shape(hf_name))
    if len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight") or name == "position_embd.weight":
        kind = "F32"
    return GgufTensor(name, kind, shape, _reader(checkpoint, tensors, hf_name, kind))


def _reader(checkpoint: Checkpoint, tensors: TensorMap, hf_name: str, kind: str) -> Callable[[], Iterator[NDArray[Any]]]:
    def read() -> Iterator[NDArray[Any]]:
        # Pages of the file that were touched before count as this process's memory.
        checkpoint.release()
        tensor = checkpoint.tensor(hf_name)
        # numpy has no bfloat16: its bits travel as uint16.
        bfloat16 = tensor.dtype == torch.bfloat16
        values = tensor.view(torch.int16).numpy().view(np.uint16) if bfloat16 else tensor.numpy()
        if hf_name.endswith("norm.weight") and bfloat16:
            values, bfloat16 = _float32(values, True), False
        return _converted(tensors.transform(hf_name, values), bfloat16, kind, hf_name)

    return read


def _float32(values: NDArray[Any], bfloat16: bool) -> NDArray[np.float32]:
    return (values.astype(np.uint32) << 16).view(np.float32) if bfloat16 else values.astype(np.float32)


def _converted(values: NDArray[Any], bfloat16: bool, kind: str, hf_name: str) -> Iterator[NDArray[Any]]:
    """``values`` in the type ``kind``, in slices of the first axis."""
    stored = "BF16" if bfloat16 else {np.float16: "F16", np.float32: "F32"}[values.dtype.type]
    rows = max(1, _SLICE // max(1, prod(values.shape[1:])))
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        if stored != kind:
            part = _float32(part, bfloat16)
            part = _bfloat16(part) if kind == "BF16" else _float16(part, hf_name) if kind == "F16" else part
        yield part


def _float16(values: NDArray[np.float32], hf_name: str) -> NDArray[np.float16]:
    over = np.abs(values[np.isfinite(values)]).max(initial=0)
    if over > _F16_MAX:
        raise InputError(f"tensor {hf_name} holds {over:g}, beyond float16's {_F16_MAX:g}; give --type BF16 or F32")
    return values.astype(np.float16)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 64, nearest).astype(np.uint16)


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 2 with one line where the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m exports.gguf_convert", description=__doc__)
    parser.add_argument("model", type=Path, help="directory of a Hugging Face checkpoint: config.json, safetensors, tokenizer")
    parser.add_argument("out", type=Path, help="the .gguf file to write")
    parser.add_argument("--type", default="auto", choices=[*FILE_TYPES, "auto"], help="type of the matrices (auto: as stored)")
    parser.add_argument("--name", help="general.name of the file (the directory's name)")
    parser.add_argument("--pre", help="llama.cpp's pre-tokenizer, where it is not known from the tokenizer")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        kind = convert(options.model, options.out, options.type, name=options.name, pre=options.pre)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {kind}, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
